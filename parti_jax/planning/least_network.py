"""The least that the network must carry in a training step, by how the mesh splits the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from parti_jax.partitioning import rules as rules_lib


def of_parameters(
  parameters: PyTree, mesh: Mesh, rules: rules_lib.Rules, dtype: DTypeLike, microbatches: int
) -> dict[str, float]:
  """Counts the bytes that a device must send for parameters and gradients in a step.

  Axes that split the batch and a parameter (fully sharded data parallelism) gather the parameter in
  the dtype of the computation once for the forward and once for the backward pass of a microbatch,
  and scatter the sum of its gradient. Axes that split the batch alone add up the gradients once in a
  step. Rings send (n - 1) / n of an array in a gather or a scatter between n devices, and twice that
  in a sum. Activations between tensor-parallel devices or pipeline stages are not counted.

  Args:
    parameters: abstract parameters with shardings.
    mesh: the device mesh.
    rules: the result of `rules.logical_axis_rules`.
    dtype: dtype of the computation, in which parameters and gradients are sent.
    microbatches: microbatches of a step.

  Returns:
    Bytes per device and step, of 'parameters' and 'gradients'.
  """
  batch_axes = set(rules_lib.axes_of('activation_batch', rules))
  itemsize = jax.numpy.dtype(dtype).itemsize
  sent = {'parameters': 0.0, 'gradients': 0.0}
  for leaf in jax.tree.leaves(parameters):
    splitting = {axis for axes in leaf.sharding.spec for axis in rules_lib.as_tuple(axes)}
    # Stages keep their layers, which the examples of the whole batch pass through.
    gathered = _ways(mesh, (splitting & batch_axes) - {'stage'})
    replicas = _ways(mesh, batch_axes - splitting - {'stage'})
    share = itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    sent['parameters'] += 2 * microbatches * share * (gathered - 1)
    sent['gradients'] += microbatches * share * (gathered - 1)
    sent['gradients'] += 2 * share * (replicas - 1) / replicas
  return sent


def _ways(mesh: Mesh, axes: Sequence[str] | set[str]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)
