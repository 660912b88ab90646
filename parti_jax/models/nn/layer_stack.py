"""A stack of equal layers: parameters with a leading axis `layers`, run by a scan or a pipeline.

The layout of the parameters is the same on every mesh and with every remat policy, so that a
checkpoint fits all of them.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.core import errors
from parti_jax.models.nn import attention
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import pipeline_parallelism

# What the backward pass finds in memory instead of computing it again.
REMAT_POLICIES = {
  'everything': jax.checkpoint_policies.save_anything_except_these_names(
    pipeline_parallelism.VISIT_PARAMETERS
  ),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'block_inputs_and_attention': jax.checkpoint_policies.save_only_these_names(
    attention.ATTENTION_OUTPUT
  ),
  'block_inputs': jax.checkpoint_policies.nothing_saveable,
  'nothing': jax.checkpoint_policies.nothing_saveable,
}


def remat(layer, policy: str):
  """Wraps a layer so that its backward pass keeps what `policy` says.

  Args:
    layer: function of arrays.
    policy: 'everything' (no recomputation), 'dots' (outputs of the projections),
      'block_inputs_and_attention' (each layer's input and the output of its self-attention),
      'block_inputs', or 'nothing' (of the inputs of about √layers layers each only the first;
      each layer is computed three times in all; in a pipeline the same as 'block_inputs').

  Raises:
    ValueError: if there is no such policy.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f'unknown remat policy {policy!r}; known: {", ".join(REMAT_POLICIES)}')
  return jax.checkpoint(layer, policy=REMAT_POLICIES[policy], prevent_cse=False)


def initializer(block: nn.Module, length: int, *inputs):
  """An initializer of the parameters of `length` blocks, stacked along a new axis `layers`.

  Args:
    block: a module without parent.
    length: number of layers.
    *inputs: what the block takes; only shapes count.

  Returns:
    A function of a key that returns boxed parameters, as `nn.Module.param` takes it.
  """

  def init(key):
    one = lambda key: block.init(key, *inputs)['params']
    with mesh_lib.unused():  # One example does not divide among the devices.
      stacked = jax.vmap(one)(jax.random.split(key, length))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

  return init


def run(
  layer,
  stacked,
  x,
  beside,
  dropout_keys,
  policy: str,
  unroll: int = 1,
  every: bool = False,
  period: int = 1,
):
  """Runs the layers one after the other; as a pipeline where the mesh has several stages.

  Args:
    layer: (params, place, x, beside, keys) -> x, of one layer. `place` is the layer's in the
      period: a Python number, or int32 [] in a pipeline whose visits do not hold whole periods.
    stacked: parameters with the leading axis `layers`.
    x: [batch, length, embed].
    beside: a tree of arrays [batch, ...] that every layer sees, such as the text.
    dropout_keys: layers.DropoutKeys, or None where dropout is off.
    policy: name in REMAT_POLICIES.
    unroll: layers laid out in one turn of the scan, at least the period.
    every: whether to return the outputs of all layers.
    period: after how many layers the same kind of layer comes again; divides their number.

  Returns:
    The output of the last layer, as x; or, with `every`, of all, [layers, batch, length, embed].

  Raises:
    UserError: with `every` in a pipeline, whose stages hand on only their last layer's output.
  """
  count = jax.tree.leaves(stacked)[0].shape[0]
  rows = None if dropout_keys is None else dropout_keys.rows
  keys_of = lambda rows: None if rows is None else layers.DropoutKeys(dropout_keys.key, rows)

  def one(place, params, index, x, beside, rows):
    return layer(params, place, x, beside, layers.fold(keys_of(rows), index))

  schedule = pipeline_parallelism.schedule(count, x.shape[0])
  if schedule is not None and every:
    raise errors.UserError(
      f'make_mesh.stage={schedule.stages}: a pipeline does not hand out the outputs of all '
      'layers, which GeneratorObjective.depth_loss_weights asks for; train without stages, or '
      'without that loss'
    )
  if schedule is not None:

    def in_visit(params, index, number, *others):
      whole = schedule.layers_per_visit % period == 0
      return one((number if whole else index) % period, params, index, *others)

    return pipeline_parallelism.run(
      in_visit, lambda visit: remat(visit, policy), stacked, x, (beside, rows), schedule
    )

  kinds = [functools.partial(one, place) for place in range(period)]
  if policy != 'everything':
    kinds = [remat(kind, policy) for kind in kinds]

  def scan(x, stacked, indices):
    def body(x, inputs):
      outputs = []
      for kind, part in zip(kinds, _apart(inputs)):
        x = kind(*part, x, beside, rows)
        outputs.append(x)
      return x, jnp.stack(outputs) if every else None

    periods = _grouped((stacked, indices), period)
    turns = len(indices) // period
    return jax.lax.scan(body, x, periods, unroll=min(max(1, unroll // period), turns))

  indices = jnp.arange(count)
  if policy != 'nothing':
    x, outputs = scan(x, stacked, indices)
  else:
    groups = _grouped((stacked, indices), _near_root(count, period))
    group = functools.partial(jax.checkpoint, prevent_cse=False)(scan)
    x, outputs = jax.lax.scan(lambda x, part: group(x, *part), x, groups)
  return outputs.reshape((count,) + x.shape) if every else x


def unstacked(stacked, count: int) -> list:
  """Parameters of each layer, of a tree with the leading axis `layers`; a list of them as it is.

  Sampling has a list: a step that sliced the layers out of one array would copy them all.
  """
  if isinstance(stacked, (list, tuple)):
    return list(stacked)
  return [jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked) for layer in range(count)]


def _grouped(tree, size: int):
  """Arrays [layers, ...] as [layers / size, size, ...]."""
  return jax.tree.map(lambda leaf: leaf.reshape((-1, size) + leaf.shape[1:]), tree)


def _apart(tree) -> list:
  """The trees of arrays [...] that a tree of arrays [number, ...] holds."""
  leaves, structure = jax.tree.flatten(tree)
  # Split, not indexed: the gradient of that is one concatenation.
  cut = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
  return [structure.unflatten([jnp.squeeze(part, 0) for part in parts]) for parts in zip(*cut)]


def _near_root(count: int, multiple: int) -> int:
  """Of the divisors of `count` that are multiples of a number, the one nearest to its root."""
  divisors = [size for size in range(multiple, count + 1, multiple) if count % size == 0]
  return min(divisors, key=lambda size: abs(math.log(size * size / count)))
