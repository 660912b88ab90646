"""Image tokens as t5x.infer writes them: a line of JSON for each example.

  {"inputs": {"inputs_pretokenized": "red apple"}, "prediction": [17, 4, ...]}

'prediction' is a list of such lists where several pictures were drawn for an example. What seqio's
evaluator logs has 'input' in place of 'inputs'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.sampling import detokenizing

FIELD = 'prediction'
CAPTION_FIELD = 'inputs_pretokenized'


@dataclasses.dataclass(frozen=True)
class Inference:
  """A line of the file.

  Attributes:
    line: its number, from 1.
    caption: of the example; None where the line has none.
    tokens: int32 [num_images, image_length].
  """

  line: int
  caption: str | None
  tokens: np.ndarray


def read(
  path: str,
  detokenizer: detokenizing.Detokenizer,
  field: str = FIELD,
  caption_field: str = CAPTION_FIELD,
) -> list[Inference]:
  """Reads a file of image tokens; blank lines are left out.

  Args:
    path: the file; a path or URL.
    detokenizer: knows which tokens there are.
    field: of a line, with its tokens.
    caption_field: of the line's inputs, with the caption.

  Returns:
    A record for each line.

  Raises:
    UserError: the file can't be read or has no line, or a line is no JSON, has no such field,
      tokens that are not the detokenizer's, or another number of pictures than the first one.
  """
  found = []
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
  """Yields the numbers, from 1, and texts of the lines that are not blank."""
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
    raise UserError('it is no JSON object, such as t5x.infer writes; is the file whole?')
  return content


def _decodes(content: dict[str, Any], field: str) -> list[list]:
  """Returns a list of tokens for each picture of a line."""
  if field not in content:
    raise UserError(
      f'there is no {field!r}, only {", ".join(map(repr, content)) or "nothing"}; --field names '
      'what holds the tokens, which t5x.infer writes with mode predict or predict_with_aux'
    )
  value = content[field]
  if not isinstance(value, list) or not value:
    raise UserError(f'{field!r} is {str(value)[:60]!r} and no list of image tokens')
  if not any(isinstance(entry, list) for entry in value):
    return [value]
  if not all(isinstance(entry, list) for entry in value):
    raise UserError(f'{field!r} mixes image tokens with lists of them')
  return value


def _caption(content: dict[str, Any], caption_field: str) -> str | None:
  inputs = content.get('inputs', content.get('input'))
  caption = inputs.get(caption_field) if isinstance(inputs, dict) else None
  return caption if isinstance(caption, str) else None
