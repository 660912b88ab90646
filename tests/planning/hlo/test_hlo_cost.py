"""Tests the costs of compiled programs against costs computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.core import native_notes
from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import hlo_text
from parti_jax.planning.hlo import replica_groups

ROWS, WIDTH, TURNS = 256, 128, 7


@pytest.fixture(name='cpu_devices', scope='module')
def _cpu_devices():
  return jax.devices()[:4]


def mesh_of(devices):
  return Mesh(np.array(devices[:4]).reshape(2, 2), ('data', 'tensor'))


def dtype_of(mesh):
  """Returns the dtype that the platform computes in without conversions."""
  return jnp.dtype('bfloat16' if mesh.devices.flat[0].platform == 'tpu' else 'float32')


def costs_of(function, mesh, *arguments, out=None):
  """Returns the costs of a jitted function; arguments are pairs (shape, partition spec)."""
  abstract = [
    jax.ShapeDtypeStruct(shape, dtype_of(mesh), sharding=NamedSharding(mesh, spec))
    for shape, spec in arguments
  ]
  options = {} if out is None else {'out_shardings': NamedSharding(mesh, out)}
  with native_notes.hidden():
    compiled = jax.jit(function, **options).lower(*abstract).compile()
  return hlo_cost.costs(hlo_text.parse(compiled.as_text()), mesh.size)


def collectives_of(costs, mesh):
  """Returns (kind, axes) -> count and bytes of the whole array, without barriers and scalars."""
  found = {}
  for collective in costs.collectives:
    if collective.whole > 64:
      key = (collective.kind, replica_groups.axes(collective.groups, dict(mesh.shape)))
      count, size = found.get(key, (0, 0))
      found[key] = (count + collective.count, size + collective.count * collective.whole)
  return found


def stacked(x, kernels):
  """Computes successive products with kernels; each iteration of a loop has two."""

  def body(x, kernel):
    return jnp.tanh(jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ kernel), x)), None

  return jax.lax.scan(body, x, kernels)[0]


@pytest.mark.tpu_compile
@pytest.mark.parametrize('devices', ['cpu_devices', 'tpu_devices'])
def test_products_in_nested_loops(devices, request):
  mesh = mesh_of(request.getfixturevalue(devices))
  costs = costs_of(
    stacked, mesh, ((ROWS, WIDTH), PartitionSpec('data')), ((TURNS, WIDTH, WIDTH), PartitionSpec())
  )
  assert not costs.notes
  assert costs.product_flops == 2 * TURNS * 2 * (ROWS // 2) * WIDTH * WIDTH


@pytest.mark.tpu_compile
@pytest.mark.parametrize('devices', ['cpu_devices', 'tpu_devices'])
@pytest.mark.parametrize(
  'formula, left, right, flops',
  [
    # Rows over one axis or several, batches, and the forms of gradients.
    ('bld,dhk->blhk', (4, 64, 32), (32, 8, 16), 2 * 4 * 64 * 32 * 8 * 16),
    ('bqhd,bkhd->bhqk', (4, 64, 8, 16), (4, 32, 8, 16), 2 * 4 * 8 * 64 * 32 * 16),
    ('bhqk,bkhd->bqhd', (4, 8, 64, 32), (4, 32, 8, 16), 2 * 4 * 8 * 64 * 32 * 16),
    ('bld,blhk->dhk', (4, 64, 32), (4, 64, 8, 16), 2 * 4 * 64 * 32 * 8 * 16),
    ('blhk,hkd->bld', (4, 64, 8, 16), (8, 16, 32), 2 * 4 * 64 * 32 * 8 * 16),
  ],
)
def test_products_of_all_forms(devices, request, formula, left, right, flops):
  mesh = mesh_of(request.getfixturevalue(devices))
  costs = costs_of(
    functools.partial(jnp.einsum, formula), mesh, (left, PartitionSpec()), (right, PartitionSpec())
  )
  assert costs.product_flops == flops


@pytest.mark.tpu_compile
@pytest.mark.parametrize('devices', ['cpu_devices', 'tpu_devices'])
def test_the_collectives_of_two_sharded_products(devices, request):
  mesh = mesh_of(request.getfixturevalue(devices))
  # Columns over tensor, then rows over tensor: the sum is over tensor. The first kernel is split
  # over data as well, which the batch is too, so that it is gathered there.
  product = lambda x, first, second: (x @ first) @ second
  costs = costs_of(
    product,
    mesh,
    ((ROWS, WIDTH), PartitionSpec('data')),
    ((WIDTH, 4 * WIDTH), PartitionSpec('data', 'tensor')),
    ((4 * WIDTH, WIDTH), PartitionSpec('tensor', None)),
    out=PartitionSpec('data'),
  )
  found = collectives_of(costs, mesh)
  item = dtype_of(mesh).itemsize
  assert found == {
    ('all-gather', ('data',)): (1, WIDTH * 2 * WIDTH * item),
    ('all-reduce', ('tensor',)): (1, ROWS // 2 * WIDTH * item),
  }
  assert costs.product_flops == 2 * 2 * (ROWS // 2) * WIDTH * 2 * WIDTH


@pytest.mark.tpu_compile
@pytest.mark.parametrize('devices', ['cpu_devices', 'tpu_devices'])
def test_collectives_in_a_loop_count_for_each_iteration(devices, request):
  mesh = mesh_of(request.getfixturevalue(devices))

  def body(x, kernel):
    kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))
    return jnp.tanh(x @ kernel), None

  costs = costs_of(
    lambda x, kernels: jax.lax.scan(body, x, kernels)[0],
    mesh,
    ((ROWS, WIDTH), PartitionSpec('data')),
    ((TURNS, WIDTH, WIDTH), PartitionSpec(None, 'tensor')),
  )
  count, size = collectives_of(costs, mesh)[('all-gather', ('tensor',))]
  # XLA may gather the kernels of all iterations at once; the bytes are the same.
  assert count in (1, TURNS)
  assert size == TURNS * WIDTH * WIDTH * dtype_of(mesh).itemsize


def test_explicit_collectives(cpu_devices):
  mesh = mesh_of(cpu_devices)
  size = ROWS * WIDTH * 4  # Of a device's part.

  def each(x):
    x = jax.lax.psum_scatter(x, 'data', tiled=True)
    x = jax.lax.all_gather(x, 'data', tiled=True)
    x = jax.lax.ppermute(x, 'tensor', [(0, 1), (1, 0)])
    x = jax.lax.all_to_all(x, 'tensor', 0, 0, tiled=True)
    return jax.lax.psum(jnp.tanh(x), ('data', 'tensor'))

  spec = PartitionSpec(('data', 'tensor'))
  function = jax.shard_map(
    each, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None), check_vma=False
  )
  abstract = jax.ShapeDtypeStruct(
    (4 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  text = jax.jit(function).lower(abstract).compile().as_text()
  costs = hlo_cost.costs(hlo_text.parse(text), 4)
  found = collectives_of(costs, mesh)
  assert found == {
    ('reduce-scatter', ('data',)): (1, size),
    ('all-gather', ('data',)): (1, size),
    ('collective-permute', ('tensor',)): (1, size),
    ('all-to-all', ('tensor',)): (1, size),
    ('all-reduce', ('data', 'tensor')): (1, size),
  }
  # Along a ring of n a device sends (n - 1) / n of the whole, twice for an all-reduce.
  assert sorted(collective.sent for collective in costs.collectives) == [
    size / 2,
    size / 2,
    size / 2,
    size,
    2 * size * 3 / 4,
  ]


@pytest.mark.tpu_compile
def test_bytes_of_a_product_on_a_tpu(tpu_devices):
  mesh = Mesh(np.array(tpu_devices[:1]), ('data',))
  side = 8192  # Too large for the chip's own memory.
  costs = costs_of(
    jnp.matmul, mesh, ((side, side), PartitionSpec()), ((side, side), PartitionSpec())
  )
  assert costs.hbm_bytes == pytest.approx(3 * 2 * side * side, rel=0.01)


@pytest.mark.tpu_compile
def test_a_slice_of_a_stack_counts_as_the_slice(tpu_devices):
  mesh = Mesh(np.array(tpu_devices[:1]), ('data',))
  side, layers = 4096, 8
  costs = costs_of(
    lambda x, kernels: jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0],
    mesh,
    ((128, side), PartitionSpec()),
    ((layers, side, side), PartitionSpec()),
  )
  # Each kernel is read once; the other arrays, 1 MiB each, are small compared to it.
  assert costs.hbm_bytes == pytest.approx(2 * layers * side * side, rel=0.1)
  assert costs.product_flops == 2 * 128 * side * side * layers


@pytest.mark.tpu_compile
def test_an_update_in_place_counts_as_the_update(tpu_devices):
  mesh = Mesh(np.array(tpu_devices[:1]), ('data',))
  shape = (64, 2048, 2048)
  whole = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
  part = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.bfloat16, sharding=whole.sharding)

  def update(whole, part):
    return jax.lax.dynamic_update_slice_in_dim(whole, jnp.tanh(part), 3, axis=0)

  with native_notes.hidden():
    text = jax.jit(update, donate_argnums=0).lower(whole, part).compile().as_text()
  costs = hlo_cost.costs(hlo_text.parse(text), 1)
  assert 2 * 2 * 2048 * 2048 * 0.99 <= costs.hbm_bytes <= 4 * 2 * 2048 * 2048
