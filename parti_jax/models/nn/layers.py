"""Basic layers with logical axis names: projections, dropout, norms, MLPs, embeddings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree
from jaxtyping import UInt32

from parti_jax.models.nn import quantization

# Checkpoint name, for remat policies, of the results of projections.
PROJECTION_OUTPUT = 'projection_output'
# Logical axes of the activations between blocks.
ACTIVATION = ('activation_batch', 'activation_length', 'activation_embed')


# JAX traces a jitted function again when this changes. Otherwise an `init` that is jitted, or calls such a
# function, would go on returning zeros.
_only_shapes: Any = jax.make_user_context(False)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
  """Initializes parameters to 0 in the body, for tracing an `init` whose values don't matter.

  Tracing random initial values takes most of the time of `jax.eval_shape(model.init, ...)`.
  """
  with _only_shapes(True):
    yield


def shapes_suffice() -> bool:
  """Returns whether this runs in the body of `only_shapes`."""
  return _only_shapes.value


def parameter(
  module: nn.Module,
  name: str,
  initializer: Callable[..., Array],
  axes: tuple[str, ...],
  shape: tuple[int, ...],
) -> Array:
  """Declares a float32 parameter of a module with logical axis names.

  Args:
    module: the module, in its `setup` or in its `nn.compact` method.
    name: name of the parameter.
    initializer: (key, shape) -> initial values.
    axes: a logical axis name for each dimension.
    shape: shape of the parameter.

  Returns:
    The value of the parameter, without the box that holds its axis names.

  Raises:
    flax.errors.ScopeParamShapeError: if the module is applied to a value of another shape.
  """
  if module.has_variable('params', name):
    # `module.param` would trace the initializer, which takes longer than tracing the layer.
    value = nn.meta.unbox(module.get_variable('params', name))
    found = np.shape(jax.tree.leaves(value)[0])
    if found != tuple(shape):
      raise flax.errors.ScopeParamShapeError(name, '/'.join(module.path), found, shape)
    return value
  if shapes_suffice():
    initializer = nn.initializers.zeros
  boxed: Callable = nn.with_logical_partitioning(initializer, axes)
  return module.param(name, boxed, shape)


class Projection(nn.Module):
  """A linear layer without bias over the last `contracted` axes.

  Attributes:
    features: sizes of the axes that replace the contracted ones.
    contracted: number of trailing axes of the input to sum over.
    axes: logical axis names of the kernel; the contracted axes come first.
    dtype: dtype of the computation; the kernel is float32, or for sampling also a
      `quantization.QuantizedKernel`.
    scale: the initial standard deviation of the kernel is sqrt(scale / fan-in).
  """

  features: tuple[int, ...]
  contracted: int
  axes: tuple[str, ...]
  dtype: jnp.dtype = jnp.float32
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, '*rows_and_contracted']) -> Float[Array, '*rows_and_features']:
    contracted = x.shape[-self.contracted :]
    kernel, scale = self._kernel(contracted, x)
    # Rows become one axis, so that the gradient of the kernel is a plain matrix product. With
    # several axes, XLA on a CPU first makes a transposed copy, which can cost as much again.
    rows = x.shape[: -self.contracted]
    x = x.astype(self.dtype).reshape((-1,) + contracted)
    dimensions = tuple(range(1, x.ndim)), tuple(range(self.contracted))
    product = jax.lax.dot_general(x, kernel, (dimensions, ((), ())))
    product = self._scaled(product.reshape(rows + self.features), scale)
    return checkpoint_name(product, PROJECTION_OUTPUT)

  def _kernel(
    self, contracted: tuple[int, ...], x: Float[Array, '*places']
  ) -> tuple[
    Float[Array | np.ndarray, '*contracted_and_features'], Float32[Array, '*features'] | None
  ]:
    """Returns the kernel in the dtype of the computation, and the scale of a quantized one.

    Args:
      contracted: sizes of the kernel's contracted axes.
      x: what the kernel will be multiplied with.
    """
    stddev = math.sqrt(self.scale / math.prod(contracted))
    initializer = nn.initializers.truncated_normal(stddev)
    shape = contracted + self.features
    kernel = parameter(self, 'kernel', initializer, self.axes, shape)
    if not isinstance(kernel, quantization.QuantizedKernel):
      return kernel.astype(self.dtype), None
    if (kernel.values.shape, kernel.scale.shape) != (shape, self.features):
      raise ValueError(f'a kernel of shape {shape} with scales of shape {kernel.scale.shape}')
    return quantization.converted(kernel.values, self.dtype, x), kernel.scale

  def _scaled(
    self, product: Float[Array, '*places'], scale: Float32[Array, '*features'] | None
  ) -> Float[Array, '*places']:
    """Multiplies a product by the scale of its kernel, if that is quantized."""
    return product if scale is None else (product * scale).astype(self.dtype)


class HeadsProjection(Projection):
  """A projection to heads or from them, which may lie side by side in one axis."""

  @nn.compact
  def __call__(
    self, x: Float[Array, '*rows_and_contracted'], packed: tuple[int, ...] | None = None
  ) -> Float[Array, '*rows_and_features']:
    """Projects x.

    Args:
      x: the input.
      packed: the kernel's contracted sizes, if heads lie side by side: features (..., heads,
        head_dim) are a single last axis of the result, and those before them become leading axes;
        contracted (heads, head_dim) are a single last axis of x.
    """
    if packed is None:
      return super().__call__(x)
    (kernel, scale), x = self._kernel(packed, x), x.astype(self.dtype)
    if self.contracted > 1:
      product = self._scaled(x @ kernel.reshape((-1,) + self.features), scale)
      return checkpoint_name(product, PROJECTION_OUTPUT)
    parts = self.features[:-2]
    side_by_side = parts + (math.prod(self.features[-2:]),)
    kernel = kernel.reshape(packed + side_by_side)
    scale = None if scale is None else scale.reshape(side_by_side)
    product = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    product = self._scaled(product, scale)
    return checkpoint_name(jnp.moveaxis(product, -2, 0) if parts else product, PROJECTION_OUTPUT)


class DropoutKeys(flax.struct.PyTreeNode):
  """A key, and the indices of the examples in the whole batch; dropout masks depend on these alone.

  They don't depend on the mesh, on the split into microbatches, or on the pipeline stage. A
  recomputed mask therefore equals the first one, like the deterministic masks of Parti's 20B model
  (Parti, section 3).

  Attributes:
    key: a random key.
    rows: index of each example in the batch of the whole step.
  """

  key: PRNGKeyArray
  rows: UInt32[Array, 'batch']


def dropout_keys(key: PRNGKeyArray, batch: int) -> DropoutKeys:
  """Returns keys for all examples of a batch."""
  return DropoutKeys(key, jnp.arange(batch, dtype=jnp.uint32))


def fold(keys: DropoutKeys | None, number: int | Int[Array, '']) -> DropoutKeys | None:
  """Returns the keys of part `number` of the network, such as a layer; None if dropout is off."""
  return None if keys is None else keys.replace(key=jax.random.fold_in(keys.key, number))


class Dropout(nn.Module):
  """Dropout that draws 16 random bits per value: four values from each threefry pair of words.

  Attributes:
    rate: fraction of values set to 0, rounded to a multiple of 1/65536. The other values are
      divided by one minus the rounded rate, so the expectation is exact.
  """

  rate: float

  def __call__(
    self, x: Float[Array, 'batch *places features'], keys: DropoutKeys | None
  ) -> Float[Array, 'batch *places features']:
    """Drops values of `x`; returns it unchanged if `keys` is None."""
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
  """Layer norm in float32, by default with a scale and no bias (Parti, section 3).

  Attributes:
    dtype: dtype of the output; statistics are always float32.
    epsilon: what is added to the variance.
    use_scale: whether it multiplies by a learned scale.
    use_bias: whether it adds a learned bias.
  """

  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6
  use_scale: bool = True
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, '*places features']) -> Float[Array, '*places features']:
    of_features = ('norm',), (x.shape[-1],)
    scale = parameter(self, 'scale', nn.initializers.ones, *of_features) if self.use_scale else None
    bias = parameter(self, 'bias', nn.initializers.zeros, *of_features) if self.use_bias else None
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean)
    normed = (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon)
    normed = normed if scale is None else normed * scale
    return (normed if bias is None else normed + bias).astype(self.dtype)


class RMSNorm(nn.Module):
  """Division by the root mean square in float32, with a scale and no bias (arXiv 1910.07467).

  Attributes:
    dtype: dtype of the output; statistics are always float32.
    epsilon: what is added to the mean square. The default is Llama's and LlamaGen's.
  """

  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, '*places features']) -> Float[Array, '*places features']:
    scale = parameter(self, 'scale', nn.initializers.ones, ('norm',), (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


class MLP(nn.Module):
  """Two projections with a GELU in between.

  Attributes:
    width: model dimension `embed`.
    mlp_width: dimension `mlp` between the projections.
    dtype: dtype of the computation.
  """

  width: int
  mlp_width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch length features']
  ) -> Float[Array, 'batch length embed']:
    hidden = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype, name='project_in')(x)
    hidden = nn.with_logical_constraint(
      hidden, ('activation_batch', 'activation_length', 'activation_mlp')
    )
    return Projection((self.width,), 1, ('mlp', 'embed'), self.dtype, name='project_out')(
      nn.gelu(hidden)
    )


class SwiGLU(nn.Module):
  """An MLP with a gate: project_out(silu(project_gate(x)) · project_in(x)) (arXiv 2002.05202).

  Attributes:
    width: model dimension `embed`.
    mlp_width: dimension `mlp` between the projections.
    dtype: dtype of the computation.
  """

  width: int
  mlp_width: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.project_in = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype)
    self.project_gate = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype)
    self.project_out = Projection((self.width,), 1, ('mlp', 'embed'), self.dtype)

  def __call__(self, x: Float[Array, 'batch length embed']) -> Float[Array, 'batch length embed']:
    hidden = nn.silu(self.project_gate(x)) * self.project_in(x)
    names = ('activation_batch', 'activation_length', 'activation_mlp')
    return self.project_out(nn.with_logical_constraint(hidden, names))


class NormedGEGLU(nn.Module):
  """An MLP with a gate and a norm: project_out(norm(gelu(project_gate(x)) · project_in(x))).

  This is the MLP of NormFormer (arXiv 2110.09456) with a GEGLU (arXiv 2002.05202), as in DALL·E mini.
  The GELU is exact, and the norm has a bias and no scale.

  Attributes:
    width: model dimension `embed`.
    mlp_width: dimension `mlp` between the projections.
    dtype: dtype of the computation.
  """

  width: int
  mlp_width: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.project_in = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype)
    self.project_gate = Projection((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype)
    self.norm = LayerNorm(self.dtype, 1e-5, use_scale=False, use_bias=True)
    self.project_out = Projection((self.width,), 1, ('mlp', 'embed'), self.dtype)

  def __call__(self, x: Float[Array, 'batch length embed']) -> Float[Array, 'batch length embed']:
    hidden = nn.gelu(self.project_gate(x), approximate=False) * self.project_in(x)
    names = ('activation_batch', 'activation_length', 'activation_mlp')
    return self.project_out(self.norm(nn.with_logical_constraint(hidden, names)))


class Embedding(nn.Module):
  """A table of vectors.

  Attributes:
    size: number of vectors.
    width: length of a vector.
    axes: logical names of both axes.
    stddev: standard deviation of the initial values.
  """

  size: int
  width: int
  axes: tuple[str, str] = ('vocab', 'embed')
  stddev: float = 0.02

  def setup(self):
    self.table = parameter(
      self, 'table', nn.initializers.normal(self.stddev), self.axes, (self.size, self.width)
    )

  def __call__(
    self, ids: Int[Array, '*places'], dtype: DTypeLike = jnp.float32
  ) -> Float[Array, '*places features']:
    """Looks up vectors, and converts them to `dtype`."""
    return jnp.take(self.table, ids, axis=0).astype(dtype)

  def attend(self, x: Float[Array, '*places features']) -> Float[Array, '*places ids']:
    """Returns the dot products of x with every vector of the table, in float32."""
    rows = x.astype(jnp.float32).reshape(-1, self.width)
    return (rows @ self.table.T).reshape(x.shape[:-1] + (self.size,))


def cross_entropy(
  logits: Float[Array, '*places ids'], targets: Int[Array, '*places']
) -> tuple[Float[Array, '*places'], Float[Array, '*places']]:
  """Cross entropy that supports logits whose last axis is split over devices.

  Args:
    logits: a float32 logit for each id.
    targets: ids in [0, ids).

  Returns:
    losses: the loss at each place, in nats.
    hits: 1 where the target has the largest logit, 0 elsewhere.
  """
  # A masked sum instead of indexing, which would gather the logits of all devices on each of them.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  at_target = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
  losses = jax.nn.logsumexp(logits, axis=-1) - at_target
  hits = at_target >= jnp.max(jax.lax.stop_gradient(logits), axis=-1)
  return losses, hits.astype(jnp.float32)


def count_parameters(variables: PyTree, where: Callable[[str], bool] = lambda path: True) -> int:
  """Counts the parameters in a tree of arrays or of abstract shapes.

  Args:
    variables: a tree such as the result of `jax.eval_shape(model.init, ...)`.
    where: whether to count a parameter, given its path, such as 'decoder/logits/kernel'.
  """
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables)):
    if where(jax.tree_util.keystr(path, simple=True, separator='/')):
      total += int(np.prod(leaf.shape))
  return total
