"""Attention as a TPU kernel on heads that lie side by side in the last axis.

Queries, keys and values stay in the layout in which the projections compute them, [batch, length,
width], where width is heads · head_dim. Arrays [batch, heads, length, head_dim] would need a
transpose of each before and after the kernel, and with a head_dim of 64 the TPU's memory pads them
to 128 lanes, which doubles their size. A tile of 128 lanes holds one or more heads here; products
with one of them use the tile with the other heads' lanes set to 0.

A step of the kernel computes a block of queries with all keys that the block attends to at once. The
scores stay on the chip. The backward pass computes them again, so nothing is stored for it but the
kernel's inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int8
from jaxtyping import Int32
from jaxtyping import PyTree

from parti_jax.models.nn import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Checkpoint name, for remat policies, of the result of attention.
ATTENTION_OUTPUT = 'attention_output'
_LANES = 128
# Queries in a block of the kernel, and the lanes that it reads of them.
_BLOCK_ROWS = (256, 128)
_BLOCK_LANES = (256, 128)
# On-chip memory that a step of the kernel may use by our estimate, and the limit that the compiler
# gets, in bytes. A v4 has 16 MiB; later chips have 64 MiB or more.
_MEMORY_V4, _LIMIT_V4 = 14 * 2**20, 16 * 2**20
_MEMORY, _LIMIT = 40 * 2**20, 56 * 2**20
_LOWEST = float(np.finfo(np.float32).min)


class _SelfParts(NamedTuple):
  """What self-attention gets: queries, keys and values in one array."""

  projected: Float[Array, '3 batch length width']

  @property
  def query(self) -> Any:
    """The array that has the queries as its first entry."""
    return self.projected

  @property
  def keys_values(self) -> Any:
    """The array that has the keys and then the values, from the entry `first_key` on."""
    return self.projected

  @property
  def first_key(self) -> int:
    return 1


class _CrossParts(NamedTuple):
  """What cross-attention gets: queries, and keys and values of another sequence."""

  query: Float[Array, '1 batch length width']
  keys_values: Float[Array, '2 batch key_length width']

  @property
  def first_key(self) -> int:
    return 0


# The gradients have the same form, and so have their specs and, in the backward kernel, their refs.
_Parts = _SelfParts | _CrossParts


class _Inputs(NamedTuple):
  """What both kernels read: the arrays, the specs of their blocks, or in a kernel the refs.

  Attributes:
    query: [rows, lanes] of a block.
    key: [key_length, lanes] of a block.
    value: as the keys.
    mask: the result of `_mask_table`, or of a block [1, key_length] of a key mask; None if all
      queries attend to all keys.
  """

  query: Any
  key: Any
  value: Any
  mask: Any | None


@dataclasses.dataclass(frozen=True)
class _Form:
  """What is fixed when the kernel is compiled.

  Attributes:
    head_dim: size of a head.
    pattern: which queries attend to which keys, in the pattern's `order`; None for all keys, or for
      those of a key mask.
    interpret: whether to run in Pallas' interpreter.
  """

  head_dim: int
  pattern: attention_patterns.AttentionPattern | None = None
  interpret: bool = False

  @property
  def lanes(self) -> int:
    """Lanes of a tile, which holds whole heads."""
    return max(_LANES, self.head_dim)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """How the work is divided.

  Attributes:
    rows: queries in a block.
    lanes: lanes of queries, keys and values in a block.
    windows: for each block, the keys that it computes with: the first, and how many.
  """

  rows: int
  lanes: int
  windows: tuple[tuple[int, int], ...]

  @property
  def widest(self) -> int:
    return max(width for _, width in self.windows)

  def of_width(self) -> dict[int, list[int]]:
    """Returns the blocks of each width."""
    found: dict[int, list[int]] = {}
    for block, (_, width) in enumerate(self.windows):
      found.setdefault(width, []).append(block)
    return found


@functools.cache
def _windows(
  length: int, key_length: int, rows: int, pattern: attention_patterns.AttentionPattern | None
) -> tuple[tuple[int, int], ...]:
  if pattern is None:
    return ((0, key_length),) * (length // rows)
  windows = []
  for start in range(0, length, rows):
    seen = np.flatnonzero(pattern.ordered_mask[start : start + rows].any(axis=0))
    first = int(seen[0]) // _LANES * _LANES
    windows.append((first, start + rows - first))  # Causal: the last key is the last query.
  return tuple(windows)


@functools.cache
def _blocks(
  length: int,
  key_length: int,
  width: int,
  tile: int,
  pattern: attention_patterns.AttentionPattern | None,
  memory: int,
) -> _Blocks | None:
  """Returns the largest blocks that fit into the on-chip memory; None if none do.

  Args:
    length: number of queries.
    key_length: number of keys.
    width: heads of a device · head_dim.
    tile: lanes of a tile.
    pattern: the pattern of self-attention; None for attention to all keys.
    memory: on-chip memory that may be used, in bytes.
  """
  # Small blocks of queries skip more of what a pattern masks; large ones keep the matrix unit busy.
  sides = _BLOCK_ROWS if pattern is None else _BLOCK_ROWS[::-1]
  for rows, lanes in itertools.product(sides, _BLOCK_LANES):
    if length % rows or width % lanes or lanes % tile:
      continue
    blocks = _Blocks(rows, lanes, _windows(length, key_length, rows, pattern))
    # Of inputs and outputs there are two, for this step and for the next one.
    table = 0 if pattern is None else 2 * length * blocks.widest
    queries = length if pattern is not None else rows
    moved = 2 * 2 * lanes * (2 * rows + 4 * key_length + queries)
    sums = 2 * 4 * lanes * key_length
    scores = 6 * 4 * rows * blocks.widest
    if table + moved + sums + scores <= memory:
      return blocks
  return None


@functools.cache
def _mask_table(
  blocks: _Blocks, pattern: attention_patterns.AttentionPattern
) -> Int8[np.ndarray, 'blocks rows widest']:
  """Returns 1 where a query attends to a key of its block's window; windows end at the right."""
  table = np.zeros((len(blocks.windows), blocks.rows, blocks.widest), np.int8)
  for block, (first, width) in enumerate(blocks.windows):
    rows = pattern.ordered_mask[block * blocks.rows : (block + 1) * blocks.rows]
    table[block, :, blocks.widest - width :] = rows[:, first : first + width]
  return table


