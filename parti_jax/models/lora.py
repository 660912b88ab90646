"""LoRA (arXiv 2106.09685): low-rank adapters of projections, on trees of parameters.

The adapter of a projection with the kernel W consists of the matrices A and B, and the network is
applied to W + (alpha / rank) · A · B in place of W (section 4.1). Networks know nothing of this: a tree
of parameters is changed before it is given to one of them, so that any network can be adapted.

A kernel may have several input axes, such as heads and head_dim of the output projection of attention,
and several output axes. A is [*inputs, rank] and B is [rank, *outputs], with the logical axes of the
kernel, so that a mesh splits them as it splits the kernel. A stack of layers has an A and a B for
each layer. Queries, keys and values that share a kernel are separate projections.

Adapters are a tree that has {'lora_a': A, 'lora_b': B} at the name of each projection.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from parti_jax.core import errors

# Names of the matrices A and B of a projection.
A, B = 'lora_a', 'lora_b'
# The projections of queries and values, as in the paper (section 7.1).
TARGETS = ('*attention*/query', '*attention*/value')
_RANK_AXIS = 'lora_rank'
# Logical axes of a kernel along which several projections lie -> their names.
_PARTS = {'qkv': ('query', 'key', 'value'), 'kv': ('key', 'value')}
# First logical axes of kernels with several input axes -> the number of these.
_INPUTS = {'kernel_rows': 3, 'heads': 2}
# Names of modules whose kernel is of one projection -> the name of that.
_NAMES = {'project_query': 'query', 'project_key': 'key', 'project_value': 'value'}
# Most names of projections in an error message.
_SHOWN = 24


class Settings(NamedTuple):
  """What is adapted, and how.

  Attributes:
    rank: the rank of A · B, at least 0; with 0, there are no adapters.
    alpha: A · B is multiplied by alpha / rank.
    targets: patterns of names of projections; `select` says how they match.
  """

  rank: int = 8
  alpha: float = 8.0
  targets: tuple[str, ...] = TARGETS

  @property
  def scale(self) -> float:
    """What A · B is multiplied by."""
    return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class Projection:
  """A projection: a kernel of a network, or a part of one.

  Attributes:
    name: its name, such as 'image_decoder/decoder/layers/attention/query'.
    kernel: path of its kernel in the tree of parameters.
    shape: shape of the kernel.
    axes: logical names of the kernel's axes.
    stacked: 1 if the kernel has the leading axis `layers`, else 0.
    inputs: number of input axes.
    part: index along the axis of parts, which follows the inputs; None if the kernel has none.
  """

  name: str
  kernel: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  stacked: int
  inputs: int
  part: int | None

  @property
  def parts(self) -> int | None:
    """Number of projections that share the kernel; None if it has no such axis."""
    return None if self.part is None else self.shape[self.stacked + self.inputs]

  def form(self, rank: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Returns {A: (shape, logical axes), B: (shape, logical axes)}."""

    def both(values: tuple, of_rank: Any) -> dict[str, tuple]:
      end = self.stacked + self.inputs
      outputs = values[end + (self.part is not None) :]
      return {A: (*values[:end], of_rank), B: (*values[: self.stacked], of_rank, *outputs)}

    shapes, axes = both(self.shape, rank), both(self.axes, _RANK_AXIS)
    return {name: (shapes[name], axes[name]) for name in (A, B)}


def projections(abstract: PyTree) -> list[Projection]:
  """Returns the projections of a network, sorted by name.

  They are the parameters with the name `kernel`: those of attention, MLPs, logits, patches and
  convolutions. Embeddings, norms and biases have no adapters.

  Args:
    abstract: abstract parameters with their logical axis names.
  """
  found: dict[str, Projection] = {}
  flat = flax.traverse_util.flatten_dict(dict(abstract))
  for path, leaf in flat.items():
    if path[-1] != 'kernel' or not isinstance(leaf, nn.Partitioned):
      continue
    axes, shape = tuple(str(axis) for axis in leaf.names), tuple(leaf.value.shape)
    stacked = int(axes[0] == 'layers')
    inputs = _INPUTS.get(axes[stacked], 1)
    after = axes[stacked + inputs] if len(axes) > stacked + inputs else ''
    last = _PARTS.get(after, (_NAMES.get(path[-2], path[-2]),))
    names = ['/'.join((*path[:-2], name)) for name in last]
    for index, name in enumerate(names):
      part = index if after in _PARTS else None
      if name in found:
        raise ValueError(f'two projections with the name {name}')
      found[name] = Projection(name, path[:-1], shape, axes, stacked, inputs, part)
  return [found[name] for name in sorted(found)]


