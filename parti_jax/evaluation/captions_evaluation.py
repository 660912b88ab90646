"""Evaluates a model on captions of real pictures: MS-COCO, Localized Narratives.

One picture is drawn for each caption (or several, and the ranker's best is kept, as Parti does with
16); they are compared as sets with the real pictures of those captions, cropped to their central
square. Nothing but features is held in memory for all pictures.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import tqdm

from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.evaluation import distribution_report
from parti_jax.evaluation.datasets import captioned_pictures
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features as features_lib

# Real pictures that are decoded and go through networks at once.
_BATCH = 64
# Captions on the contact sheet: the first ones, which are in the first shard.
_SHOWN = 40
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Report:
  """The numbers of an evaluation on captions.

  Attributes:
    dataset: its name.
    captions: how many captions are compared.
    captions_available: how many the data set has.
    pictures: how many real pictures these captions have.
    skipped: reason -> captions that were left out.
    captions_cut: captions that were longer than the model's text length.
    num_images: pictures drawn for each caption; of several the ranker's best is compared.
    model_image_size: height and width of the drawn pictures, in pixels.
    seed: of the choice of captions and of the pictures.
    sampling: settings that were given in place of the model's own.
    distributions: a table for each kind of features.
  """

  dataset: str
  captions: int
  captions_available: int
  pictures: int
  skipped: Mapping[str, int]
  captions_cut: int
  num_images: int
  model_image_size: int
  seed: int
  sampling: Mapping[str, object]
  distributions: Sequence[distribution.Distribution]

  def notes(self) -> list[str]:
    """Returns what a reader needs to know beside the tables."""
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    best = (
      f"the ranker's best of {self.num_images} pictures" if self.num_images > 1 else 'one picture'
    )
    lines = [
      f'{self.captions:,} of {self.captions_available:,} captions of {self.dataset}, of '
      f'{self.pictures:,} pictures; {best} for each, drawn at '
      f'{self.model_image_size}x{self.model_image_size} pixels, seed {self.seed}, '
      f'sampling: {settings or "as the model is configured"}.'
    ]
    if self.num_images > 1:
      lines.append(
        'The alignment of generated pictures is measured by the ranker that chose them, '
        'and so flatters them.'
      )
    if self.skipped:
      lines.append(
        'Left out: '
        + ', '.join(f'{count:,} captions ({reason})' for reason, count in self.skipped.items())
        + '.'
      )
    if self.captions_cut:
      lines.append(f"{self.captions_cut:,} captions were longer than the model's text, and cut.")
    return [*lines, distribution_report.NOTE]

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
    """Renders every number, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )


@dataclasses.dataclass(frozen=True)
class Shown:
  """What a contact sheet shows: uint8 [captions, height, width, 3] twice, of one size."""

  captions: Sequence[str]
  real: np.ndarray
  generated: np.ndarray


