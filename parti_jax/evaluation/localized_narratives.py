"""Localized Narratives: captions that people spoke while pointing at what they saw.

Pont-Tuset et al. 2020, arXiv 1912.03098. A file holds JSON lines: {"dataset_id": "mscoco_val2017",
"image_id": "137576", "caption": "…", and traces that are not needed here}. Parti's evaluation
takes those of MS-COCO's pictures, coco_val_localized_narratives.jsonl; the pictures
are MS-COCO's val2017.
"""

from __future__ import annotations

import json
import pathlib

from parti_jax.errors import UserError
from parti_jax.evaluation import captioned_pictures

NAME = 'Localized Narratives'


def read(annotations: str, pictures: str, limit: int,
         seed: int) -> captioned_pictures.Captioned:
  """Reads narratives and chooses among them.

  Args:
    annotations: path of the file.
    pictures: path of the folder with the picture files; their names are those of MS-COCO 2017
      (000000137576.jpg) or 2014 (COCO_val2014_000000137576.jpg), or the `image_id` with an ending.
    limit: how many narratives at most.
    seed: of the choice.

  Returns:
    The narratives and their pictures.

  Raises:
    UserError: the file or the folder can't be read, a line lacks what it must have, or no picture
      is there.
  """
  there = captioned_pictures.names_in(pictures)
  captions = []
  try:
    with open(annotations, encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          identity, caption = _parse(line, f'{annotations}, line {number}')
          name = next((name for name in _file_names(identity) if name in there), None)
          captions.append((caption, name and pathlib.Path(pictures, name)))
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
    raise UserError(f'--annotations {annotations} cannot be read ({reason}); it is the file '
                    'coco_val_localized_narratives.jsonl') from error
  if not captions:
    raise UserError(f'--annotations {annotations} has no narrative in it')
  return captioned_pictures.of_files(NAME, captions, pictures, limit, seed)


def _parse(line: str, place: str) -> tuple[str, str]:
  """Returns a line's image_id and caption."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    reason = getattr(error, 'msg', None) or 'nested too deeply'
    raise UserError(f'{place}: no JSON ({reason}); a line is {{"image_id": …, "caption": …}}'
                    ) from error
  values = []
  for key in ('image_id', 'caption'):
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
      raise UserError(f'{place}: no text {key!r} in it')
    captioned_pictures.check_text(value, f'{place}: {key!r}')
    values.append(value.strip())
  return values[0], values[1]


def _file_names(identity: str) -> list[str]:
  """Returns the names that a picture's file may have."""
  names = [f'{identity}.jpg', f'{identity}.png']
  if identity.isdecimal():
    number = identity.zfill(12)
    names = [f'{number}.jpg', f'COCO_val2014_{number}.jpg', f'COCO_train2014_{number}.jpg', *names]
  return names
