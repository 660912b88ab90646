"""Draws the same number of pictures for each class, as class-conditional models are evaluated.

The protocol of ImageNet: 50 pictures for each of 1,000 classes, of which evaluators compute the FID, its
spatial form, the inception score, precision and recall. Published samplers draw random classes or 50 of
each; the same number of each has less variance. Pictures take turns through the classes, so that the
first pictures of a run are balanced as well.

With a ranker, the report has the alignment of pictures with the texts of their classes, and how often
the ranker would choose the right text among those of all classes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.core import texts as texts_lib
from parti_jax.evaluation import tables
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.datasets import sample_files
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features as features_lib

FORMS = ('npz', 'png')
NPZ_FILE, PNG_FOLDER = 'samples.npz', 'samples'
# Classes on the contact sheet.
_SHOWN = 40
_TOP = 5


@dataclasses.dataclass(frozen=True)
class Recognized:
  """What a ranker recognizes in the pictures.

  Attributes:
    ranker: description of the ranker.
    alignment: mean cosine of pictures and the texts of their classes, with the error over classes.
    top1: share of pictures whose class has the most similar text of all classes.
    top5: share of pictures whose class is among the five of the most similar texts.
  """

  ranker: str
  alignment: distribution.Estimate
  top1: distribution.Estimate
  top5: distribution.Estimate


@dataclasses.dataclass(frozen=True)
class Report:
  """What was drawn, and how.

  Attributes:
    classes: number of classes.
    per_class: pictures of each class.
    samples: number of pictures.
    texts: digest of the texts of the classes.
    label: what the text of a class is, as in `class_names.Classes.texts`.
    template: text around a name.
    num_images: pictures drawn for each one that is kept; the ranker keeps the best.
    model_image_size: height and width of the generated pictures, in pixels.
    sample_size: height and width of the samples, in pixels.
    resize: how they were resized; None if they weren't.
    seed: seed of the pictures.
    sampling: settings that override the model's own.
    texts_cut: pictures whose text was cut to the model's text length.
    sha256: digest of the samples' pixels; None without an .npz.
    recognized: what the ranker recognizes; None without a ranker, or if classes have no names.
  """

  classes: int
  per_class: int
  samples: int
  texts: str
  label: str
  template: str
  num_images: int
  model_image_size: int
  sample_size: int
  resize: str | None
  seed: int
  sampling: Mapping[str, object]
  texts_cut: int
  sha256: str | None
  recognized: Recognized | None

  def notes(self) -> list[str]:
    """Returns explanations."""
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    resized = f', resized to {self.sample_size} ({self.resize})' if self.resize else ''
    lines = [
      f'{self.samples:,} pictures, {self.per_class} of each of {self.classes:,} classes, generated at '
      f'{self.model_image_size} pixels{resized}, seed {self.seed}, sampling: '
      f'{settings or "as the model is configured"}.'
    ]
    if self.num_images > 1:
      lines.append(
        f"Each is the ranker's best of {self.num_images}, an acceptance rate of "
        f'{1 / self.num_images:.3g}; what the same ranker recognizes in them is optimistic.'
      )
    if self.texts_cut:
      lines.append(
        f"With a text cut to the model's text length: {texts_lib.counted(self.texts_cut, 'picture')}."
      )
    if self.recognized is not None:
      lines.append(
        f'Alignment: mean cosine with the text of the class, by the {self.recognized.ranker}; top 1, top '
        '5: its own class has the most similar text of all, or is among five. ± is the standard error '
        'over classes.'
      )
    return lines

  def cells(self) -> list[list[str]]:
    """Returns a header and a line."""
    found = self.recognized
    if found is None:
      return [['classes', 'pictures'], [f'{self.classes:,}', f'{self.samples:,}']]
    shares = [
      distribution.Estimate(100 * share.mean, None if share.error is None else 100 * share.error)
      for share in (found.top1, found.top5)
    ]
    return [
      ['classes', 'pictures', 'alignment', 'top 1', 'top 5'],
      [
        f'{self.classes:,}',
        f'{self.samples:,}',
        found.alignment.text(3),
        *(share.text(1) for share in shares),
      ],
    ]

  def text(self) -> str:
    """Renders the report for a terminal."""
    return '\n'.join([tables.text(self.cells()), '', *self.notes()]) + '\n'

  def markdown(self) -> str:
    """Renders the report in Markdown."""
    return (
      '\n\n'.join(['# Samples of classes', tables.markdown(self.cells()), *self.notes()]) + '\n'
    )

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )


@dataclasses.dataclass(frozen=True)
class Shown:
  """The first picture of some classes, for a contact sheet."""

  texts: Sequence[str]
  images: UInt8[np.ndarray, 'classes height width 3']


def draw(
  model,
  texts: Sequence[str],
  per_class: int,
  folder: pathlib.Path,
  *,
  label: str = 'name',
  template: str = '{}',
  forms: Sequence[str] = ('npz',),
  sample_size: int | None = None,
  num_images: int = 1,
  seed: int = 0,
  texts_digest: str = '',
  names: Sequence[str] | None = None,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> tuple[Report, Shown]:
  """Generates the pictures that the folder doesn't have yet, and writes all of them.

  Args:
    model: the result of `parti_jax.load`.
    texts: the text of each class.
    per_class: pictures of each class.
    folder: the output folder; another run may continue there.
    label: what the texts are, for the report: 'name' or 'id'.
    template: text around the names, for the report.
    forms: any of `FORMS`.
    sample_size: height and width to resize to (bicubic, with antialiasing); None for the model's.
    num_images: pictures drawn for each one; with several, the model's ranker keeps the best.
    seed: seed of the pictures. Each has its own noise.
    texts_digest: digest of the texts, for the report.
    names: texts of the classes for the ranker; None if there are none.
    progress: whether to show bars on a terminal.
    batch_size: pictures generated at once.
    **sampling: fields of SamplingSettings.

  Returns:
    The report, and some pictures for a contact sheet.

  Raises:
    UserError: the model's pictures aren't square, a ranker is needed but missing, the disk is too
      small, or a shard is damaged.
  """
  count = len(texts) * per_class
  own_size = image_sizes.square(model.image_size, 'samples of classes are')
  size = sample_size or own_size
  if 'npz' in forms and not (folder / NPZ_FILE).exists():
    sample_files.check_space(folder, sample_files.npz_bytes(count, size))
  labels = np.tile(np.arange(len(texts), dtype=np.int64), per_class)
  captions = [text for _ in range(per_class) for text in texts]
  shards = picture_shards.PictureShards(folder / 'generated', captions)
  shards.draw(model, num_images, progress, seed=seed, batch_size=batch_size, **sampling)
  digest = None
  if 'npz' in forms:
    digest = sample_files.write_npz(
      folder / NPZ_FILE, _resized(shards.batches(), size), labels, size
    )
  if 'png' in forms:
    sample_files.write_pngs(folder / PNG_FOLDER, _resized(shards.batches(), size))
  report = Report(
    classes=len(texts),
    per_class=per_class,
    samples=count,
    texts=texts_digest,
    label=label,
    template=template,
    num_images=num_images,
    model_image_size=own_size,
    sample_size=size,
    resize=None if size == own_size else 'bicubic with antialiasing, by Pillow',
    seed=seed,
    sampling=sampling,
    texts_cut=shards.captions_cut(),
    sha256=digest,
    recognized=None if names is None else _recognized(model, names, per_class, shards),
  )
  first = next(shards.batches())[: min(_SHOWN, len(texts))]
  return report, Shown(list(texts[: len(first)]), first)


def _resized(
  batches: Iterator[UInt8[np.ndarray, 'batch height width 3']], size: int
) -> Iterator[UInt8[np.ndarray, 'batch size size 3']]:
  for batch in batches:
    yield features_lib.resized(batch, size)


def _recognized(
  model, texts: Sequence[str], per_class: int, shards: picture_shards.PictureShards
) -> Recognized | None:
  """Returns what the model's ranker recognizes; None without a ranker."""
  if model.ranker is None:
    return None
  extractor = features_lib.RankerFeatures(model.ranker, model.model_name)
  of_texts = _unit(extractor.texts(texts))
  start, cosines, ranks = 0, [], []
  for batch in shards.batches():
    of_pictures = _unit(features_lib.extract(extractor, [batch]).values)
    similar = of_pictures @ of_texts.T
    own = similar[np.arange(len(batch)), (start + np.arange(len(batch))) % len(texts), None]
    cosines.append(own[:, 0])
    # Of equal texts, all others are counted as more similar, so that chance never helps.
    ranks.append((similar >= own).sum(axis=1) - 1)
    start += len(batch)
  shape = (per_class, len(texts))
  rank = np.concatenate(ranks).reshape(shape)
  return Recognized(
    extractor.name,
    _over_classes(np.concatenate(cosines).reshape(shape)),
    _over_classes(rank < 1),
    _over_classes(rank < _TOP),
  )


def _unit(values: Float32[np.ndarray, 'rows dim']) -> Float32[np.ndarray, 'rows dim']:
  return values / np.linalg.norm(values, axis=1, keepdims=True)


def _over_classes(
  values: Float32[np.ndarray, 'per_class classes'] | Bool[np.ndarray, 'per_class classes'],
) -> distribution.Estimate:
  """Returns the mean and its standard error over classes."""
  of_class = values.mean(axis=0, dtype=np.float64)
  count = len(of_class)
  error = float(of_class.std(ddof=1) / count**0.5) if count > 1 else None
  return distribution.Estimate(float(of_class.mean()), error)
