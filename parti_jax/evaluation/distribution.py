"""Generated pictures as a set, beside real ones: Fréchet distance, precision, recall, alignment.

Each row compares a set of pictures with a set of real ones:

* generated, reconstruction: the drawn pictures, and the real ones through the tokenizer (what no
  generator over its tokens can beat), with all real pictures;
* generated_half, real_half: one drawn picture for each caption of one half of the real pictures,
  and that half itself, with the other half. The Fréchet distance grows where pictures are few, so
  real_half is what perfect pictures would get, and generated_half is to be held against it.

Alignment is the mean cosine of a ranker's features of text and picture (as CLIP's score, Hessel et
al. 2021, arXiv 2104.08718, without its factor and its cut at 0), beside that of the real pictures
and that of real pictures with the captions of others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from parti_jax.evaluation import features as features_lib
from parti_jax.evaluation import frechet
from parti_jax.evaluation import precision_recall

ROWS = {
    'generated': 'generated',
    'reconstruction': 'real pictures through the tokenizer',
    'real': 'real pictures',
    'other_captions': 'real pictures, captions of others',
    'generated_half': 'generated for one half, against the other',
    'real_half': 'real pictures of one half, against the other',
}

# Parts of the pictures over which the inception score is taken, as Salimans et al. did.
_SPLITS = 10


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean and its standard error (of the inception score: deviation over the splits)."""
  mean: float
  error: float | None

  def text(self, digits: int) -> str:
    error = '' if self.error is None else f' ± {self.error:.{digits}f}'
    return f'{self.mean:.{digits}f}{error}'


@dataclasses.dataclass(frozen=True)
class Row:
  """A set of pictures against real ones; None where a value has no meaning.

  Attributes:
    pictures: how many they are.
    real: how many real ones they are compared with.
    frechet_distance: see `frechet`.
    precision: see `precision_recall`; None of sets of three pictures or fewer.
    recall: as above.
    inception_score: over Inception's logits.
    alignment: mean cosine of text and picture, with the standard error over captions.
  """
  pictures: int
  real: int | None = None
  frechet_distance: float | None = None
  precision: float | None = None
  recall: float | None = None
  inception_score: Estimate | None = None
  alignment: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Distribution:
  """All rows over one kind of features.

  Attributes:
    features: what they are, in words.
    dim: their number.
    rows: key of ROWS -> row.
  """
  features: str
  dim: int
  rows: Mapping[str, Row]


@dataclasses.dataclass(frozen=True)
class Sets:
  """The features that are compared.

  Attributes:
    real: of [pictures].
    reconstruction: of the same, through the tokenizer.
    generated: of [generated].
    caption_of: int [generated], the caption that a picture was drawn for.
    picture_of: int [captions], the real picture that has a caption.
    texts: float32 [captions, dim], the ranker's features of captions; None without a ranker.
  """
  real: features_lib.Features
  reconstruction: features_lib.Features
  generated: features_lib.Features
  caption_of: np.ndarray
  picture_of: np.ndarray
  texts: np.ndarray | None = None


def of_pictures(extractor, captions: Sequence[str], picture_of: np.ndarray, real: np.ndarray,
                reconstruction: np.ndarray, generated: np.ndarray, seed: int = 0) -> Distribution:
  """Measures pictures that are all in memory.

  Args:
    extractor: see `features.Extractor`.
    captions: texts.
    picture_of: int [captions], the real picture of each.
    real: uint8 [pictures, height, width, 3].
    reconstruction: uint8, the same shape.
    generated: uint8 [captions, num_images, height, width, 3].
    seed: see `measure`.

  Returns:
    The table.
  """
  count, num_images = generated.shape[:2]
  sets = [features_lib.extract(extractor, [images]) for images in
          (real, reconstruction, generated.reshape(-1, *generated.shape[2:]))]
  return measure(extractor.name, Sets(
      *sets, caption_of=np.arange(count).repeat(num_images), picture_of=picture_of,
      texts=extractor.texts(captions)), seed)


