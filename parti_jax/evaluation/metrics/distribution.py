"""Compares sets of generated and real pictures: Fréchet distance, precision, recall, alignment.

Each row compares a set of pictures with a set of real ones:

* generated, reconstruction: the generated pictures, and the tokenizer's reconstructions of the real
  ones (the ceiling for any generator over its tokens), against all real pictures;
* generated_half, real_half: one generated picture for each caption of one half of the real
  pictures, and that half itself, against the other half. The Fréchet distance grows as the number
  of pictures falls, so real_half is what perfect pictures would get, and the reference for
  generated_half.

Alignment is the mean cosine of a ranker's features of text and picture (like the CLIP score, Hessel
et al. 2021, arXiv 2104.08718, without its factor and its clipping at 0). The table also has that of
the real pictures, and that of real pictures with the captions of others. A CLIP's features also give
published scores (`clip_score`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import UInt8

from parti_jax.core import texts as texts_lib
from parti_jax.evaluation.metrics import features as features_lib
from parti_jax.evaluation.metrics import frechet
from parti_jax.evaluation.metrics import inception_score
from parti_jax.evaluation.metrics import precision_recall

ROWS = {
  'generated': 'generated',
  'reconstruction': 'real pictures through the tokenizer',
  'real': 'real pictures',
  'other_captions': 'real pictures, captions of others',
  'generated_half': 'generated for one half, against the other',
  'real_half': 'real pictures of one half, against the other',
}

# Parts of the pictures over which the inception score is averaged, as by Salimans et al. The score
# of a part can't exceed its number of pictures, so it is meaningless for small parts.
_SPLITS = inception_score.SPLITS
_LEAST_OF_A_SPLIT = 50
# With fewer pictures, the balls of precision and recall, up to the third neighbor, are too large.
_FEW_PICTURES = 100
# With fewer prompts or captions, a standard error is rough.
FEW_PROMPTS = 30


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean and its standard error (for the inception score: deviation over the splits)."""

  mean: float
  error: float | None

  def text(self, digits: int) -> str:
    error = '' if self.error is None else f' ± {self.error:.{digits}f}'
    return f'{self.mean:.{digits}f}{error}'


@dataclasses.dataclass(frozen=True)
class Row:
  """A set of pictures compared with real ones; None for values that are undefined.

  Attributes:
    pictures: number of pictures.
    real: number of real pictures that they are compared with.
    frechet_distance: the distance of `frechet`.
    precision: the precision of `precision_recall`; None for three pictures or fewer.
    recall: the recall of `precision_recall`; None for three pictures or fewer.
    inception_score: from Inception's logits; None for fewer than 500 pictures.
    alignment: mean cosine of text and picture, with the standard error over captions.
    scores: name of a published score -> its mean, with the standard error over captions.
    frechet_error: standard error of the distance over captions, while the real pictures count as fixed;
      only of generated pictures, and None where a covariance is singular.
  """

  pictures: int
  real: int | None = None
  frechet_distance: float | None = None
  precision: float | None = None
  recall: float | None = None
  inception_score: Estimate | None = None
  alignment: Estimate | None = None
  scores: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
  frechet_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Distribution:
  """All rows over one kind of features.

  Attributes:
    features: description of the features.
    dim: number of features.
    rows: key of ROWS -> row.
    remarks: values that are unreliable or omitted because there are too few pictures.
  """

  features: str
  dim: int
  rows: Mapping[str, Row]
  remarks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Sets:
  """The features to compare.

  Attributes:
    real: features of the real pictures.
    reconstruction: features of the same pictures' reconstructions by the tokenizer.
    generated: features of the generated pictures.
    caption_of: index of the caption of each generated picture.
    picture_of: index of the real picture of each caption.
    texts: the ranker's features of the captions; None without a ranker.
    published: the published scores of these features.
    texts_cut: number of captions that are longer than the ranker's text length.
  """

  real: features_lib.Features
  reconstruction: features_lib.Features
  generated: features_lib.Features
  caption_of: Int[np.ndarray, 'generated']
  picture_of: Int[np.ndarray, 'captions']
  texts: Float32[np.ndarray, 'captions dim'] | None = None
  published: Sequence[features_lib.Published] = ()
  texts_cut: int = 0