def _memory() -> tuple[int, int]:
  """Returns the on-chip memory that a step may use, and the compiler's limit, in bytes."""
  return (_MEMORY_V4, _LIMIT_V4) if mesh_lib.device_kind() == 'TPU v4' else (_MEMORY, _LIMIT)


def fits(
  length: int,
  key_length: int,
  heads: int,
  head_dim: int,
  pattern: attention_patterns.AttentionPattern | None = None,
) -> bool:
  """Returns whether the kernel can compute attention of these sizes on the current mesh.

  Args:
    length: number of queries.
    key_length: number of keys.
    heads: number of heads, over all devices.
    head_dim: size of a head.
    pattern: the pattern of self-attention; None for attention to all keys.
  """
  if mesh_lib.platform() != 'tpu':
    return False
  tile = max(_LANES, head_dim)
  if length % _LANES or key_length % _LANES or tile % head_dim or tile % _LANES:
    return False
  width = heads // rules_lib.ways('activation_heads') * head_dim
  return _blocks(length, key_length, width, tile, pattern, _memory()[0]) is not None


def self_attention(
  projected: Float[Array, '3 batch length width'],
  head_dim: int,
  pattern: attention_patterns.AttentionPattern | None = None,
  key_mask: Bool[Array, '#batch 1 1 length'] | None = None,
  interpret: bool = False,
) -> Float[Array, 'batch length width']:
  """Self-attention, with a causal pattern or a mask of the keys.

  Args:
    projected: queries, keys and values.
    head_dim: size of a head.
    pattern: which positions attend to which; None if all attend to all that the mask leaves.
    key_mask: True where a position may be attended to; only without a pattern.
    interpret: whether to run in Pallas' interpreter, on any platform.

  Returns:
    The attended values, with the checkpoint name ATTENTION_OUTPUT.
  """
  form = _Form(head_dim, pattern, interpret)
  out = _on_mesh(form, _SelfParts(_by_columns(projected, pattern)), key_mask)
  return checkpoint_name(_by_columns(out, pattern, back=True), ATTENTION_OUTPUT)


