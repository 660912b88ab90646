"""Runs a loaded network on one device, or on a mesh over which its parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import PyTree

from parti_jax.core import checks
from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.partitioning import placing
from parti_jax.partitioning import rules as rules_lib
from parti_jax.sampling import kept_programs


class Placement:
  """Puts parameters on devices and calls jitted functions there.

  Args:
    mesh: devices over which to shard parameters and batches; None for one device.
    rules: logical axis rules for the mesh; by default those of `rules.logical_axis_rules`.
  """

  def __init__(self, mesh: jax.sharding.Mesh | None = None, rules=None):
    self._mesh = mesh
    self._rules = rules_lib.logical_axis_rules() if mesh is not None and rules is None else rules

  @numerics.fixed()
  def put(
    self,
    params: PyTree,
    boxed: Callable[[], PyTree],
    convert_shardings: Callable[[PyTree], PyTree] = lambda shardings: shardings,
    convert: Callable[[Any, jax.Array], PyTree] = lambda path, leaf: leaf,
  ) -> PyTree:
    """Puts parameters on the devices.

    Args:
      params: the parameters.
      boxed: returns abstract parameters with logical axis names, the result of
        `model_folder.abstract`; only called if there is a mesh.
      convert_shardings: converts the shardings of the abstract parameters to those of `params`.
      convert: converts each parameter, given its path, once it is on the devices. Of the original
        parameters the devices thus never hold many.

    Raises:
      UserError: if the mesh does not divide a parameter.
    """
    if self._mesh is None:
      device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda leaf: device, params)
    else:
      shardings = rules_lib.parameter_shardings(boxed(), self._mesh, self._rules)
      shardings = convert_shardings(shardings)
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf, sharding: convert(path, placing.put(leaf, sharding)), params, shardings
    )

  @numerics.fixed()
  def run(
    self,
    function: Callable[..., Any],
    params: tuple[PyTree, ...],
    arrays: tuple[PyTree, ...],
    *others: Any,
    **statics: Any,
  ) -> Any:
    """Calls a jitted function with NumPy arrays and returns its result as NumPy arrays.

    The arguments are those of `start`.
    """
    return jax.device_get(self.start(function, params, arrays, *others, **statics))

  @numerics.fixed()
  def start(
    self,
    function: Callable[..., Any],
    params: tuple[PyTree, ...],
    arrays: tuple[PyTree, ...],
    *others: Any,
    **statics: Any,
  ) -> Any:
    """Calls a jitted function with NumPy arrays and returns its result, which may not be there yet.

    Args:
      function: the jitted function, called with all other arguments.
      params: parameters, results of `put`.
      arrays: arrays with a leading batch axis, which is sharded over the mesh.
      *others: other arguments.
      **statics: static arguments.
    """
    if self._mesh is None:
      return kept_programs.call(function, (*params, *arrays, *others), statics)
    sharded = jax.device_put(arrays, rules_lib.batch_sharding(self._mesh, self._rules))
    with rules_lib.partitioned(self._mesh, self._rules):
      return function(*params, *sharded, *others, **statics)

  def divisible(self, batch: int) -> int:
    """Rounds a batch size up to a multiple of the number of shards of a batch."""
    ways = 1 if self._mesh is None else rules_lib.batch_ways(self._mesh, self._rules)
    return -(-batch // ways) * ways


def pieces(
  total: int, batch: int, progress: bool = False
) -> Iterator[tuple[int, Int[np.ndarray, '{batch}']]]:
  """Yields the start and the indices of each batch; the last batch repeats its last index.

  Args:
    total: number of indices.
    batch: number of indices in a batch.
    progress: whether to show a progress bar.
  """
  starts: Iterable[int] = range(0, total, batch)
  if progress:
    import tqdm

    starts = tqdm.tqdm(starts, desc='drawing', unit='batch', disable=None)
  for start in starts:
    yield start, np.minimum(np.arange(start, start + batch), total - 1)


def first_indices(first_index, prompts: int, num_images: int) -> Int32[np.ndarray, '{prompts}']:
  """Checks the indices of the prompts' first pictures.

  Args:
    first_index: one index for all prompts, or a sequence with one for each.
    prompts: number of prompts.
    num_images: number of pictures for each prompt.

  Returns:
    The index of each prompt's first picture.

  Raises:
    UserError: if there is an index too few or too many, or a picture's index doesn't fit into int32.
  """
  most = 2**31 - num_images
  if getattr(first_index, 'ndim', 0) or (
    isinstance(first_index, Sequence) and not isinstance(first_index, (str, bytes))
  ):
    if len(first_index) != prompts:
      raise UserError(
        f'first_index has {len(first_index)} numbers for {prompts} prompts; give one number for '
        'all, or one for each'
      )
    found = [
      checks.whole_number(f'first_index[{row}]', index, 0, most)
      for row, index in enumerate(first_index)
    ]
  else:
    found = [checks.whole_number('first_index', first_index, 0, most)] * prompts
  return np.array(found, np.int32)