def of_pictures(
  extractor: features_lib.Extractor,
  captions: Sequence[str],
  picture_of: Int[np.ndarray, 'captions'],
  real: UInt8[np.ndarray, 'pictures height width 3'],
  reconstruction: UInt8[np.ndarray, 'pictures height width 3'],
  generated: UInt8[np.ndarray, 'captions num_images height width 3'],
  seed: int = 0,
) -> Distribution:
  """Compares pictures that are all in memory.

  Args:
    extractor: computes the features.
    captions: texts.
    picture_of: index of the real picture of each caption.
    real: the real pictures.
    reconstruction: the tokenizer's reconstructions of these.
    generated: the pictures generated for each caption.
    seed: as in `measure`.

  Returns:
    The table.
  """
  count, num_images = generated.shape[:2]
  of_real, of_reconstruction, of_generated = (
    features_lib.extract(extractor, [images])
    for images in (real, reconstruction, generated.reshape(-1, *generated.shape[2:]))
  )
  return measure(
    extractor.name,
    Sets(
      of_real,
      of_reconstruction,
      of_generated,
      caption_of=np.arange(count).repeat(num_images),
      picture_of=picture_of,
      texts=extractor.texts(captions),
      published=extractor.published(captions),
      texts_cut=extractor.cut(captions),
    ),
    seed,
  )


def measure(name: str, sets: Sets, seed: int = 0) -> Distribution:
  """Computes the table for one kind of features.

  Args:
    name: description of the features, for the report.
    sets: the features.
    seed: seed of the halves and of the other pictures' captions.

  Returns:
    The table.
  """
  rng = np.random.default_rng([seed, len(sets.real)])
  real, generated = sets.real, sets.generated
  half, other_half = np.array_split(rng.permutation(len(real)), 2)
  # The first picture generated for each real one, so that both rows of halves have the same number.
  real_of = sets.picture_of[sets.caption_of].tolist()
  first_of = {picture: index for index, picture in reversed(list(enumerate(real_of)))}
  generated_half = np.array(
    [first_of[picture] for picture in other_half.tolist() if picture in first_of], int
  )
  captions = np.arange(len(sets.picture_of))
  rows = {
    'generated': row(sets, generated, sets.caption_of),
    'reconstruction': _row(
      sets.reconstruction,
      real,
      _fit(sets, sets.reconstruction[sets.picture_of], captions),
    ),
    'real': Row(
      len(real),
      inception_score=_inception_score(real),
      **_fit(sets, real[sets.picture_of], captions),
    ),
  }
  if sets.texts is not None and len(np.unique(sets.picture_of)) > 1:
    others = _pictures_of_others(sets.picture_of, rng)
    rows['other_captions'] = Row(len(real), **_fit(sets, real[others], captions))
  if len(half) > precision_recall.NEIGHBORS and len(generated_half) > precision_recall.NEIGHBORS:
    rows['generated_half'] = _row(generated[generated_half], real[half])
    rows['real_half'] = _row(real[other_half], real[half])
  dim = real.values.shape[1]
  num_captions = len(np.unique(sets.caption_of)) if sets.texts is not None else None
  remarks = _remarks(rows, dim, scored=generated.logits is not None)
  if num_captions is not None:
    remarks += _alignment_remarks(num_captions, sets.texts_cut)
  return Distribution(name, dim, rows, remarks)