def cross_attention(
  query: Float[Array, 'batch query_length width'],
  keys_values: Float[Array, '2 batch length width'],
  head_dim: int,
  key_mask: Bool[Array, '#batch 1 1 length'] | None = None,
  interpret: bool = False,
) -> Float[Array, 'batch query_length width']:
  """Attention of one sequence over another one.

  Args:
    query: queries.
    keys_values: keys and values of the other sequence.
    head_dim: size of a head.
    key_mask: True where a position of the other sequence may be attended to.
    interpret: whether to run in Pallas' interpreter, on any platform.

  Returns:
    The attended values, with the checkpoint name ATTENTION_OUTPUT.
  """
  parts = _CrossParts(query[None], keys_values)
  out = _on_mesh(_Form(head_dim, interpret=interpret), parts, key_mask)
  return checkpoint_name(out, ATTENTION_OUTPUT)


def _by_columns(
  part: Float[Array, '*parts batch length width'],
  pattern: attention_patterns.AttentionPattern | None,
  back: bool = False,
) -> Float[Array, '*parts batch length width']:
  """From raster order to the pattern's `order`, or back; for 'column' it transposes the grid."""
  if pattern is None or pattern.name != 'column':
    return part
  grid = pattern.grid[::-1] if back else pattern.grid
  cut = part.reshape(part.shape[:-2] + grid + part.shape[-1:])
  return cut.swapaxes(-3, -2).reshape(part.shape)


def _on_mesh(
  form: _Form, parts: _Parts, key_mask: Bool[Array, '#batch 1 1 key_length'] | None
) -> Float[Array, 'batch length width']:
  """Calls the kernel; on a mesh, each device computes its own examples and heads."""
  if key_mask is not None:
    shape = (parts.query.shape[1], 1, key_mask.shape[-1])
    key_mask = jnp.broadcast_to(key_mask[:, 0], shape).astype(jnp.int32)
  local = functools.partial(_attend, form)
  if mesh_lib.current() is not None:
    local = jax.shard_map(
      local,
      in_specs=(
        rules_lib.spec(None, 'activation_batch', None, 'activation_heads'),
        rules_lib.spec('activation_batch', None, None),
      ),
      out_specs=rules_lib.spec('activation_batch', None, 'activation_heads'),
      check_vma=False,
      axis_names=rules_lib.free_axes(),
    )
  return local(parts, key_mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  form: _Form, parts: _Parts, key_mask: Int32[Array, 'batch 1 key_length'] | None
) -> Float[Array, 'batch length width']:
  """Attention on one device.

  Args:
    form: what is fixed.
    parts: queries, keys and values.
    key_mask: 1 where a key may be attended to; None for all.
  """
  return _call_forward(form, parts, key_mask)


def _attend_forward(form, parts, key_mask):
  return _call_forward(form, parts, key_mask), (parts, key_mask)


