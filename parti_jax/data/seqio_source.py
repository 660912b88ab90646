"""Exposes our sources as seqio data sources."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np

from parti_jax.data import order as order_lib
from parti_jax.data import shard_epochs
from parti_jax.data import share as share_lib
from parti_jax.data.damage import Damaged
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf
from parti_jax.data.sources import base

# Examples passed from Python to TensorFlow at once; a call takes longer than reading an example.
_CHUNK, _CHUNK_BYTES = 64, 2**20


class SeqioSource(seqio.DataSource):
  """Reads a source for seqio and t5x.

  Its examples are {'caption': tf.string [], 'picture': tf.string [] or 'tokens': int32, 'problem':
  tf.string []}. For a damaged example, 'problem' is the result of `described`.

  Args:
    source: the source.
    pictures: whether pictures are needed.

  Attributes:
    source: the source.
    place: description of the data, for messages.
  """

  supports_arbitrary_sharding = True

  def __init__(self, source: base.Source, pictures: bool = True):
    super().__init__(
      splits=source.splits, caching_permitted=False, performs_internal_shuffling=True
    )
    self.source, self.place, self._pictures = source, source.place, pictures

  def list_shards(self, split: str) -> list[str]:
    """Returns the names of a split's parts."""
    opened = self.source.open(split, self._pictures)
    return list(opened.files) if isinstance(opened, base.Shards) else [split]

  def num_input_examples(self, split: str) -> int | None:
    """Returns the number of examples in a split; None if it is unknown without reading them."""
    opened = self.source.open(split, self._pictures)
    return None if isinstance(opened, base.Shards) else len(opened)

  def get_dataset(
    self, split='train', shuffle=True, seed=None, shard_info=None, **unused_seqio_arguments
  ) -> tf.data.Dataset:
    """Reads a split, in a different order on each iteration over the dataset.

    Args:
      split: one of the source's splits.
      shuffle: whether to shuffle the encoded examples.
      seed: makes the orders reproducible.
      shard_info: the part of the split to read; None for the whole split.

    Raises:
      UserError: the data can't be found or read.
    """
    opened = self.source.open(split, self._pictures)
    reading = share_lib.Reading(
      seed=int(np.random.default_rng().integers(2**31) if seed is None else seed),
      shuffle=shuffle,
      share=shard_info.index if shard_info else 0,
      shares=shard_info.num_shards if shard_info else 1,
    )
    epochs = itertools.count()
    signature = {
      'caption': tf.TensorSpec([None], tf.string),
      'problem': tf.TensorSpec([None], tf.string),
    }
    tokens = self.source.info.get('image_tokens', 0)
    if tokens:
      signature['tokens'] = tf.TensorSpec([None, tokens], tf.int32)
    elif self._pictures:
      signature['picture'] = tf.TensorSpec([None], tf.string)
    return tf.data.Dataset.from_generator(
      lambda: _chunks(_epoch(opened, reading, next(epochs)), signature, tokens),
      output_signature=signature,
    ).unbatch()


def _epoch(
  opened: base.Records | base.Shards, reading: share_lib.Reading, epoch: int
) -> Iterator[base.Example | Damaged]:
  """Yields the examples of a share in one epoch."""
  if isinstance(opened, base.Shards):
    for _, example in shard_epochs.raw_epoch(opened, reading, epoch):
      yield example
    return
  order = order_lib.Order(len(opened), reading.seed, reading.shuffle, reading.share, reading.shares)
  positions = range(epoch * len(order), (epoch + 1) * len(order))
  for start in range(0, len(positions), _CHUNK):
    yield from opened.read(
      [order.index(position) for position in positions[start : start + _CHUNK]]
    )


def _chunks(
  examples: Iterator[base.Example | Damaged], names: Collection[str], tokens: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields columns of several examples at once; uses the first of several views of a picture."""
  columns: dict[str, list] = {name: [] for name in names}
  size = 0
  for example in examples:
    row = {'problem': described(example)} if isinstance(example, Damaged) else example
    for name in names:
      columns[name].append(row.get(name, b''))
    size += len(row.get('picture', b''))
    if len(columns['problem']) == _CHUNK or size >= _CHUNK_BYTES:
      yield _arrays(columns, tokens)
      columns, size = {name: [] for name in names}, 0
  if columns['problem']:
    yield _arrays(columns, tokens)


def _arrays(columns: Mapping[str, list], tokens: int) -> dict[str, np.ndarray]:
  # Object arrays, since numpy's strings lose trailing zeros.
  arrays = {name: np.array(values, object) for name, values in columns.items() if name != 'tokens'}
  if 'tokens' in columns:
    zeros = np.zeros([1, tokens], np.int32)
    arrays['tokens'] = np.stack(
      [np.atleast_2d(zeros if isinstance(row, bytes) else row)[0] for row in columns['tokens']]
    )
  return arrays


def described(damaged: Damaged) -> bytes:
  """Returns the 'problem' of an example: the reason and the location, separated by a tab."""
  return f'{damaged.reason}\t{damaged.where}'.encode('utf-8', 'surrogateescape')


def parts(problem: bytes) -> tuple[str, str]:
  """Returns the reason and the location from a problem of `described`."""
  reason, _, path = problem.decode('utf-8', 'surrogateescape').partition('\t')
  return reason, path