def fit(
  extractor: features_lib.Extractor,
  generated: features_lib.Features,
  captions: Sequence[str],
) -> Distribution:
  """Measures how well generated pictures fit their captions, without real pictures.

  Args:
    extractor: the features of a ranker.
    generated: features of one generated picture for each caption.
    captions: the captions.

  Returns:
    A table with the row 'generated', which has no distance.
  """
  no_pictures = generated[:0]
  sets = Sets(
    no_pictures,
    no_pictures,
    generated,
    caption_of=np.arange(len(captions)),
    picture_of=np.arange(len(captions)),
    texts=extractor.texts(captions),
    published=extractor.published(captions),
  )
  row = Row(len(generated), **_fit(sets, generated, sets.caption_of))
  remarks = _alignment_remarks(len(captions), extractor.cut(captions))
  return Distribution(extractor.name, generated.values.shape[1], {'generated': row}, remarks)


def row(
  sets: Sets, generated: features_lib.Features, caption_of: Int[np.ndarray, 'generated']
) -> Row:
  """Compares other generated pictures than those of `sets` with its real ones.

  Args:
    sets: the real pictures, and the captions.
    generated: features of generated pictures.
    caption_of: index of the caption of each.

  Returns:
    The row 'generated' that `measure` would give for these pictures.
  """
  found = _row(generated, sets.real, _fit(sets, generated, caption_of))
  error = _distance_error(generated, sets.real, caption_of)
  return dataclasses.replace(found, frechet_error=error)


def row_remarks(row: Row, dim: int) -> list[str]:
  """Returns why the Fréchet distance of a row is unreliable; none if it isn't.

  Args:
    row: a row with real pictures.
    dim: number of features.
  """
  fewest = min(row.pictures, row.real or 0)
  if fewest > dim:
    return []
  return [
    f'Fréchet distance: {fewest:,} pictures are no more than the {dim:,} features, so covariances are '
    'singular and the value is mostly small-sample bias.'
  ]


def _remarks(rows: Mapping[str, Row], dim: int, scored: bool) -> list[str]:
  """Reports values that are unreliable or missing because there are too few pictures.

  Args:
    rows: key of ROWS -> row.
    dim: number of features.
    scored: whether the features have an inception score.

  Returns:
    A sentence for each kind of such values.
  """
  compared = {key: min(row.pictures, row.real) for key, row in rows.items() if row.real is not None}
  found = []

  def add(few: Mapping[str, int], text: str):
    if few:
      counts = ', '.join(f'{ROWS[key]}: {count:,}' for key, count in few.items())
      found.append(f'{text} ({counts}).')

  add(
    {key: count for key, count in compared.items() if 2 <= count <= dim},
    f'Fréchet distance: no more pictures than the {dim:,} features, so covariances are '
    'singular and the value is mostly small-sample bias',
  )
  add(
    {
      key: count
      for key, count in compared.items()
      if precision_recall.NEIGHBORS < count < _FEW_PICTURES
    },
    f'Precision, recall: unreliable for fewer than {_FEW_PICTURES} pictures, since the balls '
    'around them are large',
  )
  add(
    {key: count for key, count in compared.items() if count <= precision_recall.NEIGHBORS},
    'Omitted for too few pictures: precision and recall, and for one also the Fréchet distance',
  )
  if scored:
    add(
      {
        key: row.pictures
        for key, row in rows.items()
        if row.pictures < _SPLITS * _LEAST_OF_A_SPLIT and key != 'other_captions'
      },
      f'Inception score: omitted for fewer than {_SPLITS * _LEAST_OF_A_SPLIT} pictures',
    )
  if 'real_half' not in rows:
    found.append('Halves: omitted, since there are too few pictures.')
  return found


def _alignment_remarks(captions: int, texts_cut: int) -> list[str]:
  """Reports what makes an alignment rough.

  Args:
    captions: number of captions.
    texts_cut: number of them that are longer than the ranker's text length.
  """
  found = []
  if captions < FEW_PROMPTS:
    found.append(
      f'Alignment: over fewer than {FEW_PROMPTS} captions ({captions}) the standard '
      'error is rough, and for one caption it is undefined.'
    )
  if texts_cut:
    found.append(
      'Alignment: the ranker reads only the beginning of captions that are longer than its text length: '
      f'{texts_lib.counted(texts_cut, "caption")}.'
    )
  return found