def _attend_backward(form, residuals, gradient):
  parts, key_mask = residuals
  return _call_backward(form, parts, key_mask, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _call_forward(
  form: _Form, parts: _Parts, key_mask: Int32[Array, 'batch 1 key_length'] | None
) -> Float[Array, 'batch length width']:
  """Runs the forward kernel; the arguments are those of `_attend`."""
  blocks = _blocks_for(form, parts)
  inputs, specs = _inputs(form, blocks, parts, key_mask)
  result = jax.ShapeDtypeStruct((1, *parts.query.shape[1:]), parts.query.dtype)
  found = _call(
    _forward_kernel,
    form,
    blocks,
    inputs=(inputs,),
    in_specs=(specs,),
    results=result,
    out_specs=_rows_spec(blocks, 0),
    products=2,
    name='attention_forward',
  )
  return found[0]


def _call_backward(
  form: _Form,
  parts: _Parts,
  key_mask: Int32[Array, 'batch 1 key_length'] | None,
  gradient: Float[Array, 'batch length width'],
) -> _Parts:
  """Runs the backward kernel.

  Args:
    form: what is fixed.
    parts: queries, keys and values.
    key_mask: an argument of `_attend`.
    gradient: gradient of the result of `_attend`.

  Returns:
    The gradients of `parts`.
  """
  from jax.experimental.pallas import tpu as pltpu

  blocks = _blocks_for(form, parts)
  inputs, specs = _inputs(form, blocks, parts, key_mask)
  length, key_length = parts.query.shape[2], parts.keys_values.shape[2]
  out_specs: _Parts
  if isinstance(parts, _SelfParts):
    # The only array has all queries, so it stays on the chip while each block writes its own.
    out_specs = _SelfParts(_whole_spec(blocks, 3, length))
  else:
    out_specs = _CrossParts(_rows_spec(blocks, 0), _whole_spec(blocks, 2, key_length))
  (found,) = _call(
    _backward_kernel,
    form,
    blocks,
    inputs=(inputs, gradient[None]),
    in_specs=(specs, _rows_spec(blocks, 0)),
    results=(jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), parts),),
    out_specs=(out_specs,),
    sums=[pltpu.VMEM((key_length, blocks.lanes), jnp.float32)] * 2,
    products=5,
    name='attention_backward',
  )
  return found


def _blocks_for(form: _Form, parts: _Parts) -> _Blocks:
  """Returns how the work on these arrays is divided; `fits` must be True."""
  length, width = parts.query.shape[2:]
  key_length = parts.keys_values.shape[2]
  blocks = _blocks(length, key_length, width, form.lanes, form.pattern, _memory()[0])
  assert blocks is not None, 'fits() is False'
  return blocks


# A kernel runs for each example, group of lanes, and block of queries. These functions say which part
# of arrays [arrays, batch, length, width] it then sees. They import Pallas themselves, because that
# takes time, which other platforms need not spend.


def _rows_spec(blocks: _Blocks, index: int) -> Any:
  """Returns the spec of [rows, lanes], the block's queries in one of the arrays."""
  from jax.experimental import pallas as pl

  shape = (None, None, blocks.rows, blocks.lanes)
  return pl.BlockSpec(shape, lambda example, group, block: (index, example, block, group))


def _keys_spec(blocks: _Blocks, index: int, length: int) -> Any:
  """Returns the spec of [length, lanes], all positions of one of the arrays."""
  from jax.experimental import pallas as pl

  shape = (None, None, length, blocks.lanes)
  return pl.BlockSpec(shape, lambda example, group, block: (index, example, 0, group))


def _whole_spec(blocks: _Blocks, arrays: int, length: int) -> Any:
  """Returns the spec of [arrays, length, lanes], all positions of all arrays."""
  from jax.experimental import pallas as pl

  shape = (arrays, None, length, blocks.lanes)
  return pl.BlockSpec(shape, lambda example, group, block: (0, example, 0, group))