def evaluate(
  pipeline,
  captioned: captioned_pictures.Captioned,
  extractors: Sequence,
  folder: pathlib.Path,
  num_images: int = 1,
  seed: int = 0,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> tuple[Report, Shown]:
  """Draws what `folder` does not hold yet, and compares.

  Args:
    pipeline: as `parti_jax.load` gives it.
    captioned: the captions and their pictures.
    extractors: see `features.of_flags`; one at least.
    folder: keeps the drawn pictures; another run may go on there.
    num_images: pictures for each caption; with several, the model's ranker keeps the best.
    seed: of the pictures.
    progress: show bars on a terminal.
    batch_size: pictures drawn at once.
    **sampling: fields of SamplingSettings.

  Returns:
    The report, and some pictures to look at.

  Raises:
    UserError: no ranker where one is needed, no real picture can be decoded, or damaged shards.
  """
  sampling = {name: value for name, value in sampling.items() if value is not None}
  shards = picture_shards.PictureShards(folder / 'generated', captioned.captions)
  shards.draw(pipeline, num_images, progress, seed=seed, batch_size=batch_size, **sampling)
  real = _RealPictures(
    pipeline, captioned.pictures, extractors, progress, shown=captioned.picture_of[:_SHOWN].tolist()
  )
  damaged = collections.Counter(
    reason for reason in (real.reasons[picture] for picture in captioned.picture_of) if reason
  )
  kept = np.array([not real.reasons[picture] for picture in captioned.picture_of])
  place = np.cumsum([not reason for reason in real.reasons]) - 1
  picture_of = place[captioned.picture_of[kept]]
  captions = [caption for caption, keep in zip(captioned.captions, kept) if keep]
  tables = []
  for extractor, (of_real, of_reconstruction) in zip(extractors, real.features):
    generated = features_lib.extract(
      extractor, _bar(shards.batches(), 'generated pictures', progress, len(captioned.captions))
    )
    tables.append(
      distribution.measure(
        extractor.name,
        distribution.Sets(
          of_real,
          of_reconstruction,
          generated[np.flatnonzero(kept)],
          caption_of=np.arange(len(captions)),
          picture_of=picture_of,
          texts=extractor.texts(captions),
        ),
        seed,
      )
    )
  report = Report(
    dataset=captioned.name,
    captions=len(captions),
    captions_available=captioned.available,
    pictures=int(place[-1]) + 1,
    skipped={**captioned.skipped, **damaged},
    captions_cut=shards.captions_cut(),
    num_images=num_images,
    model_image_size=pipeline.image_size,
    seed=seed,
    sampling=sampling,
    distributions=tables,
  )
  return report, _shown(captioned, kept, shards, real.shown)


class _RealPictures:
  """What is kept of the real pictures: why some can't be used, and features of the others.

  Attributes:
    reasons: for each picture why it can't be used, or ''.
    features: for each extractor those of the pictures and of their reconstructions.
    shown: index -> picture, uint8 [size, size, 3] with the size of the first extractor, of some.
  """

  def __init__(
    self,
    pipeline,
    pictures: captioned_pictures.Pictures,
    extractors: Sequence,
    progress: bool,
    shown: Sequence[int],
  ):
    sizes = list(
      dict.fromkeys([*(extractor.image_size for extractor in extractors), pipeline.image_size])
    )
    self.reasons = []
    self.shown = {}
    parts = [([], []) for _ in extractors]
    for images in _decoded(pictures, sizes, self.reasons, progress):
      usable = [index for index, reason in enumerate(self.reasons) if not reason]
      for index, image in zip(usable[-len(images[sizes[0]]) :], images[sizes[0]]):
        if index in shown:
          self.shown[index] = image
      reconstruction = pipeline.reconstruct(images[pipeline.image_size])
      for extractor, (real, through) in zip(extractors, parts):
        real.append(features_lib.extract(extractor, [images[extractor.image_size]]))
        through.append(features_lib.extract(extractor, [reconstruction]))
    if all(self.reasons):
      raise UserError(
        f'--pictures: none of {len(self.reasons):,} pictures can be used '
        f'(the first: {self.reasons[0]})'
      )
    self.features = [tuple(map(features_lib.concatenated, part)) for part in parts]


def _decoded(
  pictures: captioned_pictures.Pictures, sizes: Sequence[int], reasons: list[str], progress: bool
) -> Iterator[dict[int, np.ndarray]]:
  """Yields batches of pictures, size -> uint8 [batch, size, size, 3]; appends to `reasons`."""

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
  """An iterator over items (pictures, or arrays of pictures) that shows its progress."""
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
  kept: np.ndarray,
  shards: picture_shards.PictureShards,
  real: Mapping[int, np.ndarray],
) -> Shown:
  """Returns the first captions with their pictures."""
  first = next(shards.batches())[:_SHOWN]
  chosen = np.flatnonzero(kept[: len(first)])
  pictures = [real[index] for index in captioned.picture_of[chosen].tolist()]
  generated = first[chosen]
  if not pictures:  # All of the first ones are damaged.
    return Shown([], generated, generated)
  return Shown(
    [captioned.captions[index] for index in chosen],
    np.stack(pictures),
    features_lib.resized(generated, pictures[0].shape[0]),
  )
