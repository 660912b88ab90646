"""Compares pictures with their captions by a ranker: the cosine of its vectors, as CLIP's similarity.

A worker process loads the ranker once. Its imports are inside functions, because most preparations
need neither the ranker nor JAX.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.preparation.settings import Settings

# Pictures that are compared at once.
BATCH = 64
TOO_LOW = 'similarity of picture and caption too low'
CUT = 'caption longer than the ranker reads; its beginning was compared'

_rankers: dict[str, Any] = {}
_loading = threading.Lock()


class Pair(NamedTuple):
  """A picture and its caption.

  Attributes:
    square: float32 [size, size, 3], the preprocessed picture.
    caption: the caption.
  """

  square: np.ndarray
  caption: str


class Verdict(NamedTuple):
  """What was found about a pair.

  Attributes:
    cosine: of the vectors.
    cut: whether the caption is longer than the ranker's text length.
  """

  cosine: float
  cut: bool


def check(settings: Settings) -> None:
  """Loads the ranker that the settings name, if any.

  Raises:
    UserError: if it can't be read, or has no preprocessing of its own.
  """
  if settings.ranker is None:
    return
  try:
    ranker = _load(settings.ranker)
  except UserError as error:
    raise UserError(f'prepare.ranker={settings.ranker!r}: {error}') from error
  if ranker.preprocessing is None:
    raise UserError(
      f'prepare.ranker={settings.ranker!r} takes pictures of one shape only; give the folder of a '
      'CLIP or SigLIP 2 that `parti-jax import ranker` wrote'
    )


def pair(image: Image.Image, caption: str, settings: Settings) -> Pair | None:
  """Preprocesses a picture for `judge`; None if the settings name no ranker."""
  if settings.ranker is None:
    return None
  (square,) = _load(settings.ranker).squares([np.asarray(image.convert('RGB'))])
  return Pair(square, caption)


def judge(pairs: Sequence[Pair], settings: Settings) -> list[Verdict]:
  """Compares pictures with their captions.

  Args:
    pairs: results of `pair`, at least one.
    settings: the settings, with a ranker.
  """
  assert settings.ranker is not None
  ranker = _load(settings.ranker)
  tokens, cut = ranker.encode([one.caption for one in pairs])
  of_pictures = ranker.features_of_squares(np.stack([one.square for one in pairs]))
  cosines = np.sum(of_pictures * ranker.features_of_tokens(tokens), axis=1)
  return [Verdict(cosine, bool(rest)) for cosine, rest in zip(cosines.tolist(), cut)]


def _load(folder: str) -> Any:
  """Returns the ranker in a folder, which this process loads once."""
  from parti_jax.sampling import ranking

  with _loading:
    if folder not in _rankers:
      _rankers[folder] = ranking.load(folder)
    return _rankers[folder]
