"""Int8 weights and int8 caches: 8-bit integers with float32 scales.

A kernel has a scale for each output channel, the keys and values of a cache one for each vector of a
head. Activations are not quantized: a product converts the integers to its own dtype, and the scales
multiply its result or, for values, the probabilities before it. So a device reads one byte for each
number.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int8

from parti_jax.partitioning import mesh as mesh_lib

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


class QuantizedVectors(flax.struct.PyTreeNode):
  """Vectors along a last axis, in place of the floating-point array: `values * scale[..., None]`.

  Attributes:
    values: integers from -127 to 127.
    scale: the number that 1 stands for, for each vector.
  """

  values: Int8[Array, '*places features']
  scale: Float32[Array, '*places']


def quantize(kernel: Float[Array, '*contracted_and_features'], contracted: int) -> QuantizedKernel:
  """Rounds a kernel to 8 bits.

  The error of a weight is at most half of its channel's scale, which is the channel's largest
  absolute weight divided by 127.

  Args:
    kernel: the kernel, whose contracted axes come first.
    contracted: number of these axes. The others are the output channels.
  """
  values, scale = _rounded(kernel, tuple(range(contracted)))
  return QuantizedKernel(values, jnp.squeeze(scale, tuple(range(contracted))))


def quantize_vectors(x: Float[Array, '*places features']) -> QuantizedVectors:
  """Rounds vectors to 8 bits.

  The error of a number is at most half of its vector's scale, which is the vector's largest absolute
  value divided by 127.

  Args:
    x: vectors along the last axis.
  """
  values, scale = _rounded(x, (x.ndim - 1,))
  return QuantizedVectors(values, jnp.squeeze(scale, -1))


def converted(
  values: Int8[Array, '*places'], dtype: DTypeLike, x: Float[Array, '*others']
) -> Float[Array, '*places']:
  """Converts integers inside the loop that multiplies them with x.

  Args:
    values: the integers, which may be the same in each iteration.
    dtype: the dtype to convert them to.
    x: what they are multiplied with.
  """
  if mesh_lib.platform() != 'cpu':
    # Makes the conversion depend on x. XLA could otherwise convert all integers once before a loop
    # over positions, and read them in the larger dtype at each. On a CPU, where a product reads a
    # converted copy in any case, that is the faster way.
    values, _ = jax.lax.optimization_barrier((values, x))
  return values.astype(dtype)


def _rounded(
  x: Float[Array, '*places'], axes: tuple[int, ...]
) -> tuple[Int8[Array, '*places'], Float32[Array, '*reduced']]:
  """Returns integers, and the scales that they have in common along `axes`, of size 1 there."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  # Zeros, or numbers too small for their scale, become 0.
  scale = jnp.maximum(largest / _LARGEST, jnp.finfo(jnp.float32).tiny)
  values = jnp.clip(jnp.round(x / scale), -_LARGEST, _LARGEST)
  return values.astype(jnp.int8), scale


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
