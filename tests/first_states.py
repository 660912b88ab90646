"""First states of tiny runs, whose parameters NumPy draws instead of a compiled initialization.

Compiling the initialization of a run takes as long as compiling its training step, and few tests of
training depend on how the parameters begin. The state is made on the same shardings, and the
optimizer's state and the statistics belong to its parameters. Tests of the initialization itself
ask for the fixture that restores it.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import random_parameters

from parti_jax.models.nn import layers
from parti_jax.partitioning import rules as rules_lib
from parti_jax.training import state as state_lib

_create_state = state_lib.create_state


def drawn(objective, optimizer, seed, abstract, mesh, rules):
  """Returns the state before the first step, as `state_lib.create_state` does.

  The parameters of `random_parameters.like` depend on the seed and on their shapes, not on the mesh.
  Those of objectives that a test defines begin as they do in a run.

  Args:
    objective: the objective to train.
    optimizer: an optax transformation.
    seed: seed of the parameters.
    abstract: shapes and shardings of the state.
    mesh: the device mesh.
    rules: logical axis rules.

  Raises:
    KeyError: for a parameter whose name `random_parameters` doesn't know.
  """
  if not type(objective).__module__.startswith('parti_jax.'):
    return _create_state(objective, optimizer, seed, abstract, mesh, rules)
  with layers.only_shapes():
    boxed = jax.eval_shape(objective.init, jax.random.key(0))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  params = jax.device_put(nn.meta.unbox(random_parameters.like(boxed, seed)), shardings.params)
  create = functools.partial(state_lib.first_state, objective, optimizer)
  with rules_lib.partitioned(mesh, rules):
    return jax.jit(create, out_shardings=shardings)(params)


@contextlib.contextmanager
def creating(create_state):
  """Has runs in the body create their first state by this function."""
  before = state_lib.create_state
  state_lib.create_state = create_state
  try:
    yield
  finally:
    state_lib.create_state = before


def initialized():
  """Has runs in the body compute their first state as they do outside of tests."""
  return creating(_create_state)
