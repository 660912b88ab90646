"""Where a loaded network computes: one device, or a mesh that its parameters are spread over."""

from __future__ import annotations

import jax
import numpy as np

from parti_jax.core import numerics
from parti_jax.partitioning import rules as rules_lib


class Placement:
  """Puts parameters on devices and calls jitted functions there.

  Args:
    mesh: devices to spread parameters and batches over; None for one device.
    rules: logical axis rules, with a mesh; those of `parti_jax.partitioning` by default.
  """

  def __init__(self, mesh=None, rules=None):
    self._mesh = mesh
    self._rules = rules_lib.logical_axis_rules() if mesh is not None and rules is None else rules

  @numerics.fixed()
  def put(self, params, boxed, cut=lambda shardings: shardings):
    """Parameters on the devices.

    Args:
      params: a tree of arrays.
      boxed: abstract parameters with their logical axis names, of `model_folder.abstract`.
      cut: turns shardings of the whole parameters into those of `params`.

    Raises:
      UserError: if the mesh does not divide a parameter.
    """
    if self._mesh is None:
      return jax.device_put(params)
    shardings = rules_lib.parameter_shardings(boxed, self._mesh, self._rules)
    return jax.device_put(params, cut(shardings))

  @numerics.fixed()
  def run(self, function, params, arrays, *others, **statics):
    """Calls a jitted function: arrays [batch, ...] are split over the mesh; numpy in and out."""
    if self._mesh is None:
      return jax.device_get(function(*params, *arrays, *others, **statics))
    arrays = jax.device_put(arrays, rules_lib.batch_sharding(self._mesh, self._rules))
    with rules_lib.partitioned(self._mesh, self._rules):
      return jax.device_get(function(*params, *arrays, *others, **statics))

  def divisible(self, batch: int) -> int:
    """A batch size, rounded up to what the mesh divides."""
    ways = 1 if self._mesh is None else rules_lib.batch_ways(self._mesh, self._rules)
    return -(-batch // ways) * ways


def pieces(total: int, batch: int, progress: bool = False):
  """Yields where each piece starts and the indices in it, the last one filled up with repeats."""
  starts = range(0, total, batch)
  if progress:
    import tqdm

    starts = tqdm.tqdm(starts, desc='drawing', unit='batch', disable=None)
  for start in starts:
    yield start, np.minimum(np.arange(start, start + batch), total - 1)
