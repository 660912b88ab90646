"""Writes checkpoints as t5x and early versions of Orbax do: Flax's msgpack and zarr arrays."""

import flax.serialization
import flax.traverse_util
import tensorstore


def write(folder, arrays, spec=None, version=3, **in_tree):
  """Writes t5x's own format.

  Args:
    folder: `checkpoint_<step>`.
    arrays: {name such as 'target/encoder/encoder_norm/scale': array}.
    spec: (name of the array's folder) -> where the TensorStore spec in the tree says it is.
    version: of the format.
    **in_tree: {name: array} that are in the tree itself.
  """
  spec = spec or (lambda name: {'kvstore': {'driver': 'gfile', 'path': f'{name}/'}})
  tree = dict(in_tree)
  for name, array in arrays.items():
    metadata = _write_zarr(folder, name.replace('/', '.'), array)
    stored = {'driver': 'zarr', 'dtype': array.dtype.name, 'metadata': metadata}
    tree[name] = stored | spec(name.replace('/', '.'))
  _write_tree(folder, {'version': version, 'optimizer': _nested(tree)})


def write_early_orbax(folder, arrays, ocdbt=False):
  """Writes the format of early versions of Orbax."""
  tree = {}
  for name, array in arrays.items():
    store = name.replace('/', '.')
    _write_zarr(folder, store, array, ocdbt)
    tree[name] = f'PLACEHOLDER://{store}'
  _write_tree(folder, _nested(tree))


def _nested(tree):
  return flax.traverse_util.unflatten_dict(tree, sep='/')


def _write_tree(folder, tree):
  folder.mkdir(exist_ok=True, parents=True)
  (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(tree))


def _write_zarr(folder, name, array, ocdbt=False):
  metadata = {
    'shape': list(array.shape),
    # Two chunks along the first axis, if that is even.
    'chunks': [-(-size // 2) if axis == 0 else size for axis, size in enumerate(array.shape)],
    'compressor': {'id': 'gzip', 'level': 1},
  }
  store = {'driver': 'file', 'path': f'{folder}/{name}/'}
  if ocdbt:
    base = {'driver': 'file', 'path': f'{folder}/'}
    store = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  spec = {
    'driver': 'zarr',
    'dtype': array.dtype.name,
    'kvstore': store,
    'metadata': metadata,
    'store_data_equal_to_fill_value': True,
  }
  tensorstore.open(spec, create=True).result().write(array).result()
  return metadata