def select(
  known: Sequence[Projection], targets: Sequence[str], key: str = 'targets'
) -> list[Projection]:
  """Returns the projections that patterns choose.

  A pattern consists of names that follow each other in the name of a projection, with the wildcards
  of shells: 'mlp' chooses the projections of all MLPs, 'attention/query' the queries of
  self-attention, and 'image_decoder/*/cross_attention' all of cross-attention.

  Args:
    known: the projections of a network.
    targets: the patterns.
    key: the setting that has the patterns, for messages.

  Raises:
    UserError: if there is no pattern, or if one of them chooses nothing.
  """
  chosen: set[str] = set()
  if not targets:
    raise errors.UserError(f'{key} has no pattern; {_choice(known)}')
  for target in targets:
    pattern = f'*/{target.strip("/")}/*'
    found = {one.name for one in known if target and fnmatch.fnmatchcase(f'/{one.name}/', pattern)}
    if not found:
      raise errors.UserError(f'{key}: {target!r} chooses no projection; {_choice(known)}')
    chosen |= found
  return [one for one in known if one.name in chosen]


def _choice(known: Sequence[Projection]) -> str:
  if not known:
    return 'the network has no projections that could be adapted'
  names = [one.name for one in known]
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return f'choose from {", ".join(names[:_SHOWN])}{more}'


def init(rng: PRNGKeyArray, chosen: Iterable[Projection], rank: int) -> dict[str, Any]:
  """Returns first adapters, with their logical axis names: A is random and B is 0.

  A has a variance of one over the inputs, as kernels have.

  Args:
    rng: a key.
    chosen: the projections to adapt.
    rank: their rank; with 0, the result is empty.
  """
  adapters: dict[str, Any] = {}
  for one in chosen if rank else ():
    key = jax.random.fold_in(rng, zlib.crc32(one.name.encode()))
    form = one.form(rank)
    shape, axes = form[A]
    fan_in = math.prod(one.shape[one.stacked : one.stacked + one.inputs])
    values = jax.random.normal(key, shape) / math.sqrt(fan_in)
    adapters[f'{one.name}/{A}'] = nn.LogicallyPartitioned(values, axes)
    shape, axes = form[B]
    adapters[f'{one.name}/{B}'] = nn.LogicallyPartitioned(jnp.zeros(shape), axes)
  return flax.traverse_util.unflatten_dict(adapters, sep='/')


def by_kernel(
  chosen: Iterable[Projection], adapters: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], list[tuple[Projection, Any, Any]]]]:
  """Yields the path of each adapted kernel, and its projections, each with its A and B."""
  flat = flax.traverse_util.flatten_dict(dict(adapters), sep='/')
  kernels: dict[tuple[str, ...], list[tuple[Projection, Any, Any]]] = {}
  for one in chosen:
    if f'{one.name}/{A}' in flat:
      found = one, flat[f'{one.name}/{A}'], flat[f'{one.name}/{B}']
      kernels.setdefault(one.kernel, []).append(found)
  yield from kernels.items()


def effective(
  params: Mapping[str, Any],
  adapters: Mapping[str, Any],
  chosen: Iterable[Projection],
  scale: float,
) -> dict[str, Any]:
  """Adds adapters to the kernels of a network.

  Args:
    params: the parameters, without axis names.
    adapters: adapters of the projections, without axis names; empty for none.
    chosen: the adapted projections.
    scale: what A · B is multiplied by.

  Returns:
    The tree of parameters with W + scale · A · B in place of each adapted kernel W. All other
    parameters are the same arrays.
  """
  flat = flax.traverse_util.flatten_dict(dict(params))
  for path, members in by_kernel(chosen, adapters):
    products = {one.part: _product(a, b, one.stacked) for one, a, b in members}
    first = members[0][0]
    if first.parts is None:
      product = products[None]
    else:
      nothing = jnp.zeros_like(next(iter(products.values())))
      of_parts = [products.get(part, nothing) for part in range(first.parts)]
      product = jnp.stack(of_parts, axis=first.stacked + first.inputs)
    kernel = flat[(*path, 'kernel')]
    flat[(*path, 'kernel')] = kernel + scale * product
  return flax.traverse_util.unflatten_dict(flat)


def _product(
  a: Float[Array, '*inputs rank'], b: Float[Array, '*rank_and_outputs'], stacked: int
) -> Float[Array, '*inputs_and_outputs']:
  """Returns A · B, of each layer of a stack."""
  layers = tuple(range(stacked))
  dimensions = ((a.ndim - 1,), (stacked,)), (layers, layers)
  return jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST)
