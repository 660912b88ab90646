"""Int8 weights: kernels as 8-bit integers with a float32 scale for each output channel.

Only the weights are quantized. A projection converts the integers to its dtype inside the product
and multiplies the result by the scales, so a device reads one byte for each weight.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int8

# The range is symmetric: -128 is not used.
_LARGEST = 127


class QuantizedKernel(flax.struct.PyTreeNode):
  """A kernel, in place of the floating-point array: `values * scale`.

  Attributes:
    values: integers from -127 to 127, in the shape of the kernel.
    scale: the kernel's value for 1, for each output channel.
  """

  values: Int8[Array, '*contracted_and_features']
  scale: Float32[Array, '*features']


def quantize(kernel: Float[Array, '*contracted_and_features'], contracted: int) -> QuantizedKernel:
  """Rounds a kernel to 8 bits.

  The error of a weight is at most half of its channel's scale, which is the channel's largest
  absolute weight divided by 127.

  Args:
    kernel: the kernel, whose contracted axes come first.
    contracted: number of these axes. The others are the output channels.
  """
  kernel = kernel.astype(jnp.float32)
  largest = jnp.max(jnp.abs(kernel), axis=tuple(range(contracted)))
  # A channel of zeros, or of numbers too small for its scale, becomes 0.
  scale = jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)
  values = jnp.clip(jnp.round(kernel / scale), -_LARGEST, _LARGEST)
  return QuantizedKernel(values.astype(jnp.int8), scale)


def shardings(kernel: jax.sharding.Sharding, contracted: int) -> QuantizedKernel:
  """Returns the shardings of a quantized kernel: the scales are split like the kernel's channels.

  Args:
    kernel: sharding of the kernel.
    contracted: number of its contracted axes.
  """
  scale = kernel
  if isinstance(kernel, NamedSharding):
    scale = NamedSharding(kernel.mesh, PartitionSpec(*kernel.spec[contracted:]))
  return QuantizedKernel(values=kernel, scale=scale)  # type: ignore[arg-type]
