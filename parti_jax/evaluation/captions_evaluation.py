"""Evaluates a model on captions of real pictures: MS-COCO, Localized Narratives.

It generates one picture for each caption (or several, of which the ranker keeps the best; Parti
uses 16), and compares them as a set with the real pictures of those captions, cropped to their
central square. Only features are held in memory for all pictures.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import tqdm
from jaxtyping import Bool
from jaxtyping import Int
from jaxtyping import UInt8

from parti_jax.core import texts
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.evaluation import distribution_report
from parti_jax.evaluation.datasets import captioned_pictures
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features as features_lib

# Real pictures decoded and processed by networks at once.
_BATCH = 64
# Captions on the contact sheet: the first ones, all in the first shard.
_SHOWN = 40
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Report:
  """The numbers of an evaluation on captions.

  Attributes:
    dataset: name of the data set.
    captions: number of captions compared.
    captions_available: number of captions in the data set.
    pictures: number of real pictures with these captions; None if a reference is in their place.
    skipped: reason -> captions skipped.
    captions_cut: captions longer than the model's text length.
    num_images: pictures generated for each caption; the ranker's best of them is compared.
    model_image_size: height and width of the generated pictures, in pixels.
    seed: seed of the choice of captions and of the pictures.
    sampling: settings that override the model's own.
    distributions: a table for each kind of features.
  """

  dataset: str
  captions: int
  captions_available: int
  pictures: int | None
  skipped: Mapping[str, int]
  captions_cut: int
  num_images: int
  model_image_size: int
  seed: int
  sampling: Mapping[str, object]
  distributions: Sequence[distribution.Distribution]

  def notes(self) -> list[str]:
    """Returns explanations of the tables."""
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    best = (
      f"the ranker's best of {self.num_images} pictures" if self.num_images > 1 else 'one picture'
    )
    of_pictures = '' if self.pictures is None else f', of {texts.counted(self.pictures, "picture")}'
    lines = [
      f'{self.captions:,} of {self.captions_available:,} captions of {self.dataset}'
      f'{of_pictures}; {best} for each, generated at '
      f'{self.model_image_size}x{self.model_image_size} pixels, seed {self.seed}, '
      f'sampling: {settings or "as the model is configured"}.'
    ]
    if self.num_images > 1:
      lines.append(
        'The alignment of generated pictures is measured by the ranker that chose them, '
        'and is therefore optimistic.'
      )
    lines += skipped_remarks(self.skipped)
    if self.captions_cut:
      lines.append(
        f"Cut to the model's text length: {texts.counted(self.captions_cut, 'caption')}."
      )
    return [*lines, *distribution_report.notes(self.distributions)]

  def text(self) -> str:
    """Renders tables for a terminal."""
    return (
      '\n\n'.join([*map(distribution_report.text, self.distributions), '\n'.join(self.notes())])
      + '\n'
    )

  def markdown(self) -> str:
    """Renders tables in Markdown."""
    return (
      '\n\n'.join(
        [
          f'# Evaluation on {self.dataset}',
          *map(distribution_report.markdown, self.distributions),
          *self.notes(),
        ]
      )
      + '\n'
    )

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )


def skipped_remarks(skipped: Mapping[str, int]) -> list[str]:
  """Returns a sentence on captions that were left out, {reason: number}; none without such captions."""
  reasons = ', '.join(
    f'{texts.counted(count, "caption")} ({reason})' for reason, count in skipped.items()
  )
  return [f'Skipped: {reasons}.'] if skipped else []


@dataclasses.dataclass(frozen=True)
class Shown:
  """Pictures of a contact sheet, all of one size; `real` is None if a reference is in their place."""

  captions: Sequence[str]
  real: UInt8[np.ndarray, 'captions height width 3'] | None
  generated: UInt8[np.ndarray, 'captions height width 3']

  @property
  def columns(self) -> list[UInt8[np.ndarray, 'captions height width 3']]:
    """The real pictures, if there are any, and the generated ones."""
    return [self.generated] if self.real is None else [self.real, self.generated]


def evaluate(
  model,
  captioned: captioned_pictures.Captioned,
  extractors: Sequence[features_lib.Extractor],
  folder: pathlib.Path,
  num_images: int = 1,
  seed: int = 0,
  progress: bool = False,
  batch_size: int | None = None,
  real: Callable[[], RealPictures] | None = None,
  **sampling,
) -> tuple[Report, Shown]:
  """Generates the pictures that `folder` doesn't have yet, and compares all of them.

  Args:
    model: the result of `parti_jax.load`.
    captioned: the captions and their pictures.
    extractors: at least one extractor from `features.of_flags`.
    folder: stores the generated pictures; another run may continue there.
    num_images: pictures for each caption; with several, the model's ranker keeps the best.
    seed: seed of the pictures.
    progress: whether to show bars on a terminal.
    batch_size: pictures generated at once.
    real: returns the features of the real pictures, if several evaluations share them.
    **sampling: fields of SamplingSettings.

  Returns:
    The report, and some pictures for a contact sheet.

  Raises:
    UserError: a ranker is needed but missing, no real picture can be decoded, or a shard is
      damaged.
  """
  sampling = {name: value for name, value in sampling.items() if value is not None}
  shards = generated(folder, captioned)
  shards.draw(model, num_images, progress, seed=seed, batch_size=batch_size, **sampling)
  found = RealPictures(model, captioned, extractors, progress) if real is None else real()
  kept, picture_of = found.usable(captioned)
  captions = [caption for caption, keep in zip(captioned.captions, kept) if keep]
  tables = []
  for extractor, (of_real, of_reconstruction) in zip(extractors, found.features):
    of_generated = features_lib.extract(
      extractor, _bar(shards.batches(), 'generated pictures', progress, len(captioned.captions))
    )
    tables.append(
      distribution.measure(
        extractor.name,
        distribution.Sets(
          of_real,
          of_reconstruction,
          of_generated[np.flatnonzero(kept)],
          caption_of=np.arange(len(captions)),
          picture_of=picture_of,
          texts=extractor.texts(captions),
          published=extractor.published(captions),
          texts_cut=extractor.cut(captions),
        ),
        seed,
      )
    )
  report = Report(
    dataset=captioned.name,
    captions=len(captions),
    captions_available=captioned.available,
    pictures=sum(not reason for reason in found.reasons),
    skipped=found.skipped(captioned),
    captions_cut=shards.captions_cut(),
    num_images=num_images,
    model_image_size=model.image_size,
    seed=seed,
    sampling=sampling,
    distributions=tables,
  )
  return report, _shown(captioned, kept, shards, found.shown)


def draw(
  model,
  captioned: captioned_pictures.Captioned,
  folder: pathlib.Path,
  num_images: int = 1,
  seed: int = 0,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> tuple[Report, Shown]:
  """Generates the pictures that `folder` doesn't have yet, to be compared with a reference.

  Args:
    model: as in `evaluate`.
    captioned: the captions, of which the pictures are not read.
    folder: as in `evaluate`.
    num_images: as in `evaluate`.
    seed: as in `evaluate`.
    progress: as in `evaluate`.
    batch_size: as in `evaluate`.
    **sampling: as in `evaluate`.

  Returns:
    The report, whose only table is the alignment by the model's ranker, if it has one; and some
    pictures for a contact sheet.

  Raises:
    UserError: a ranker is needed but missing, or a shard is damaged.
  """
  sampling = {name: value for name, value in sampling.items() if value is not None}
  shards = generated(folder, captioned)
  shards.draw(model, num_images, progress, seed=seed, batch_size=batch_size, **sampling)
  tables = []
  if model.ranker is not None:
    ranker = features_lib.RankerFeatures(model.ranker, model.model_name)
    bar = _bar(shards.batches(), 'generated pictures', progress, len(captioned.captions))
    tables.append(distribution.fit(ranker, features_lib.extract(ranker, bar), captioned.captions))
  report = Report(
    dataset=captioned.name,
    captions=len(captioned.captions),
    captions_available=captioned.available,
    pictures=None,
    skipped=captioned.skipped,
    captions_cut=shards.captions_cut(),
    num_images=num_images,
    model_image_size=model.image_size,
    seed=seed,
    sampling=sampling,
    distributions=tables,
  )
  first = next(shards.batches())[:_SHOWN]
  return report, Shown(captioned.captions[: len(first)], None, first)


def generated(
  folder: pathlib.Path, captioned: captioned_pictures.Captioned
) -> picture_shards.PictureShards:
  """Returns the generated pictures in an output folder."""
  return picture_shards.PictureShards(folder / 'generated', captioned.captions)


class RealPictures:
  """Features of the usable real pictures, and why the others can't be used.

  Args:
    model: the result of `parti_jax.load`.
    captioned: the captions and their pictures.
    extractors: the networks.
    progress: whether to show a bar on a terminal.

  Raises:
    UserError: no picture can be used.

  Attributes:
    reasons: for each picture the reason why it can't be used, or ''.
    features: for each extractor, features of the pictures and of their reconstructions.
    digests: size -> SHA-256 of the pixels of the usable pictures in that size.
    shown: index -> picture, of the first extractor's size, for some.
  """

  def __init__(
    self,
    model,
    captioned: captioned_pictures.Captioned,
    extractors: Sequence[features_lib.Extractor],
    progress: bool = False,
  ):
    shown = captioned.picture_of[:_SHOWN].tolist()
    sizes = list(
      dict.fromkeys([*(extractor.image_size for extractor in extractors), model.image_size])
    )
    self.reasons: list[str] = []
    self.shown: dict[int, UInt8[np.ndarray, 'size size 3']] = {}
    parts: list[tuple[list[features_lib.Features], list[features_lib.Features]]] = [
      ([], []) for _ in extractors
    ]
    digests = {size: hashlib.sha256() for size in sizes}
    for images in _decoded(captioned.pictures, sizes, self.reasons, progress):
      for size, digest in digests.items():
        digest.update(images[size].tobytes())
      usable = [index for index, reason in enumerate(self.reasons) if not reason]
      for index, image in zip(usable[-len(images[sizes[0]]) :], images[sizes[0]]):
        if index in shown:
          self.shown[index] = image
      reconstruction = model.reconstruct(images[model.image_size])
      for extractor, (real, through) in zip(extractors, parts):
        real.append(features_lib.extract(extractor, [images[extractor.image_size]]))
        through.append(features_lib.extract(extractor, [reconstruction]))
    if all(self.reasons):
      raise UserError(
        f'--pictures: none of {len(self.reasons):,} pictures can be used '
        f'(the first: {self.reasons[0]})'
      )
    self.digests = {size: digest.hexdigest() for size, digest in digests.items()}
    self.features = [
      (features_lib.concatenated(real), features_lib.concatenated(through))
      for real, through in parts
    ]

  def skipped(self, captioned: captioned_pictures.Captioned) -> dict[str, int]:
    """Returns {reason: number} of captions that are left out, also those of damaged pictures."""
    reasons = (self.reasons[picture] for picture in captioned.picture_of)
    return {**captioned.skipped, **collections.Counter(filter(None, reasons))}

  def usable(
    self, captioned: captioned_pictures.Captioned
  ) -> tuple[Bool[np.ndarray, 'captions'], Int[np.ndarray, 'kept']]:
    """Returns which captions have a usable picture, and the index of that among `features`."""
    kept = np.array([not self.reasons[picture] for picture in captioned.picture_of])
    index_of = np.cumsum([not reason for reason in self.reasons]) - 1
    return kept, index_of[captioned.picture_of[kept]]


def _decoded(
  pictures: captioned_pictures.Pictures, sizes: Sequence[int], reasons: list[str], progress: bool
) -> Iterator[dict[int, UInt8[np.ndarray, 'batch size size 3']]]:
  """Yields batches of pictures in each size, {size: pictures}; appends to `reasons`."""

  def decode(data):
    try:
      return {size: image_decoding.decode(data, size) for size in sizes}
    except image_decoding.UndecodablePicture as error:
      return str(error)

  encoded = _bar(pictures.encoded(), 'real pictures', progress, len(pictures))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    while batch := [data for _, data in zip(range(_BATCH), encoded)]:
      found = list(pool.map(decode, batch))
      reasons += [one if isinstance(one, str) else '' for one in found]
      usable = [one for one in found if not isinstance(one, str)]
      if usable:
        yield {size: np.stack([one[size] for one in usable]) for size in sizes}


def _bar(items, description: str, progress: bool, pictures: int):
  """Yields items (pictures, or arrays of pictures) and shows the progress."""
  with tqdm.tqdm(
    total=pictures,
    desc=description,
    unit='picture',
    disable=None if progress else True,
    file=sys.stderr,
  ) as bar:
    for item in items:
      yield item
      bar.update(len(item) if isinstance(item, np.ndarray) else 1)


def _shown(
  captioned: captioned_pictures.Captioned,
  kept: Bool[np.ndarray, 'captions'],
  shards: picture_shards.PictureShards,
  real: Mapping[int, UInt8[np.ndarray, 'size size 3']],
) -> Shown:
  """Returns the first captions and their pictures."""
  first = next(shards.batches())[:_SHOWN]
  chosen = np.flatnonzero(kept[: len(first)])
  pictures = [real[index] for index in captioned.picture_of[chosen].tolist()]
  generated = first[chosen]
  if not pictures:  # The first ones are all damaged.
    return Shown([], generated, generated)
  return Shown(
    [captioned.captions[index] for index in chosen.tolist()],
    np.stack(pictures),
    features_lib.resized(generated, pictures[0].shape[0]),
  )
