"""The interface of sources of captioned pictures.

A source has splits. An opened split has one of two forms:

- `Records` have an index: any example can be read directly. They are shuffled as a whole.
- `Shards` are files that are read from their beginning, such as tars. Their order is shuffled, and
  their examples within a window.

An example is a dict of 'picture', the encoded picture as bytes, and 'caption', raw bytes for
`captions.clean`, or several from `captions.several`; examples of a token cache have 'tokens' instead of the picture. An unreadable
example is `Damaged`.

If a source has more information, `open_described` adds 'key', a string that identifies the example,
and 'columns', further values from its files by name, such as img2dataset's scores.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import xxhash
from absl import logging

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions as captions_lib
from parti_jax.data import tally
from parti_jax.data.damage import Damaged

Example = Mapping[str, Any]


def digest_of(files: Sequence[str]) -> str:
  """Returns the XXH3 digest of the sizes of files, in their order."""
  sizes = ' '.join(map(str, storage.sizes_of(files)))
  return xxhash.xxh3_64_hexdigest(sizes.encode())


class Records(abc.ABC):
  """The examples of a split with random access.

  Instances are pickled into worker processes, so they open their files at the first read.
  """

  @abc.abstractmethod
  def __len__(self) -> int:
    """The number of examples."""

  @abc.abstractmethod
  def read(self, indices: Sequence[int]) -> Sequence[Example | Damaged]:
    """Returns the examples at these indices, in the given order."""

  def digest(self) -> str | None:
    """Returns a digest that changes with the examples; None if that would need reading them."""
    return None

  def close(self) -> None:  # noqa: B027
    """Closes the open files; reading opens them again."""


class Shards(abc.ABC):
  """The examples of a split in files that are read from their beginning.

  Attributes:
    files: paths or URLs, sorted.
  """

  files: Sequence[str]

  def digest(self) -> str:
    """Returns a digest of the files' sizes, to detect changes without reading them."""
    return digest_of(self.files)

  @abc.abstractmethod
  def read(self, file: str) -> Iterator[Example | Damaged]:
    """Yields the examples of one of the files."""


class Source(abc.ABC):
  """A named source of captioned pictures, or of captions only.

  Attributes:
    name: its name in gin and in messages.
    place: description of the data, for messages.
    splits: names of the splits.
    has_pictures: whether there are pictures; otherwise only captions.
    info: facts about the image tokens of a token cache; {} for other sources.
  """

  has_pictures = True
  info: Mapping[str, Any] = {}

  def __init__(self, name: str, splits: Iterable[str]):
    self.name = self.place = name
    self.splits = tuple(splits)

  @abc.abstractmethod
  def open(self, split: str, pictures: bool = True) -> Records | Shards:
    """Opens a split.

    Args:
      split: one of `splits`.
      pictures: whether pictures are needed; otherwise examples may have only captions.

    Raises:
      UserError: the split is missing, or its data can't be found or read.
    """

  def open_described(self, split: str) -> Records | Shards:
    """Opens a split with pictures, and with keys and columns if the source has them."""
    return self.open(split)

  def check_split(self, split: str) -> None:
    """Raises UserError unless the source has this split."""
    if split not in self.splits:
      raise UserError(
        f'{self.name} has no split {split!r}; it has {", ".join(self.splits)}'
        f' (gin: {self.name}.splits)'
      )

  def examples(self, split: str, pictures: bool = True) -> Iterator[Example | Damaged]:
    """Opens a split immediately with `open`, and yields its examples in order."""
    return _in_order(self.open(split, pictures))

  def captions(self, split: str) -> Iterator[str]:
    """Yields the usable captions of a split in order, all of each picture, without decoding pictures.

    A warning at the end counts the others.
    """
    skipped = tally.Tally()
    for example in self.examples(split, pictures=False):
      if isinstance(example, Damaged):
        skipped.add(example.reason, place=example.where)
        continue
      for caption in captions_lib.alternatives(example['caption']):
        try:
          yield captions_lib.clean(caption)[0]
        except captions_lib.UnusableCaption as error:
          skipped.add(str(error))
    if skipped.counts():
      logging.warning('%s, %s: skipped %s', self.place, split, skipped)


_AT_ONCE = 256


def _in_order(opened: Records | Shards) -> Iterator[Example | Damaged]:
  if isinstance(opened, Shards):
    for file in opened.files:
      yield from opened.read(file)
    return
  try:
    for start in range(0, len(opened), _AT_ONCE):
      yield from opened.read(range(start, min(start + _AT_ONCE, len(opened))))
  finally:
    opened.close()
