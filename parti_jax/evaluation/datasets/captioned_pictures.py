"""Captions and the real pictures they describe, chosen for an evaluation."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions as captions_lib
from parti_jax.data import image_decoding

# The most bytes of an annotation file; MS-COCO's have 100 million, with boxes 500 million.
_MAX_ANNOTATIONS = 2**31


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
        with path.open('rb') as file:
          # One byte more tells the decoder that it is too much.
          yield file.read(image_decoding.MAX_BYTES + 1)
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


def read_json(path: str, what: str) -> Any:
  """Returns what is in a JSON file of annotations.

  Args:
    path: of the file.
    what: which file it should be, for the message.

  Raises:
    UserError: it can't be read, or is no JSON.
  """
  try:
    return storage.read_json(path, _MAX_ANNOTATIONS)
  except OSError as error:
    raise UserError(
      f'--annotations {path} cannot be read ({error.strerror or error}); it is {what}'
    ) from error
  except ValueError as error:
    raise UserError(f'--annotations {path} is no JSON ({error}); it is {what}') from error


class Captions:
  """Captions that can be used, each with something of its own, and a count of the others."""

  def __init__(self):
    self.found: list[tuple[str, Any]] = []
    self.skipped = collections.Counter()

  def add(self, value: object, of: Any) -> None:
    """Adds a caption as it was found in JSON, or counts why it can't be used."""
    try:
      self.found.append((captions_lib.clean(captions_lib.from_json(value))[0], of))
    except captions_lib.UnusableCaption as error:
      self.skipped[str(error)] += 1

  def check(self, path: str) -> None:
    """Raises UserError if there is none."""
    if not self.found:
      reasons = ', '.join(f'{count:,} {reason}' for reason, count in self.skipped.most_common())
      raise UserError(
        f'--annotations {path} has no caption that can be used ({reasons or "it is empty"})'
      )


def identity(value: object) -> str | None:
  """Returns a picture's id, a whole number or a text, as a text; None for anything else."""
  if isinstance(value, bool) or not isinstance(value, (int, str)):
    return None
  return str(value).strip() or None


def of_files(name: str, captions: Captions, folder: str, limit: int, seed: int) -> Captioned:
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
  captions, skipped = captions.found, captions.skipped
  kept = [(caption, path) for caption, path in captions if path is not None]
  if not kept:
    raise UserError(
      f'--pictures {folder}: none of the {len(captions):,} captions of {name} has '
      'its picture there; name the folder that holds the picture files'
    )
  files = {path: index for index, path in enumerate(dict.fromkeys(path for _, path in kept))}
  chosen = choose([files[path] for _, path in kept], limit, seed)
  shown = [kept[index] for index in chosen]
  paths = sorted({path for _, path in shown}, key=files.get)
  place = {path: index for index, path in enumerate(paths)}
  missing = collections.Counter({'no picture file': len(captions) - len(kept)})
  return Captioned(
    name,
    [caption for caption, _ in shown],
    np.array([place[path] for _, path in shown]),
    PictureFiles(paths),
    len(captions),
    dict(+(skipped + missing)),
  )


def names_in(folder: str) -> set[str]:
  """Returns the names of the files in a folder; a UserError if it can't be read."""
  try:
    return {path.name for path in pathlib.Path(folder).iterdir()}
  except OSError as error:
    raise UserError(
      f'--pictures {folder} cannot be read ({error.strerror}); it is the folder '
      'with the picture files'
    ) from error
