"""The device mesh: axes `stage`, `data`, `fsdp` and `tensor`, sized by gin."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Iterator
from collections.abc import Sequence

import gin
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import Mesh

from parti_jax.core import checks
from parti_jax.core import errors

# Ordered from the axis that communicates least to the one that communicates most: the last axes
# get the closest neighbors.
AXES = ('stage', 'data', 'fsdp', 'tensor')

_current: contextvars.ContextVar[Mesh | AbstractMesh | None] = contextvars.ContextVar(
  'mesh', default=None
)
_meshless: contextvars.ContextVar[bool] = contextvars.ContextVar('meshless', default=False)


@gin.configurable
@checks.bounded(data=(-1, None), fsdp=(-1, None), tensor=(-1, None), stage=(-1, None))
def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  stage: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh over the devices, laid out along the platform's topology.

  With several TPU slices, which only the data-center network connects, the slices are laid out
  along the `data` axis, and each other axis stays within a slice.

  Args:
    data: ways of data parallelism with replicated parameters; -1 takes the remaining devices.
    fsdp: ways of data parallelism with parameters split along `embed`; may be -1 instead.
    tensor: ways of splitting heads, MLP and vocabulary; may be -1 instead.
    stage: number of pipeline stages; may be -1 instead.
    devices: the devices to use; all of them by default.

  Returns:
    A mesh with the axes of `AXES`.

  Raises:
    UserError: if the sizes do not multiply to the number of devices, or several slices do not
      divide `data`.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'stage': stage, 'data': data, 'fsdp': fsdp, 'tensor': tensor}
  asked = ', '.join(f'make_mesh.{axis}={size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or known < 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise errors.UserError(f'{asked}: sizes must be positive, and at most one may be -1')
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise errors.UserError(
      f'{asked} needs a multiple of {known} devices, but there are {len(devices)}; '
      'choose sizes whose product is the number of devices'
    )
  return Mesh(_layout(sizes, devices), AXES)


def _layout(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Returns the devices as an array with the axes of `AXES`."""
  # On other platforms than TPU, XLA gives each host a different slice index.
  slices = (
    len({getattr(device, 'slice_index', 0) for device in devices if device.platform == 'tpu'}) or 1
  )
  if sizes['data'] % slices:
    raise errors.UserError(
      f'make_mesh.data={sizes["data"]} is not divisible by the {slices} slices of these devices: '
      'the network between slices carries only data parallelism; set make_mesh.data to '
      f'a multiple of {slices}'
    )
  within = {**sizes, 'data': sizes['data'] // slices}
  across = [slices if axis == 'data' else 1 for axis in AXES]
  shape = [within[axis] for axis in AXES]

  def layout(split_axes: bool) -> np.ndarray:
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(
        shape, across, devices, allow_split_physical_axes=split_axes
      )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split_axes)

  try:
    found = layout(False)
  except NotImplementedError:  # A mesh axis isn't a product of whole axes of the torus.
    found = layout(True)
  if slices > 1 or sizes['stage'] == 1 or devices[0].platform != 'tpu':
    return found
  return min([found, *_rings_of_stages(shape, devices)], key=_links)


def _rings_of_stages(shape: Sequence[int], devices: Sequence[jax.Device]) -> Iterator[np.ndarray]:
  """Yields layouts whose stages go back and forth through a rectangle of the torus.

  A pipeline sends from each stage to the next, and from the last to the first.
  """
  stages, *others = shape
  for rows in range(2, stages):
    if stages % rows:
      continue
    wanted = [stages // rows, others[0], rows, *others[1:]]
    try:
      cut = mesh_utils.create_device_mesh(wanted, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
      continue
    cut = cut.transpose(2, 0, 1, 3, 4)  # [rows, stages of a row, data, fsdp, tensor]
    lines = [row if number % 2 == 0 else row[::-1] for number, row in enumerate(cut)]
    yield np.concatenate(lines).reshape(shape)


def _links(layout: np.ndarray) -> tuple[int, ...]:
  """Returns the most links between neighbors along each axis: the axes that send most come first."""
  coordinates = np.array([device.coords for device in layout.flat]).reshape(layout.shape + (-1,))
  sizes = coordinates.max(axis=tuple(range(layout.ndim))) + 1
  found = []
  for axis in ('tensor', 'stage', 'fsdp', 'data'):
    apart = np.abs(coordinates - np.roll(coordinates, -1, axis=AXES.index(axis)))
    found.append(int(np.minimum(apart, sizes - apart).sum(axis=-1).max()))
  return tuple(found)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
  """Makes `mesh` the result of `current()`, and JAX's current mesh, while the body runs."""
  with _set_current(mesh), jax.set_mesh(mesh):
    yield


@contextlib.contextmanager
def of_jit() -> Iterator[None]:
  """Makes the abstract mesh of the enclosing jit the result of `current()` while the body runs.

  Without such a mesh, `current()` is unchanged.
  """
  mesh = jax.sharding.get_abstract_mesh()
  with contextlib.nullcontext() if mesh.empty else _set_current(mesh):
    yield


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
  """Makes `current()` None and `platform()` 'cpu' while the body runs, for tracing only shapes.

  Kernels of other platforms are not traced then; not all of them can be batched by `jax.vmap`.
  """
  token = _meshless.set(True)
  try:
    with _set_current(None):
      yield
  finally:
    _meshless.reset(token)


@contextlib.contextmanager
def _set_current(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
  token = _current.set(mesh)
  try:
    yield
  finally:
    _current.reset(token)


def current() -> Mesh | AbstractMesh | None:
  """Returns the mesh of the innermost `use` or `of_jit`, or None outside of one."""
  return _current.get()


def platform() -> str:
  """Returns the platform that programs are traced for: that of `current()`, else JAX's default."""
  if _meshless.get():
    return 'cpu'
  mesh = current()
  device = None if mesh is None else mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """Returns the kind of device that programs are traced for, such as 'TPU v4'."""
  mesh = current()
  device = None if mesh is None else mesh.abstract_mesh.abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


@functools.cache
def compute_capability() -> tuple[int, int] | None:
  """Returns the CUDA compute capability of this process' GPUs; None for those of other vendors."""
  device = jax.local_devices(backend='gpu')[0]
  numbers = re.fullmatch(r'(\d+)\.(\d+)', str(getattr(device, 'compute_capability', '')))
  return None if numbers is None else (int(numbers[1]), int(numbers[2]))
