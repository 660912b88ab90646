"""Adafactor's state as earlier versions had it: whole second moments of attention kernels."""

import flax.traverse_util
import jax
import numpy as np

from parti_jax.partitioning import factored


def whole_and_factored(tree):
  """A state dict of t5x in the form of earlier versions, and what it is today.

  Args:
    tree: of numpy arrays, in today's form; its second moments don't matter.
  """
  old = flax.traverse_util.flatten_dict(tree, sep='/')
  new, draw = dict(old), np.random.default_rng(1)
  for name in old:
    state, _, kernel = name.partition('/v/')
    shape = old[f'target/{kernel}'].shape if kernel else ()
    if factored.joined_axis(kernel.split('/'), shape) is None:
      continue
    moment = draw.uniform(0.1, 1.0, shape).astype(np.float32)
    if kernel.endswith('project_out/kernel'):
      matrix = moment.reshape(shape[:-3] + (-1, shape[-1]))
      rows, columns = -2, -1
    else:
      matrix = moment.reshape(shape[:-2] + (-1,))
      rows = -2 if 'project_query' in kernel else -3
      columns = -1
    empty = np.zeros(1, np.float32)
    old |= {name: moment, f'{state}/v_row/{kernel}': empty, f'{state}/v_col/{kernel}': empty}
    new |= {
      name: empty,
      f'{state}/v_row/{kernel}': matrix.mean(columns),
      f'{state}/v_col/{kernel}': matrix.mean(rows),
    }
  return tuple(flax.traverse_util.unflatten_dict(flat, sep='/') for flat in (old, new))


def assert_same(found, right):
  """Compares state dicts, bit for bit but for the rounding of means."""

  def same(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype and one.shape == other.shape
    np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=1e-6)

  jax.tree.map(same, jax.device_get(found), right)
