"""A stack of equal layers: parameters with a leading axis `layers`, run by a scan or a pipeline.

The parameters have the same layout on every mesh and with every remat policy, so a checkpoint fits
all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PyTree
from jaxtyping import Shaped

from parti_jax.core import errors
from parti_jax.models.nn import attention_kernel
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import pipeline_parallelism

# What the forward pass saves for the backward pass, by the name of the remat policy.
REMAT_POLICIES = {
  'everything': jax.checkpoint_policies.save_anything_except_these_names(
    pipeline_parallelism.VISIT_PARAMETERS
  ),
  'dots': jax.checkpoint_policies.save_only_these_names(
    layers.PROJECTION_OUTPUT, attention_kernel.ATTENTION_OUTPUT
  ),
  'block_inputs_and_attention': jax.checkpoint_policies.save_only_these_names(
    attention_kernel.ATTENTION_OUTPUT
  ),
  'block_inputs': jax.checkpoint_policies.nothing_saveable,
  'nothing': jax.checkpoint_policies.nothing_saveable,
}


def remat(layer: Callable, policy: str) -> Callable:
  """Wraps a layer so that its backward pass recomputes what the policy doesn't save.

  Args:
    layer: function of arrays.
    policy: what to save. 'everything' recomputes nothing. 'dots' saves the outputs of projections and attention,
      'block_inputs_and_attention' the input of each layer and the outputs of attention,
      'block_inputs' the input of each layer. 'nothing' saves one input for about √layers layers, so
      each layer is computed three times; in a pipeline it is the same as 'block_inputs'.

  Raises:
    ValueError: if the policy is unknown.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f'unknown remat policy {policy!r}; known: {", ".join(REMAT_POLICIES)}')
  return jax.checkpoint(layer, policy=REMAT_POLICIES[policy], prevent_cse=False)


def parameters(module: nn.Module, block: nn.Module, length: int, *inputs) -> PyTree:
  """Declares `layers`, the parameters of `length` blocks, stacked along a new axis `layers`.

  Args:
    module: the module that has them, in its `nn.compact` method.
    block: a module without a parent.
    length: number of layers.
    *inputs: inputs of the block; only their shapes matter.

  Returns:
    The stacked parameters, without the boxes that hold axis names.

  Raises:
    flax.errors.ScopeParamShapeError: if the module is applied to another number of layers.
  """
  if module.has_variable('params', 'layers'):
    # As in `layers.parameter`; each layer checks the shapes of its own.
    stacked = nn.meta.unbox(module.get_variable('params', 'layers'))
    for leaf in jax.tree.leaves(stacked):
      if np.shape(leaf)[:1] != (length,):
        path = '/'.join(module.path)
        raise flax.errors.ScopeParamShapeError('layers', path, np.shape(leaf)[:1], (length,))
    return stacked

  def init(key):
    one = lambda key: block.init(key, *inputs)['params']
    with mesh_lib.without_mesh():  # The batch of one example can't be divided among the devices.
      if layers.shapes_suffice():  # `jax.vmap` takes longer to trace.
        shapes = jax.eval_shape(one, key)
        stacked = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
      else:
        stacked = jax.vmap(one)(jax.random.split(key, length))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

  return module.param('layers', init)


