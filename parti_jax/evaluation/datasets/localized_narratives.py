"""Localized Narratives: captions that annotators spoke while pointing at image regions.

Pont-Tuset et al. 2020, arXiv 1912.03098. A file holds JSON lines: {"dataset_id": "mscoco_val2017",
"image_id": "137576", "caption": "…", and traces, which we ignore}. Parti's evaluation uses the
narratives of MS-COCO's pictures, coco_val_localized_narratives.jsonl; the pictures are MS-COCO's
val2017.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.evaluation.datasets import captioned_pictures

NAME = 'Localized Narratives'

# In characters; the traces of a long narrative have a million.
_MAX_LINE = 2**24


def read(
  annotations: str, pictures: str | None, limit: int, seed: int
) -> captioned_pictures.Captioned:
  """Reads narratives and chooses among them.

  Args:
    annotations: path of the file.
    pictures: path of the folder with the picture files; their names are those of MS-COCO 2017
      (000000137576.jpg) or 2014 (COCO_val2014_000000137576.jpg), or the `image_id` with an
      extension. None to read only narratives.
    limit: maximum number of narratives.
    seed: seed of the choice.

  Returns:
    The narratives and their pictures.

  Raises:
    UserError: the file or the folder can't be read, a line is incomplete, no caption is usable, or
      no picture file exists.
  """
  there = set() if pictures is None else captioned_pictures.names_in(pictures)
  captions = captioned_pictures.Captions()
  for number, line in _lines(annotations):
    row = _parse(line, f'{annotations}, line {number}')
    identity = captioned_pictures.identity(row.get('image_id'))
    if identity is None:
      raise UserError(f"{annotations}, line {number}: it has no whole number or string 'image_id'")
    if pictures is None:
      captions.add(row.get('caption'), identity)
      continue
    name = next((name for name in _file_names(identity) if name in there), None)
    captions.add(row.get('caption'), name and pathlib.Path(pictures, name))
  captions.check(annotations)
  return captioned_pictures.of_files(NAME, captions, pictures, limit, seed)


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """Yields the numbers, from 1, and texts of the nonblank lines."""
  try:
    with storage.open_file(path, 'rt') as file:
      number = 0
      while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
          raise UserError(f'{path}, line {number}: it has more than {_MAX_LINE:,} characters')
        if line.strip():
          yield number, line
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
    raise UserError(
      f'--annotations {path} cannot be read ({reason}); expected the file '
      'coco_val_localized_narratives.jsonl'
    ) from error


def _parse(line: str, location: str) -> dict:
  """Returns the object in a line."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    reason = getattr(error, 'msg', 'it cannot be read')
    raise UserError(
      f'{location}: not JSON ({reason}); expected {{"image_id": …, "caption": …}}'
    ) from error
  if not isinstance(row, dict):
    raise UserError(f'{location}: not a JSON object; expected {{"image_id": …, "caption": …}}')
  return row


def _file_names(identity: str) -> Iterator[str]:
  """Yields the possible file names of a picture, the most likely first."""
  stems = [identity]
  if identity.isdecimal():
    number = identity.zfill(12)
    stems = [number, f'COCO_val2014_{number}', f'COCO_train2014_{number}', identity]
  for stem in stems:
    for ending in image_decoding.ENDINGS:
      yield f'{stem}.{ending}'
      yield f'{stem}.{ending.upper()}'
