"""Applies a network to groups of examples on all devices of this process.

XLA's sums depend on the batch size in their last bits. Each device therefore computes groups of
exactly the same number of examples, so that the result for an example depends neither on the number of devices
nor on the number of examples per call.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from jaxtyping import Shaped

from parti_jax.core import numerics

# Number of examples that a device computes at once.
GROUP = 16


class DeviceGroups:
  """A function of parameters and rows, compiled for groups of rows.

  Args:
    function: takes the parameters and rows [group, ...]; returns a tree of arrays [group, ...].
    params: the parameters, which each device holds.
    devices: the devices.
    group: number of examples that a device computes at once.
  """

  def __init__(
    self,
    function: Callable[[Any, Shaped[jax.Array, 'group ...']], Any],
    params: PyTree,
    devices: Sequence[jax.Device],
    group: int = GROUP,
  ):
    self._at_once = group * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ('device',))
    self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self._params = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), everywhere), params)
    self._run = jax.jit(
      jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(everywhere.spec, self._split.spec),
        out_specs=self._split.spec,
        check_vma=False,
      )
    )

  def __call__(self, rows: Shaped[np.ndarray, 'batch ...']) -> Callable[[], list[PyTree]]:
    """Starts to compute.

    Args:
      rows: any number of rows.

    Returns:
      A function that waits for the results of all groups and returns them, with NumPy arrays. The
      last one has more rows than needed.
    """
    found = []
    with numerics.fixed():
      for start in range(0, len(rows), self._at_once):
        group = rows[start : start + self._at_once]
        missing = self._at_once - len(group)
        if missing:
          group = np.concatenate([group, np.zeros((missing, *group.shape[1:]), group.dtype)])
        found.append(self._run(self._params, jax.device_put(group, self._split)))
    # Explicit transfers are allowed under any setting of jax_transfer_guard.
    return lambda: jax.device_get(found)