@dataclasses.dataclass(frozen=True)
class LayerStack:
  """Runs equal layers in sequence, or as a pipeline if the mesh has several stages.

  Attributes:
    layer: computes one layer: (params, pattern_index, x, side_inputs, dropout_keys) -> x.
      `pattern_index` says which of the `period` patterns the layer has. It is an int, or an int32
      scalar in a pipeline whose visits don't hold whole periods.
    remat: name in REMAT_POLICIES.
    unroll: number of layers that each iteration of the scan computes; at least one period.
    period: number of patterns. The layers repeat them in order; it divides the number of layers.
  """

  layer: Callable[..., Array]
  remat: str = 'everything'
  unroll: int = 1
  period: int = 1

  def run(
    self,
    stacked: PyTree[Float[Array | np.ndarray, 'layers ...']],
    x: Float[Array, 'batch length embed'],
    side_inputs: PyTree[Shaped[Array, 'batch ...']] = None,
    dropout_keys: layers.DropoutKeys | None = None,
    all_layers: bool = False,
  ) -> Float[Array, '*layers batch length embed']:
    """Runs all layers.

    Args:
      stacked: the parameters of all layers.
      x: input of the first layer.
      side_inputs: arrays that every layer sees, such as the text.
      dropout_keys: keys of the stack; None if dropout is off.
      all_layers: whether to return the outputs of all layers.

    Returns:
      The output of the last layer, with the shape of x. With `all_layers` the outputs of all
      layers, with a leading axis of layers.

    Raises:
      UserError: with `all_layers` in a pipeline, whose stages return only their last output.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    schedule = pipeline_parallelism.schedule(count, x.shape[0])
    if schedule is None:
      return self._scan(stacked, x, side_inputs, dropout_keys, all_layers)
    if all_layers:
      raise errors.UserError(
        f"make_mesh.stage={schedule.stages}: a pipeline can't return the outputs of all layers, "
        'which GeneratorObjective.depth_loss_weights needs; train without stages, or without '
        'that loss'
      )
    return self._pipeline(stacked, x, side_inputs, dropout_keys, schedule)

  def _one(self, dropout_keys: layers.DropoutKeys | None) -> Callable[..., Array]:
    """Returns `layer` as (pattern_index, params, index, x, side_inputs, rows) -> x.

    `index` is the layer's index among all layers, which gives it its own dropout. The rows of the
    dropout keys are an argument, because a pipeline splits them like the batch.
    """

    def one(pattern_index, params, index, x, side_inputs, rows):
      keys = None if dropout_keys is None else layers.DropoutKeys(dropout_keys.key, rows)
      return self.layer(params, pattern_index, x, side_inputs, layers.fold(keys, index))

    return one

  def _pipeline(self, stacked, x, side_inputs, dropout_keys, schedule):
    one, rows = self._one(dropout_keys), _rows(dropout_keys)

    def layer(params, index, index_in_visit, *others):
      # If visits hold whole periods, both indices lead to the same pattern. The one in the visit is
      # an int, so that only this pattern is compiled.
      whole_periods = schedule.layers_per_visit % self.period == 0
      pattern_index = (index_in_visit if whole_periods else index) % self.period
      return one(pattern_index, params, index, *others)

    return pipeline_parallelism.run(
      layer, lambda visit: remat(visit, self.remat), stacked, x, (side_inputs, rows), schedule
    )

  def _scan(self, stacked, x, side_inputs, dropout_keys, all_layers):
    one, rows = self._one(dropout_keys), _rows(dropout_keys)
    # The layers of a period, with one pattern each.
    period: list[Callable] = [functools.partial(one, pattern) for pattern in range(self.period)]
    if self.remat != 'everything':
      period = [remat(layer, self.remat) for layer in period]

    def scan(x, stacked, indices):
      """Runs some of the layers. Returns x, and the outputs [turns, period, ...] or None."""

      def body(x, inputs):
        outputs = []
        parts = [inputs] if self.period == 1 else _apart(inputs)
        for layer, (params, index) in zip(period, parts):
          x = layer(params, index, x, side_inputs, rows)
          outputs.append(x)
        return x, jnp.stack(outputs) if all_layers else None

      periods = stacked, indices
      if self.period > 1:  # A reshape for nothing would make XLA on a CPU copy all parameters.
        periods = _grouped(periods, self.period)  # [turns, period, ...]
      turns = len(indices) // self.period
      unroll = min(max(1, self.unroll // self.period), turns)
      return jax.lax.scan(body, x, periods, unroll=unroll)

    count = jax.tree.leaves(stacked)[0].shape[0]
    indices = jnp.arange(count)
    if self.remat != 'nothing':
      x, outputs = scan(x, stacked, indices)
    else:
      groups = _grouped((stacked, indices), _near_root(count, self.period))
      group = functools.partial(jax.checkpoint, prevent_cse=False)(scan)
      x, outputs = jax.lax.scan(lambda x, part: group(x, *part), x, groups)
    return outputs.reshape((count,) + x.shape) if all_layers else x


def unstacked(stacked: PyTree | Sequence[PyTree], count: int) -> list[PyTree]:
  """Returns the parameters of each layer.

  Args:
    stacked: parameters with the leading axis `layers`, or already a list of those of each layer.
      Sampling uses a list, because slicing the layers out of one array would copy them at each step.
    count: number of layers.
  """
  if isinstance(stacked, (list, tuple)):
    return list(stacked)
  return [jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked) for layer in range(count)]


def _rows(dropout_keys: layers.DropoutKeys | None) -> Array | None:
  return None if dropout_keys is None else dropout_keys.rows


def _grouped(tree: PyTree, size: int) -> PyTree:
  """Reshapes arrays [layers, ...] to [layers / size, size, ...]."""
  return jax.tree.map(lambda leaf: leaf.reshape((-1, size) + leaf.shape[1:]), tree)


def _apart(tree: PyTree) -> list[PyTree]:
  """Splits a tree of arrays [number, ...] into a list of `number` trees of arrays [...]."""
  leaves, structure = jax.tree.flatten(tree)
  # A split instead of indexing, because its gradient is a single concatenation.
  cut = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [jnp.squeeze(part, 0) for part in parts]) for parts in zip(*cut)
  ]


def _near_root(count: int, multiple: int) -> int:
  """Returns the divisor of `count` nearest to its root among the multiples of `multiple`."""
  divisors = [size for size in range(multiple, count + 1, multiple) if count % size == 0]
  return min(divisors, key=lambda size: abs(math.log(size * size / count)))
