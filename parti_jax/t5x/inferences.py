"""Reads the image tokens that t5x.infer writes: a line of JSON for each example.

  {"inputs": {"inputs_pretokenized": "red apple"}, "prediction": [17, 4, ...]}

'prediction' is a list of such lists if several pictures were sampled for an example. The logs of
seqio's evaluator have 'input' instead of 'inputs'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.sampling import detokenizing

FIELD = 'prediction'
CAPTION_FIELD = 'inputs_pretokenized'


@dataclasses.dataclass(frozen=True)
class Inference:
  """A line of the file.

  Attributes:
    line: number of the line, from 1.
    caption: caption of the example; None if the line has none.
    tokens: image tokens of the example's pictures.
  """

  line: int
  caption: str | None
  tokens: Int32[np.ndarray, 'num_images image_length']


def read(
  path: str,
  detokenizer: detokenizing.Detokenizer,
  field: str = FIELD,
  caption_field: str = CAPTION_FIELD,
) -> list[Inference]:
  """Reads a file of image tokens; skips blank lines.

  Args:
    path: a path or URL of the file.
    detokenizer: checks the tokens.
    field: the field of a line with the tokens.
    caption_field: the field of a line's inputs with the caption.

  Raises:
    UserError: the file can't be read or is empty, or a line is not JSON, lacks the field, has
      tokens that the detokenizer's codebook doesn't have, or has another number of pictures than
      the first line.
  """
  found: list[Inference] = []
  for number, line in _lines(path):
    try:
      content = _object(line)
      decodes = _decodes(content, field)
      tokens = np.stack([detokenizer.checked(ids) for ids in decodes])
      if found and len(tokens) != len(found[0].tokens):
        raise UserError(
          f'{len(tokens)} pictures, but line {found[0].line} has {len(found[0].tokens)}'
        )
    except UserError as error:
      raise UserError(f'{path}, line {number}: {error}') from error
    found.append(Inference(number, _caption(content, caption_field), tokens))
  if not found:
    raise UserError(f'{path} has no line with image tokens')
  return found


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """Yields the number, from 1, and the text of each line that is not blank."""
  try:
    with storage.open_file(path, 'rt') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield number, line
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8 text'
    raise UserError(f'{path} cannot be read: {reason}') from error


def _object(line: str) -> dict[str, Any]:
  try:
    content = json.loads(line)
  except (ValueError, RecursionError):
    content = None
  if not isinstance(content, dict):
    raise UserError('not a JSON object, which t5x.infer writes; the file may be truncated')
  return content


def _decodes(content: dict[str, Any], field: str) -> list[list]:
  """Returns a list of tokens for each picture of a line."""
  if field not in content:
    raise UserError(
      f'the field {field!r} is missing; the fields are {", ".join(map(repr, content)) or "none"}; '
      'give the field with the tokens, which t5x.infer writes in the modes predict and '
      'predict_with_aux, by --field'
    )
  value = content[field]
  if not isinstance(value, list) or not value:
    raise UserError(f'{field!r} is {str(value)[:60]!r}, which is not a list of image tokens')
  if not any(isinstance(entry, list) for entry in value):
    return [value]
  if not all(isinstance(entry, list) for entry in value):
    raise UserError(f'{field!r} contains both image tokens and lists of them')
  return value


def _caption(content: dict[str, Any], caption_field: str) -> str | None:
  inputs = content.get('inputs', content.get('input'))
  caption = inputs.get(caption_field) if isinstance(inputs, dict) else None
  return caption if isinstance(caption, str) else None