def _row(
  pictures: features_lib.Features, real: features_lib.Features, fit: Mapping[str, Any] = {}
) -> Row:
  """Compares two sets; `fit` is the result of `_fit`."""
  found = None
  if min(len(pictures), len(real)) > precision_recall.NEIGHBORS:
    found = precision_recall.precision_recall(pictures.values, real.values)
  return Row(
    pictures=len(pictures),
    real=len(real),
    frechet_distance=_distance(pictures, real),
    precision=None if found is None else found.precision,
    recall=None if found is None else found.recall,
    inception_score=_inception_score(pictures),
    **fit,
  )


def _distance(pictures: features_lib.Features, real: features_lib.Features) -> float | None:
  if min(len(pictures), len(real)) < 2:
    return None
  return frechet.frechet_distance(pictures.values, real.values)


def _distance_error(
  pictures: features_lib.Features,
  real: features_lib.Features,
  caption_of: Int[np.ndarray, 'pictures'],
) -> float | None:
  """Returns the standard error of the distance over captions; None if a covariance is singular."""
  if min(len(pictures), len(real)) <= pictures.values.shape[1]:
    return None
  one, other = (frechet.Gaussian.of(found.values) for found in (pictures, real))
  return frechet.standard_error(frechet.Influence(one, other).of(pictures.values), caption_of)


def _inception_score(pictures: features_lib.Features) -> Estimate | None:
  if pictures.logits is None or len(pictures) < _SPLITS * _LEAST_OF_A_SPLIT:
    return None
  scores = inception_score.shuffled(pictures.logits, _SPLITS)
  return Estimate(float(np.mean(scores)), float(np.std(scores)))


def _fit(
  sets: Sets, pictures: features_lib.Features, caption_of: Int[np.ndarray, 'pictures']
) -> dict[str, Any]:
  """Returns the fields of Row that say how well pictures fit their captions."""
  count = len(sets.picture_of)
  scores = {
    score.name: _over_captions(score.of(pictures.values, texts[caption_of]), caption_of, count)
    for score, texts in sets.published
  }
  return {'alignment': _alignment(pictures, sets.texts, caption_of), 'scores': scores}


def _alignment(
  pictures: features_lib.Features,
  texts: Float32[np.ndarray, 'captions dim'] | None,
  caption_of: Int[np.ndarray, 'pictures'],
) -> Estimate | None:
  """Returns the mean cosine of pictures and their captions, and its error over captions."""
  if texts is None:
    return None
  own = texts[caption_of]
  norms = np.linalg.norm(pictures.values, axis=1) * np.linalg.norm(own, axis=1)
  cosines = np.einsum('pd,pd->p', pictures.values, own) / norms
  return _over_captions(cosines, caption_of, len(texts))


def _over_captions(
  values: Float[np.ndarray, 'pictures'], caption_of: Int[np.ndarray, 'pictures'], captions: int
) -> Estimate:
  """Returns the mean of pictures' values, and its error over captions."""
  counts = np.bincount(caption_of, minlength=captions)
  of_caption = (np.bincount(caption_of, values, captions) / counts.clip(min=1))[counts > 0]
  error = float(of_caption.std(ddof=1) / len(of_caption) ** 0.5) if len(of_caption) > 1 else None
  return Estimate(float(values.mean()), error)


def _pictures_of_others(
  picture_of: Int[np.ndarray, 'captions'], rng: np.random.Generator
) -> Int[np.ndarray, 'captions']:
  """Returns for each caption the index of a random picture that isn't its own."""
  turned = rng.permutation(np.unique(picture_of)).tolist()
  # Each picture's neighbor in a ring is a different one (unless there is only one picture).
  neighbor = dict(zip(turned, [*turned[1:], turned[0]]))
  return np.array([neighbor[picture] for picture in picture_of.tolist()])