def _inputs(
  form: _Form,
  blocks: _Blocks,
  parts: _Parts,
  key_mask: Int32[Array, 'batch 1 key_length'] | None,
) -> tuple[_Inputs, _Inputs]:
  """Returns the arrays that both kernels read, and the specs of their blocks."""
  from jax.experimental import pallas as pl

  key_length = parts.keys_values.shape[2]
  mask = mask_spec = None
  if form.pattern is not None:
    mask = jnp.asarray(_mask_table(blocks, form.pattern))
    mask_spec = pl.BlockSpec(mask.shape, lambda example, group, block: (0, 0, 0))
  elif key_mask is not None:
    mask = key_mask
    mask_spec = pl.BlockSpec((None, 1, key_length), lambda example, group, block: (example, 0, 0))
  arrays = _Inputs(parts.query, parts.keys_values, parts.keys_values, mask)
  specs = _Inputs(
    _rows_spec(blocks, 0),
    _keys_spec(blocks, parts.first_key, key_length),
    _keys_spec(blocks, parts.first_key + 1, key_length),
    mask_spec,
  )
  return arrays, specs


def _call(
  kernel: Callable[..., None],
  form: _Form,
  blocks: _Blocks,
  inputs: tuple[Any, ...],
  in_specs: tuple[Any, ...],
  results: PyTree[jax.ShapeDtypeStruct],
  out_specs: PyTree,
  products: int,
  name: str,
  sums: Sequence[Any] = (),
) -> PyTree[Array]:
  """Runs a kernel on all blocks.

  Args:
    kernel: gets the form, the blocks, and the refs of inputs, results and sums.
    form: what is fixed.
    blocks: how the work is divided.
    inputs: trees of arrays; the first one is an _Inputs.
    in_specs: trees of the same structure, of what a step of the kernel sees of the arrays.
    results: shapes of the results.
    out_specs: a tree of the same structure, of what a step writes.
    products: number of matrix products over all queries, keys and lanes.
    name: name of the kernel in profiles.
    sums: memory on the chip that the steps of an example and a group of lanes share.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  _, batch, length, width = inputs[0].query.shape
  scores = batch * width // form.head_dim * blocks.rows * sum(size for _, size in blocks.windows)
  arrays = jax.tree.leaves((inputs, results))
  return pl.pallas_call(
    functools.partial(kernel, form, blocks),
    grid=(batch, width // blocks.lanes, length // blocks.rows),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=results,
    scratch_shapes=sums,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_memory()[1]
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * scores * form.lanes * products,
      transcendentals=scores,
      bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    ),
    name=name,
    interpret=form.interpret,
  )(*inputs)


def _forward_kernel(form: _Form, blocks: _Blocks, inputs: _Inputs, out_ref):
  """Computes a block of queries."""

  def attend(at, keys, mask):
    query, key, value = inputs.query[:, at], inputs.key[keys, at], inputs.value[keys, at]
    out = jnp.zeros(query.shape, jnp.float32)
    for own in _own_lanes(form):
      weights, total = _weights(_scaled(form, query, own), key, mask)
      out += _dot(weights.astype(value.dtype), value, (1, 0)) * (own / total)
    out_ref[:, at] = out.astype(out_ref.dtype)

  _for_each_tile(form, blocks, inputs.mask, attend)


def _backward_kernel(
  form: _Form, blocks: _Blocks, inputs: _Inputs, gradient_ref, results: _Parts, key_sum, value_sum
):
  """Computes the gradients of a block of queries, and adds to those of keys and values.

  Args:
    form: what is fixed.
    blocks: how the work is divided.
    inputs: what the forward kernel got.
    gradient_ref: gradient of the forward kernel's result.
    results: gradients of queries, keys and values. The last block writes those of keys and values.
    key_sum: gradients of the keys by the blocks until now.
    value_sum: as `key_sum`, of the values.
  """
  from jax.experimental import pallas as pl

  block, last = pl.program_id(2), len(blocks.windows) - 1

  @pl.when(block == 0)
  def clear():
    key_sum[...] = jnp.zeros(key_sum.shape, key_sum.dtype)
    value_sum[...] = jnp.zeros(value_sum.shape, value_sum.dtype)

  def differentiate(at, keys, mask):
    query, key, value = inputs.query[:, at], inputs.key[keys, at], inputs.value[keys, at]
    gradient = gradient_ref[:, at].astype(jnp.float32)
    of_query = jnp.zeros(query.shape, jnp.float32)
    of_key, of_value = jnp.zeros((2, *key.shape), jnp.float32)
    for own in _own_lanes(form):
      scaled = _scaled(form, query, own)
      exponentials, total = _weights(scaled, key, mask)
      weights = exponentials / total
      of_head = (gradient * own).astype(query.dtype)
      of_weights = _dot(of_head, value, (1, 1))
      of_scores = weights * (of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))
      if form.pattern is None and mask is not None:
        # Without any key to attend to, weights are equal whatever the scores are.
        of_scores = jnp.where(mask, of_scores, 0.0)
      of_scores = of_scores.astype(query.dtype)
      of_query += _dot(of_scores, key, (1, 0)) * (own * form.head_dim**-0.5)
      of_key += _dot(of_scores, scaled, (0, 0))
      of_value += _dot(weights.astype(query.dtype), of_head, (0, 0))
    key_sum[keys, at] += of_key
    value_sum[keys, at] += of_value
    if isinstance(results, _SelfParts):  # All queries, of which a block has some.
      rows = pl.ds(pl.multiple_of(block * blocks.rows, blocks.rows), blocks.rows)
      results.projected[0, rows, at] = of_query.astype(query.dtype)
    else:
      results.query[:, at] = of_query.astype(query.dtype)

  _for_each_tile(form, blocks, inputs.mask, differentiate)

  @pl.when(block == last)
  def finish():
    keys_values, first = results.keys_values, results.first_key
    keys_values[first] = key_sum[...].astype(keys_values.dtype)
    keys_values[first + 1] = value_sum[...].astype(keys_values.dtype)


def _for_each_tile(form: _Form, blocks: _Blocks, mask_ref, body: Callable[..., None]):
  """Calls body(lanes, keys, mask) for each tile of the current block of queries.

  Args:
    form: what is fixed.
    blocks: how the work is divided.
    mask_ref: a field of _Inputs.
    body: gets the lanes of the tile, the keys of the block's window, and which of them each query
      attends to; None for all.
  """
  from jax.experimental import pallas as pl

  block = pl.program_id(2)

  def compute(width):
    if form.pattern is None:
      keys = pl.ds(0, width)
      mask = None if mask_ref is None else mask_ref[...] != 0
    else:
      keys = pl.ds(pl.multiple_of((block + 1) * blocks.rows - width, _LANES), width)
      mask = mask_ref[block, :, blocks.widest - width :].astype(jnp.int32) != 0
    for start in range(0, blocks.lanes, form.lanes):
      body(pl.ds(start, form.lanes), keys, mask)

  of_width = blocks.of_width()
  if len(of_width) == 1:
    compute(blocks.widest)
    return
  for width, numbers in of_width.items():
    here = functools.reduce(jnp.logical_or, [block == number for number in numbers])
    pl.when(here)(functools.partial(compute, width))


def _own_lanes(form: _Form) -> list[Float[Array, '1 lanes']]:
  """Returns for each head of a tile 1 in its own lanes and 0 in the others'."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, form.lanes), 1)
  return [
    ((lane >= start) & (lane < start + form.head_dim)).astype(jnp.float32)
    for start in range(0, form.lanes, form.head_dim)
  ]


def _scaled(form, query, own):
  """Returns the queries of one head, scaled."""
  scaled = (query.astype(jnp.float32) * form.head_dim**-0.5).astype(query.dtype)
  return (scaled.astype(jnp.float32) * own).astype(query.dtype)


def _weights(query, key, mask):
  """Returns exponentials of the scores, and their sums over keys."""
  scores = _dot(query, key, (1, 1))
  if mask is not None:
    scores = jnp.where(mask, scores, _LOWEST)
  exponentials = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
  return exponentials, jnp.sum(exponentials, axis=1, keepdims=True)


def _dot(left, right, contracted: tuple[int, int]):
  """Returns a matrix product, summed in float32."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
  )
