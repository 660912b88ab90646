"""Captions and the real pictures that they describe, chosen for an evaluation."""

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
from jaxtyping import Int

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions as captions_lib
from parti_jax.data import image_decoding

# Maximum bytes of an annotation file; MS-COCO's have 100 million, or 500 million with boxes.
_MAX_ANNOTATIONS = 2**31


class Pictures(Protocol):
  """Encoded pictures in a fixed order."""

  def __len__(self) -> int:
    """Returns the number of pictures."""

  def encoded(self) -> Iterator[bytes]:
    """Yields the encoded bytes of each picture."""


class PictureFiles:
  """Pictures in individual files."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self.paths = list(paths)

  def __len__(self):
    return len(self.paths)

  def encoded(self) -> Iterator[bytes]:
    for path in self.paths:
      try:
        with path.open('rb') as file:
          # One byte more lets the decoder detect files that are too large.
          yield file.read(image_decoding.MAX_BYTES + 1)
      except OSError as error:
        raise UserError(f'--pictures: {path} cannot be read ({error.strerror})') from error


@dataclasses.dataclass(frozen=True)
class Captioned:
  """The captions and the real pictures of an evaluation.

  Attributes:
    name: name of the data set.
    captions: texts, in the order of generation.
    picture_of: the index in `pictures` of each caption's picture.
    pictures: the pictures of these captions, without repetition; none if only captions are read.
    available: number of captions to choose from.
    skipped: reason -> number of unusable captions.
  """

  name: str
  captions: Sequence[str]
  picture_of: Int[np.ndarray, 'captions']
  pictures: Pictures
  available: int
  skipped: Mapping[str, int]


def choose(picture_of: Sequence[int], limit: int, seed: int) -> Int[np.ndarray, 'chosen']:
  """Chooses captions at random; repeats a picture only once all pictures have a caption.

  So 30,000 captions of MS-COCO's validation pictures, of which there are more, belong to 30,000
  different pictures.

  Args:
    picture_of: the picture of each caption, as integers.
    limit: maximum number of captions.
    seed: seed of the choice.

  Returns:
    Indices of captions in random order.
  """
  order = np.random.default_rng(seed).permutation(len(picture_of))
  seen: collections.Counter[int] = collections.Counter()
  turn = np.empty(len(order), int)
  for position, caption in enumerate(order.tolist()):
    turn[position] = seen[picture_of[caption]]
    seen[picture_of[caption]] += 1
  return order[np.argsort(turn, kind='stable')][:limit]


def read_json(path: str, what: str) -> Any:
  """Returns the content of a JSON file of annotations.

  Args:
    path: path of the file.
    what: the expected file, for the message.

  Raises:
    UserError: it can't be read, or isn't JSON.
  """
  try:
    return storage.read_json(path, _MAX_ANNOTATIONS)
  except OSError as error:
    raise UserError(
      f'--annotations {path} cannot be read ({error.strerror or error}); expected {what}'
    ) from error
  except ValueError as error:
    raise UserError(f'--annotations {path} is not JSON ({error}); expected {what}') from error


class Captions:
  """Usable captions, each with associated data, and counts of the others."""

  def __init__(self):
    self.found: list[tuple[str, Any]] = []
    self.skipped: collections.Counter[str] = collections.Counter()

  def add(self, value: object, of: Any) -> None:
    """Adds a caption from JSON, or counts the reason why it can't be used."""
    try:
      self.found.append((captions_lib.clean(captions_lib.from_json(value))[0], of))
    except captions_lib.UnusableCaption as error:
      self.skipped[str(error)] += 1

  def check(self, path: str) -> None:
    """Raises UserError if there are no usable captions."""
    if not self.found:
      reasons = ', '.join(f'{count:,} {reason}' for reason, count in self.skipped.most_common())
      raise UserError(f'--annotations {path} has no usable caption ({reasons or "it is empty"})')


def identity(value: object) -> str | None:
  """Returns a picture's id, an integer or a string, as a string; None for anything else."""
  if isinstance(value, bool) or not isinstance(value, (int, str)):
    return None
  return str(value).strip() or None


def of_files(name: str, captions: Captions, folder: str | None, limit: int, seed: int) -> Captioned:
  """Chooses among captions of picture files.

  Args:
    name: name of the data set.
    captions: captions with their picture's file, None if it is missing; without a folder, with
      anything that tells pictures apart.
    folder: the folder of the pictures; None to read only captions. The same captions are chosen as
      with a folder of all pictures.
    limit: maximum number of captions.
    seed: seed of the choice.

  Returns:
    The chosen captions and pictures. Captions without a file are counted as skipped.

  Raises:
    UserError: no caption has a picture file.
  """
  available = len(captions.found)
  kept = [(caption, path) for caption, path in captions.found if path is not None]
  if not kept:
    raise UserError(
      f'--pictures {folder}: none of the {available:,} captions of {name} has '
      'its picture there; give the folder that holds the picture files'
    )
  files = {path: index for index, path in enumerate(dict.fromkeys(path for _, path in kept))}
  chosen = choose([files[path] for _, path in kept], limit, seed)
  shown = [kept[index] for index in chosen]
  paths = sorted({path for _, path in shown}, key=files.__getitem__)
  index_of = {path: index for index, path in enumerate(paths)}
  missing = collections.Counter({'no picture file': available - len(kept)})
  return Captioned(
    name,
    [caption for caption, _ in shown],
    np.array([index_of[path] for _, path in shown]),
    PictureFiles([] if folder is None else paths),
    available,
    dict(+(captions.skipped + missing)),
  )


def names_in(folder: str) -> set[str]:
  """Returns the names of the files in a folder; raises UserError if it can't be read."""
  try:
    return {path.name for path in pathlib.Path(folder).iterdir()}
  except OSError as error:
    raise UserError(
      f'--pictures {folder} cannot be read ({error.strerror}); give the folder '
      'with the picture files'
    ) from error
