"""Passes the logical axes of our modules to t5x's partitioner.

Our modules box each parameter with the names of its axes; t5x reads these names from a separate
collection, `params_axes`. The axes of parameters have the same names as in t5x ('embed', 'heads',
'mlp', 'vocab', 'layers'), so its rules apply. The axes of activations have other names, which this
module binds by the rules of the corresponding parameters.
"""

from __future__ import annotations

import contextlib

import flax.core
import flax.linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from parti_jax.partitioning import mesh as mesh_lib

# Without this prefix, an activation's axis has the name of the axis whose rules it follows.
_PREFIX = 'activation_'
_FOLLOWED = ('batch', 'embed', 'heads', 'mlp', 'vocab')


def variables(boxed, **others) -> flax.core.FrozenDict:
  """Returns variables as t5x's `get_initial_variables` has to return them.

  Args:
    boxed: parameters that a module's `init` returned, with flax's boxes of logical axis names.
    **others: other collections, dicts of arrays that are not sharded.

  Returns:
    The unboxed parameters in 'params', and their axes in 'params_axes', where the leaf NAME_axes is
    the AxisMetadata of NAME. The other collections have the same form.
  """
  found = {'params': nn.meta.unbox(boxed), 'params_axes': _axes(boxed)}
  for name, collection in others.items():
    found |= {name: collection, f'{name}_axes': _axes(collection)}
  return flax.core.freeze(found)


def _axes(tree):
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  flat = traverse_util.flatten_dict(flax.core.unfreeze(tree), is_leaf=lambda _, leaf: is_box(leaf))
  return traverse_util.unflatten_dict(
    {
      path[:-1] + (f'{path[-1]}_axes',): flax_partitioning.AxisMetadata(
        tuple(leaf.names) if is_box(leaf) else (None,) * leaf.ndim
      )
      for path, leaf in flat.items()
    }
  )


@contextlib.contextmanager
def bound():
  """Shards the activations of modules by the mesh and the rules of t5x's partitioner.

  Modules must be applied within this context. Rules for the names of activations, which t5x's
  `additional_rules` may contain, take precedence.
  """
  rules = tuple(nn.get_logical_axis_rules())
  rules += tuple((_PREFIX + name, axes) for name, axes in rules if name in _FOLLOWED)
  with mesh_lib.of_jit(), nn.logical_axis_rules(rules):
    yield
