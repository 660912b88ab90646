"""Logical axes between our modules and t5x's partitioner.

Our modules box each parameter with the names of its axes; t5x reads the names from a collection of
their own, `params_axes`. Parameters have t5x's own names ('embed', 'heads', 'mlp', 'vocab',
'layers'), so that its rules bind them. Activations have names of their own here, which follow the
rules of the parameters' names.
"""

from __future__ import annotations

import contextlib

import flax.core
import flax.linen as nn
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from parti_jax.partitioning import mesh as mesh_lib

# Axes of activations that are split as t5x splits the axis of the name without this prefix.
_PREFIX = 'activation_'
_FOLLOWED = ('batch', 'embed', 'heads', 'mlp', 'vocab')


def variables(boxed, **others) -> flax.core.FrozenDict:
  """What t5x expects of `get_initial_variables`.

  Args:
    boxed: parameters as a module's `init` gives them, in flax's boxes of logical axis names.
    **others: further collections, dicts of arrays that are not split.

  Returns:
    'params' without boxes, and 'params_axes', where the leaf NAME_axes is the AxisMetadata of NAME;
    and the others, with such a collection for each.
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
  """A context in which modules split activations by the mesh and rules of t5x's partitioner.

  To be entered wherever a module is applied. Rules for the activations' own names, which t5x's
  `additional_rules` may give, come first.
  """
  rules = tuple(nn.get_logical_axis_rules())
  rules += tuple((_PREFIX + name, axes) for name, axes in rules if name in _FOLLOWED)
  with mesh_lib.of_jit(), nn.logical_axis_rules(rules):
    yield