def measure(name: str, sets: Sets, seed: int = 0) -> Distribution:
  """Fills the table of one kind of features.

  Args:
    name: of the features, for the report.
    sets: the features.
    seed: of the halves and of the captions of others.

  Returns:
    The table.
  """
  rng = np.random.default_rng([seed, len(sets.real)])
  real, generated = sets.real, sets.generated
  half, other_half = np.array_split(rng.permutation(len(real)), 2)
  # The first picture drawn for each real one: both rows of halves have the same number.
  drawn_for = sets.picture_of[sets.caption_of].tolist()
  drawn = {picture: index for index, picture in reversed(list(enumerate(drawn_for)))}
  drawn_half = np.array([drawn[picture] for picture in other_half.tolist() if picture in drawn],
                        int)
  every = np.arange(len(sets.picture_of))
  rows = {
      'generated': _row(generated, real, _alignment(generated, sets.texts, sets.caption_of)),
      'reconstruction': _row(sets.reconstruction, real, _alignment(
          sets.reconstruction[sets.picture_of], sets.texts, every)),
      'real': Row(len(real), inception_score=_inception_score(real),
                  alignment=_alignment(real[sets.picture_of], sets.texts, every)),
  }
  if sets.texts is not None:
    others = _pictures_of_others(sets.picture_of, rng)
    rows['other_captions'] = Row(
        len(real), alignment=_alignment(real[others], sets.texts, every))
  if len(half) > precision_recall.NEIGHBOURS and len(drawn_half) > precision_recall.NEIGHBOURS:
    rows['generated_half'] = _row(generated[drawn_half], real[half])
    rows['real_half'] = _row(real[other_half], real[half])
  return Distribution(name, real.values.shape[1], rows)


def _row(pictures: features_lib.Features, real: features_lib.Features,
         alignment: Estimate | None = None) -> Row:
  """Compares two sets."""
  found = None
  if min(len(pictures), len(real)) > precision_recall.NEIGHBOURS:
    found = precision_recall.precision_recall(pictures.values, real.values)
  return Row(
      pictures=len(pictures), real=len(real), frechet_distance=_distance(pictures, real),
      precision=found and found.precision, recall=found and found.recall,
      inception_score=_inception_score(pictures), alignment=alignment)


def _distance(pictures: features_lib.Features, real: features_lib.Features) -> float | None:
  """Returns the Fréchet distance; over Inception's features as torch-fidelity computes it."""
  if min(len(pictures), len(real)) < 2:
    return None
  if pictures.logits is None:
    return frechet.frechet_distance(pictures.values, real.values)
  import torch  # pylint: disable=import-outside-toplevel
  from torch_fidelity import metric_fid  # pylint: disable=import-outside-toplevel
  statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(part.values))
                for part in (pictures, real)]
  return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[
      metric_fid.KEY_METRIC_FID]


def _inception_score(pictures: features_lib.Features) -> Estimate | None:
  """Returns exp of the mean KL divergence of p(class | picture) from p(class), by torch-fidelity.

  Salimans et al. 2016, arXiv 1606.03498, section 4.
  """
  if pictures.logits is None or len(pictures) < _SPLITS:
    return None
  import torch  # pylint: disable=import-outside-toplevel
  from torch_fidelity import metric_isc  # pylint: disable=import-outside-toplevel
  score = metric_isc.isc_features_to_metric(torch.from_numpy(pictures.logits), splits=_SPLITS)
  return Estimate(score[metric_isc.KEY_METRIC_ISC_MEAN], score[metric_isc.KEY_METRIC_ISC_STD])


def _alignment(pictures: features_lib.Features, texts: np.ndarray | None,
               caption_of: np.ndarray) -> Estimate | None:
  """Returns the mean cosine of pictures and their captions, and its error over captions."""
  if texts is None:
    return None
  own = texts[caption_of]
  norms = np.linalg.norm(pictures.values, axis=1) * np.linalg.norm(own, axis=1)
  cosines = np.einsum('pd,pd->p', pictures.values, own) / norms
  drawn = np.bincount(caption_of, minlength=len(texts))
  of_caption = (np.bincount(caption_of, cosines, len(texts)) / drawn.clip(min=1))[drawn > 0]
  error = float(of_caption.std(ddof=1) / len(of_caption)**0.5) if len(of_caption) > 1 else None
  return Estimate(float(cosines.mean()), error)


def _pictures_of_others(picture_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns for each caption a random picture that isn't its own: int [captions]."""
  turned = rng.permutation(np.unique(picture_of)).tolist()
  # In a ring each picture's neighbour is another one (but for a picture that is alone).
  neighbour = dict(zip(turned, [*turned[1:], turned[0]]))
  return np.array([neighbour[picture] for picture in picture_of.tolist()])
