"""What a source of captioned pictures is, for whoever reads it or writes a new one.

A source has splits. Opening one gives examples in one of two forms:

- `Records` have an index: any example can be read at once. They are shuffled as a whole.
- `Shards` are files that are read from their beginning, such as tars. Their order is shuffled, and
  the examples within a window.

An example is a dict of 'picture', the encoded picture as bytes, and 'caption', UTF-8 bytes as
`captions.clean` takes them; those of a token cache have 'tokens' in place of the picture. What can't
be read is a `Damaged` in its place.

Where a source knows more of an example, `open_described` adds 'key', a text that names it, and
'columns', what else its files say of it by name, such as the scores that img2dataset leaves.
"""

from __future__ import annotations

import abc
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
  """The XXH3 digest of the sizes of files, in their order."""
  sizes = ' '.join(map(str, storage.sizes_of(files)))
  return xxhash.xxh3_64_hexdigest(sizes.encode())


class Records(abc.ABC):
  """The examples of a split, which can be read in any order.

  Instances are pickled into worker processes, so that they open their files when they first read.
  """

  @abc.abstractmethod
  def __len__(self) -> int:
    """The number of examples."""

  @abc.abstractmethod
  def read(self, indices: Sequence[int]) -> list[Example | Damaged]:
    """Reads the examples at these indices, in their order."""

  def digest(self) -> str | None:
    """What changes with the examples, as far as that is known without reading them; else None."""
    return None

  def close(self) -> None:  # noqa: B027
    """Closes the files that are open; reading opens them again."""


class Shards(abc.ABC):
  """The examples of a split in files that are read from their beginning.

  Attributes:
    files: paths or URLs, sorted.
  """

  files: Sequence[str]

  def digest(self) -> str:
    """What changes with the files, as far as that is known without reading them: their sizes."""
    return digest_of(self.files)

  @abc.abstractmethod
  def read(self, file: str) -> Iterator[Example | Damaged]:
    """Reads one of the files."""


class Source(abc.ABC):
  """A named source of captioned pictures, or of captions alone.

  Attributes:
    name: in gin and in messages.
    place: what is read, for messages.
    splits: names of the splits.
    has_pictures: whether there are pictures; otherwise only captions.
  """

  has_pictures = True

  def __init__(self, name: str, splits: Sequence[str]):
    self.name = self.place = name
    self.splits = tuple(splits)

  @abc.abstractmethod
  def open(self, split: str, pictures: bool = True) -> Records | Shards:
    """Opens a split.

    Args:
      split: one of `splits`.
      pictures: whether pictures are needed; without them examples may have captions alone.

    Raises:
      UserError: the split is missing, or its data can't be found or read.
    """

  def open_described(self, split: str) -> Records | Shards:
    """Opens a split with pictures, and with keys and columns where the source has them."""
    return self.open(split)

  def check_split(self, split: str) -> None:
    """Raises UserError unless the source has a split."""
    if split not in self.splits:
      raise UserError(
        f'{self.name} has no split {split!r}; it has {", ".join(self.splits)}'
        f' (gin: {self.name}.splits)'
      )

  def examples(self, split: str, pictures: bool = True) -> Iterator[Example | Damaged]:
    """Opens a split at once, see `open`, and yields its examples in order."""
    return _in_order(self.open(split, pictures))

  def captions(self, split: str) -> Iterator[str]:
    """Yields the captions of a split that can be used in order, without decoding pictures.

    A warning at the end counts the others.
    """
    skipped = tally.Tally()
    for example in self.examples(split, pictures=False):
      if isinstance(example, Damaged):
        skipped.add(example.reason, place=example.where)
        continue
      try:
        yield captions_lib.clean(example['caption'])[0]
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
