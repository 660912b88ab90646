"""Filters for examples; each function checks one example and raises `Unusable` with the reason."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from parti_jax.data.damage import Unusable
from parti_jax.preparation import settings as settings_lib
from parti_jax.preparation.settings import Settings


def check_caption(text: str, settings: Settings) -> None:
  """Checks a caption's length, words and scripts.

  Args:
    text: the caption, as `captions.clean` returns it.
    settings: the filters.
  """
  for bounds, count in (
    (settings.caption_length, len(text)),
    (settings.caption_words, len(text.split())),
  ):
    if bounds and count < bounds[0]:
      raise Unusable('caption too short')
    if bounds and count > bounds[1]:
      raise Unusable('caption too long')
  if settings.scripts is not None:
    letters = [
      character
      for character in unicodedata.normalize('NFKC', text)
      if settings_lib.is_letter(character)
    ]
    allowed = sum(settings_lib.script_of(letter) in settings.scripts for letter in letters)
    if allowed < settings.min_script_share * len(letters):
      raise Unusable('caption in other scripts')


def check_columns(columns: Mapping[str, Any], settings: Settings) -> None:
  """Checks the columns that have bounds.

  Args:
    columns: columns of the example.
    settings: the filters.
  """
  for name, wanted in settings.columns.items():
    value = columns.get(name)
    if value is None:
      raise Unusable(f'no column {name}')
    if settings_lib.is_texts(wanted):
      if value not in wanted:
        raise Unusable(f'column {name} is another text')
      continue
    if type(value) not in (int, float) or value != value:  # NaN.
      raise Unusable(f'column {name} is not a number')
    least, most = wanted
    if least is not None and value < least:
      raise Unusable(f'column {name} too low')
    if most is not None and value > most:
      raise Unusable(f'column {name} too high')


def check_sides(width: int, height: int, settings: Settings) -> None:
  """Checks a picture's sides, in pixels."""
  shorter, longer = sorted((width, height))
  if settings.min_side is not None and shorter < settings.min_side:
    raise Unusable('picture too small')
  if settings.max_aspect_ratio is not None and longer > settings.max_aspect_ratio * shorter:
    raise Unusable('picture too oblong')
