"""Captions and the real pictures they describe, chosen for an evaluation."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from parti_jax.errors import UserError


class Pictures(Protocol):
  """Encoded pictures in a fixed order."""

  def __len__(self) -> int:
    """Returns their number."""

  def encoded(self) -> Iterator[bytes]:
    """Yields each picture as it is in its file."""


class PictureFiles:
  """Pictures that are files."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = list(paths)

  def __len__(self):
    return len(self.paths)

  def encoded(self) -> Iterator[bytes]:
    for path in self.paths:
      try:
        yield path.read_bytes()
      except OSError as error:
        raise UserError(f'--pictures: {path} cannot be read ({error.strerror})') from error


@dataclasses.dataclass(frozen=True)
class Captioned:
  """What an evaluation draws, and what it compares with.

  Attributes:
    name: of the data set.
    captions: texts, in the order they are drawn.
    picture_of: int [captions], the index in `pictures` of each caption's picture.
    pictures: the pictures of these captions, each once.
    available: how many captions there were to choose from.
    skipped: reason -> number of captions that could not be chosen.
  """
  name: str
  captions: Sequence[str]
  picture_of: np.ndarray
  pictures: Pictures
  available: int
  skipped: Mapping[str, int]


def check_text(text: str, place: str):
  """Raises UserError, which names the place, for a text that can't be written as UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{place} has characters that are not Unicode') from error


def choose(picture_of: Sequence[int], limit: int, seed: int) -> np.ndarray:
  """Draws captions at random, a second one of a picture only once every picture has one.

  So 30,000 captions of MS-COCO's validation pictures, of which there are more, are those of 30,000
  different pictures.

  Args:
    picture_of: the picture of each caption, any whole numbers.
    limit: how many captions at most.
    seed: of the draw.

  Returns:
    int [chosen], indices of captions in random order.
  """
  order = np.random.default_rng(seed).permutation(len(picture_of))
  seen = collections.Counter()
  turn = np.empty(len(order), int)
  for position, caption in enumerate(order.tolist()):
    turn[position] = seen[picture_of[caption]]
    seen[picture_of[caption]] += 1
  return order[np.argsort(turn, kind='stable')][:limit]


def of_files(name: str, captions: Sequence[tuple[str, pathlib.Path | None]], folder: str,
             limit: int, seed: int) -> Captioned:
  """Chooses among captions of picture files.

  Args:
    name: of the data set.
    captions: each with its picture's file; None where the file isn't there.
    folder: where pictures were looked for, for the message.
    limit: how many captions at most.
    seed: of the choice.

  Returns:
    The chosen ones. Captions without a file are counted as skipped.

  Raises:
    UserError: no caption has its picture there.
  """
  kept = [(caption, path) for caption, path in captions if path is not None]
  if not kept:
    raise UserError(f'--pictures {folder}: none of the {len(captions):,} captions of {name} has '
                    'its picture there; name the folder that holds the picture files')
  files = {path: index for index, path in enumerate(dict.fromkeys(path for _, path in kept))}
  chosen = choose([files[path] for _, path in kept], limit, seed)
  shown = [kept[index] for index in chosen]
  paths = sorted({path for _, path in shown}, key=files.get)
  place = {path: index for index, path in enumerate(paths)}
  missing = len(captions) - len(kept)
  return Captioned(
      name, [caption for caption, _ in shown], np.array([place[path] for _, path in shown]),
      PictureFiles(paths), len(captions), {'no picture file': missing} if missing else {})


def names_in(folder: str) -> set[str]:
  """Returns the names of the files in a folder; a UserError if it can't be read."""
  try:
    return {path.name for path in pathlib.Path(folder).iterdir()}
  except OSError as error:
    raise UserError(f'--pictures {folder} cannot be read ({error.strerror}); it is the folder '
                    'with the picture files') from error
