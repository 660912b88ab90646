"""The peak FLOP/s of a device, to which training reports its own speed as a share."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets. NVIDIA's give twice as much,
# for sparse matrices: https://www.nvidia.com/en-us/data-center/h100/, .../h200/ and .../a100/.
PEAKS = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU7x': 1153e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
}


def device_peak(device: jax.Device, dtype: DTypeLike = jnp.float32) -> float:
  """Returns the peak FLOP/s of one device.

  Args:
    device: the device.
    dtype: dtype to measure the peak with.

  Returns:
    The bfloat16 figure of the data sheet if the device is known. Otherwise the best of five
    products of 1024×1024 matrices of `dtype`; on a CPU, divided by the number of devices that
    share it.
  """
  for kind, peak in sorted(PEAKS.items(), key=lambda item: -len(item[0])):
    if device.device_kind.startswith(kind):
      return peak
  x = jax.device_put(jnp.ones((1024, 1024), dtype), device)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  sharing = len(jax.local_devices()) if device.platform == 'cpu' else 1
  return 2 * 1024**3 / best / sharing
