"""The small layers that every network is made of, with logical axis names."""

from __future__ import annotations

import math

import flax.linen as nn
import flax.struct
import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import UInt32

# Names of the axes of an activation at a block's boundary.
ACTIVATION = ('activation_batch', 'activation_length', 'activation_embed')


class Projection(nn.Module):
  """A linear map without bias over the last `contracted` axes.

  Attributes:
    features: the axes that replace the contracted ones.
    contracted: how many trailing axes of the input are summed over.
    axes: logical names of the kernel's axes, the contracted ones first.
    dtype: of the computation; the kernel is float32.
    scale: the kernel's standard deviation is sqrt(scale / fan-in).
  """

  features: tuple[int, ...]
  contracted: int
  axes: tuple[str, ...]
  dtype: jnp.dtype = jnp.float32
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, '*rows_and_contracted']) -> Float[Array, '*rows_and_features']:
    contracted = x.shape[-self.contracted :]
    stddev = math.sqrt(self.scale / math.prod(contracted))
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(nn.initializers.truncated_normal(stddev), self.axes),
      contracted + self.features,
    )
    # With one axis of rows the kernel's gradient is a product of two matrices as they lie; over
    # several, XLA on a CPU first writes a transposed copy, at up to the cost of the product.
    rows = x.shape[: -self.contracted]
    x = x.astype(self.dtype).reshape((-1,) + contracted)
    dimensions = tuple(range(1, x.ndim)), tuple(range(self.contracted))
    product = jax.lax.dot_general(x, kernel.astype(self.dtype), (dimensions, ((), ())))
    return product.reshape(rows + self.features)


@flax.struct.dataclass
class DropoutKeys:
  """What dropout masks follow from: a key, and the places of examples in the whole batch.

  A mask depends on nothing else: not on the mesh, on how a batch is cut into microbatches, nor on
  the pipeline stage that computes it. So a recomputed mask is the one that was used, as the
  deterministic masks of Parti's 20B model (Parti, section 3).

  Attributes:
    key: a key [].
    rows: uint32 [batch], the place of each example in the batch of the whole step.
  """

  key: PRNGKeyArray
  rows: UInt32[Array, 'batch']


def dropout_keys(key, batch: int) -> DropoutKeys:
  """Keys for all examples of a batch."""
  return DropoutKeys(key, jnp.arange(batch, dtype=jnp.uint32))


def fold(keys: DropoutKeys | None, number) -> DropoutKeys | None:
  """Keys of a part of the network, such as a layer: `number` is its int32 [] place.

  None, where dropout is off, stays None.
  """
  return None if keys is None else keys.replace(key=jax.random.fold_in(keys.key, number))


class Dropout(nn.Module):
  """Dropout that draws 16 random bits a value, four values from each pair of words of threefry.

  Attributes:
    rate: share of values that become 0, rounded to a multiple of 1/65536. The others are divided
      by one minus the rounded rate, so that the expectation is exact.
  """

  rate: float

  def __call__(
    self, x: Float[Array, 'batch *places features'], keys: DropoutKeys | None
  ) -> Float[Array, 'batch *places features']:
    """Drops values of `x`, unless `keys` is None."""
    dropped = min(round(self.rate * 2**16), 2**16 - 1)
    if keys is None or not dropped:
      return x
    features = x.shape[-1]
    shape = x.shape[:-1] + (-(-features // 4),)
    place = jnp.zeros(shape[1:], jnp.uint32)
    for axis, size in enumerate(shape[1:]):
      place = place * size + jax.lax.broadcasted_iota(jnp.uint32, shape[1:], axis)
    rows = keys.rows.reshape((-1,) + (1,) * place.ndim)
    words = jax.extend.random.threefry2x32_p.bind(
      *jax.random.key_data(keys.key)[:2],
      jnp.broadcast_to(rows, shape),
      jnp.broadcast_to(place, shape),
    )
    quarters = [part for word in words for part in (word & 0xFFFF, word >> 16)]
    values = jnp.concatenate(quarters, axis=-1)[..., :features]
    return jnp.where(values >= dropped, x * (2**16 / (2**16 - dropped)), 0)


class LayerNorm(nn.Module):
  """Layer norm in float32, with a scale and without a bias (Parti, section 3).

  Attributes:
    dtype: of the output; the statistics are always float32.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      'scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (x.shape[-1],)
    )
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
    normed = (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + 1e-6)
    return (normed * scale).astype(self.dtype)


class MLP(nn.Module):
  """Two projections with a GELU between them.

  Attributes:
    width: model dimension `embed`.
    mlp_width: dimension `mlp` between the projections.
    dtype: of the computation.
  """

  width: int
  mlp_width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    hidden = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype, name='project_in')(x)
    hidden = nn.with_logical_constraint(
      hidden, ('activation_batch', 'activation_length', 'activation_mlp')
    )
    return Projection((self.width,), 1, ('mlp', 'embed'), self.dtype, name='project_out')(
      nn.gelu(hidden)
    )


class Embedding(nn.Module):
  """A table of vectors.

  Attributes:
    size: number of rows.
    width: length of a row.
    axes: logical names of both.
    stddev: standard deviation of the initial values.
  """

  size: int
  width: int
  axes: tuple[str, str] = ('vocab', 'embed')
  stddev: float = 0.02

  def setup(self):
    initializer = nn.initializers.normal(self.stddev)
    self.table = self.param(
      'table', nn.with_logical_partitioning(initializer, self.axes), (self.size, self.width)
    )

  def __call__(self, ids, dtype=jnp.float32):
    """ids: int32 [...]. Returns dtype [..., width]."""
    return jnp.take(self.table, ids, axis=0).astype(dtype)

  def attend(self, x):
    """Products of vectors with every row: [..., width] to float32 [..., size]."""
    rows = x.astype(jnp.float32).reshape(-1, self.width)
    return (rows @ self.table.T).reshape(x.shape[:-1] + (self.size,))


def cross_entropy(logits, targets):
  """Cross entropy of ids, where the ids' axis may be split over devices.

  Args:
    logits: float32 [..., ids].
    targets: int32 [...], each in [0, ids).

  Returns:
    losses float32 [...], and hits float32 [...], 1 where the target has the largest logit.
  """
  # Picked by a sum: an index into the last axis would gather logits that are split along it, and no
  # device is to hold all of them.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  at_target = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
  losses = jax.nn.logsumexp(logits, axis=-1) - at_target
  hits = at_target >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
  return losses, hits.astype(jnp.float32)


def count_parameters(variables, where=lambda path: True) -> int:
  """Number of parameters in a tree of arrays or of abstract shapes.

  Args:
    variables: a tree, as of `jax.eval_shape(model.init, ...)`.
    where: takes a parameter's path such as 'decoder/logits/kernel'; counts it where true.
  """
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables)):
    if where('/'.join(str(getattr(key, 'key', key)) for key in path)):
      total += int(np.prod(leaf.shape))
  return total
