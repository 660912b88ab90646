"""Rejection of generated pictures by a ranker: what remains at several shares of acceptance.

ViT-VQGAN (arXiv 2110.04627) and VQGAN (arXiv 2012.09841) report the FID of the share of pictures that a
classifier is most certain of, from 1 to 0.05. Here a ranker accepts a share of the pictures of each
caption. Rows compare the same number of pictures, since the Fréchet distance grows as that falls: as many
of the accepted ones of each caption, at random, as the smallest share accepts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Float64
from jaxtyping import Int
from PIL import Image

from parti_jax.core import texts as texts_lib
from parti_jax.core.errors import UserError
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import distribution_report
from parti_jax.evaluation import line_chart
from parti_jax.evaluation import measurement
from parti_jax.evaluation.datasets import captioned_pictures
from parti_jax.evaluation.datasets import generated_set
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features as features_lib
from parti_jax.evaluation.openmoji import openmoji_judge


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Captions and the real pictures that generated ones are compared with.

  Attributes:
    name: name of the set.
    captions: the captions.
    picture_of: index of the real picture of each caption.
    real: for each extractor, the features of the real pictures.
    skipped: reason -> captions left out.
  """

  name: str
  captions: Sequence[str]
  picture_of: Int[np.ndarray, 'captions']
  real: Sequence[features_lib.Features]
  skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Share:
  """The pictures accepted at a share.

  Attributes:
    share: the share that was asked for.
    accepted: pictures accepted of each caption's.
    row: as many of these as each share has, compared with the real pictures.
  """

  share: float
  accepted: int
  row: distribution.Row


@dataclasses.dataclass(frozen=True)
class Table(distribution_report.Compared):
  """All shares over one set of real pictures and one kind of features.

  Attributes:
    shares: the shares, ascending.
  """

  shares: Sequence[Share]

  @property
  def rows(self) -> list[distribution.Row]:
    return [share.row for share in self.shares]

  def cells(self) -> list[list[str]]:
    """Returns a header, and a line for each share."""
    columns, values = distribution_report.value_cells(self.rows)
    lines = [['share', 'accepted', 'compared', *columns]]
    for share, cells in zip(self.shares, values):
      counts = [f'{share.share:g}', str(share.accepted), f'{share.row.pictures:,}']
      lines.append([*counts, *cells])
    return lines


@dataclasses.dataclass(frozen=True)
class Report:
  """Shares of acceptance.

  Attributes:
    ranker: description of the ranker that accepts.
    num_images: pictures generated for each caption.
    compared: accepted pictures of each caption that are compared, at every share.
    seed: seed of the pictures, and of the choice among the accepted.
    sampling: settings that override the model's own.
    captions_cut: captions longer than the model's text length.
    tables: the tables.
  """

  ranker: str
  num_images: int
  compared: int
  seed: int
  sampling: Mapping[str, object]
  captions_cut: int
  tables: Sequence[Table]

  def notes(self) -> list[str]:
    """Returns explanations of the tables."""
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    lines = [
      f'{self.num_images} pictures of each caption, seed {self.seed}, sampling: '
      f'{settings or "as the model is configured"}. A share of them is accepted by the {self.ranker}; '
      f'{self.compared} of the accepted ones of each caption are compared, at every share, so that rows '
      'have the same number of pictures. Alignment by the same ranker, and distances over its features, '
      'are optimistic.'
    ]
    if self.captions_cut:
      lines.append(
        f"Cut to the model's text length: {texts_lib.counted(self.captions_cut, 'caption')}."
      )
    return lines

  def text(self) -> str:
    """Renders the tables for a terminal."""
    blocks = [table.text() for table in self.tables]
    return '\n\n'.join([*blocks, '\n'.join(self.notes())]) + '\n'

  def markdown(self) -> str:
    """Renders the tables in Markdown."""
    blocks = ['# Rejection', *(table.markdown() for table in self.tables)]
    return '\n\n'.join([*blocks, *self.notes()]) + '\n'

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )

  def picture(self) -> Image.Image | None:
    """Draws the distance against the alignment, with a label for each share.

    Returns:
      The picture; None if there are no distances, which need two pictures.
    """
    panels = []
    for table in self.tables:
      points = []
      for share in table.shares:
        if share.row.frechet_distance is None:
          continue
        alignment = share.row.alignment
        x, error = (share.share, None) if alignment is None else (alignment.mean, alignment.error)
        points.append(line_chart.Point(x, share.row.frechet_distance, f'{share.share:g}', error))
      if not points:
        continue
      aligned = table.shares[0].row.alignment is not None
      panels.append(
        line_chart.Panel(
          table.title,
          'alignment; labels are the accepted share' if aligned else 'accepted share',
          'Frechet distance',
          {'': points},
        )
      )
    return line_chart.draw(panels) if panels else None


def check_ranker(model) -> None:
  """Raises UserError for a model without a ranker."""
  if model.ranker is None:
    raise UserError(
      f'--rejection: the model {model.model_name} has no ranker that could accept pictures; give one '
      'with --ranker'
    )


def of_captions(
  captioned: captioned_pictures.Captioned, real: captions_evaluation.RealPictures
) -> Comparison:
  """Returns the usable captions and real pictures of a data set."""
  kept, picture_of = real.usable(captioned)
  captions = [caption for caption, keep in zip(captioned.captions, kept) if keep]
  return Comparison(
    captioned.name,
    captions,
    picture_of,
    [found for found, _ in real.features],
    real.skipped(captioned),
  )


def of_openmoji(
  judge: openmoji_judge.Judge,
  split: str,
  max_prompts: int | None,
  train_prompts: int,
  seed: int,
  extractors: Sequence[features_lib.Extractor],
) -> Comparison:
  """Returns the prompts and real pictures of a split of OpenMoji, those of its evaluation.

  Args:
    judge: has the real pictures at the model's size.
    split: name of the split.
    max_prompts: maximum number of prompts; None for all.
    train_prompts: the same limit for the train split.
    seed: seed of the choice of prompts.
    extractors: the networks.
  """
  members = [picture for picture in judge.pictures if picture.split == split]
  limit = max_prompts or len(members)
  if split == 'train':
    limit = min(train_prompts, limit)
  rng = np.random.default_rng([seed, *split.encode()])
  chosen = np.sort(rng.choice(len(members), min(limit, len(members)), replace=False))
  asked = [members[index] for index in chosen]
  images = judge.real(asked)
  return Comparison(
    f'OpenMoji, {split}',
    [picture.caption for picture in asked],
    np.arange(len(asked)),
    [features_lib.extract(extractor, [images]) for extractor in extractors],
  )


def evaluate(
  model,
  comparisons: Sequence[Comparison],
  extractors: Sequence[features_lib.Extractor],
  folder: pathlib.Path,
  shares: Sequence[float],
  num_images: int,
  seed: int = 0,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> Report:
  """Generates the pictures that the folder doesn't have yet, and compares the accepted ones.

  Args:
    model: the result of `parti_jax.load`, with a ranker.
    comparisons: the captions and real pictures.
    extractors: the networks, in the order of `Comparison.real`.
    folder: stores the generated pictures; another run may continue there.
    shares: shares of acceptance in (0, 1], ascending; each accepts at least one picture.
    num_images: pictures for each caption.
    seed: seed of the pictures, and of the choice among the accepted.
    progress: whether to show bars on a terminal.
    batch_size: pictures generated at once.
    **sampling: fields of SamplingSettings.

  Returns:
    The report.

  Raises:
    UserError: there is no ranker, or a shard is damaged.
  """
  check_ranker(model)
  counts = [accepted_count(share, num_images) for share in shares]
  compared = min(counts)
  found, cut = [], 0
  for number, comparison in enumerate(comparisons):
    texts = [caption for caption in comparison.captions for _ in range(num_images)]
    shards = picture_shards.PictureShards(folder / 'generated' / str(number), texts)
    shards.draw(model, 1, progress, seed=seed, batch_size=batch_size, **sampling)
    cut += shards.captions_cut() // num_images
    scores = _scores(model, texts, shards).reshape(-1, num_images)
    chosen = [choose(scores, count, compared, seed) for count in counts]
    rows_of = [
      _rows(comparison, index, extractor, shards, chosen)
      for index, extractor in enumerate(extractors)
    ]
    for extractor, real, rows in zip(extractors, comparison.real, rows_of):
      # Of features without texts, the alignment is the ranker's.
      aligned = [
        next((row.alignment for row in same if row.alignment is not None), None)
        for same in zip(*rows_of)
      ]
      rows = [
        dataclasses.replace(row, alignment=alignment) for row, alignment in zip(rows, aligned)
      ]
      found.append(
        Table(
          comparison.name,
          extractor.name,
          real.values.shape[1],
          [Share(*values) for values in zip(shares, counts, rows)],
          reported=captions_evaluation.skipped_remarks(comparison.skipped),
        )
      )
  ranker = features_lib.RankerFeatures(model.ranker, model.model_name).name
  return Report(ranker, num_images, compared, seed, sampling, cut, found)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is drawn for a comparison with a reference.

  Attributes:
    name: what the samples are, for the title.
    texts: the texts for the model.
    names: for each of them, what the ranker reads.
    size: height and width of the samples, in pixels.
  """

  name: str
  texts: Sequence[str]
  names: Sequence[str]
  size: int


def against_reference(
  model,
  asked: Asked,
  folder: pathlib.Path,
  shares: Sequence[float],
  num_images: int,
  measure: Callable[[float, picture_sets.PictureSet], measurement.Measurement],
  seed: int = 0,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> tuple[Report, dict[str, measurement.Measurement]]:
  """Generates the pictures that the folder doesn't have yet, and compares the accepted ones.

  Args:
    model: the result of `parti_jax.load`, with a ranker.
    asked: what is drawn, `num_images` pictures for each text.
    folder: stores the generated pictures; another run may continue there.
    shares: as in `evaluate`.
    num_images: pictures among which the ranker accepts.
    measure: compares the accepted pictures of a share with the reference.
    seed: as in `evaluate`.
    progress: as in `evaluate`.
    batch_size: as in `evaluate`.
    **sampling: as in `evaluate`.

  Returns:
    The report, and the measurement of each share by name.

  Raises:
    UserError: there is no ranker, or a shard is damaged.
  """
  check_ranker(model)
  counts = [accepted_count(share, num_images) for share in shares]
  compared = min(counts)
  shards = picture_shards.PictureShards(
    folder / 'generated', [text for text in asked.texts for _ in range(num_images)]
  )
  shards.draw(model, 1, progress, seed=seed, batch_size=batch_size, **sampling)
  known = [name for name in asked.names for _ in range(num_images)]
  scores = _scores(model, known, shards).reshape(-1, num_images)
  extractor = features_lib.RankerFeatures(model.ranker, model.model_name)
  cosines = _cosines(extractor, asked.names, num_images, shards)
  found: dict[str, measurement.Measurement] = {}
  rows: list[distribution.Row] = []
  for share, count in zip(shares, counts):
    chosen = choose(scores, count, compared, seed)
    place = f'{folder}, share {share:g}'
    accepted = generated_set.GeneratedSet(place, shards, asked.size, chosen)
    one = found[f'share={share:g}/{measurement.REFERENCE}'] = measure(share, accepted)
    # Over askings, since the pictures of one are chosen together.
    of_asking = cosines.reshape(chosen.shape)[chosen].reshape(-1, compared).mean(axis=1)
    error = float(of_asking.std(ddof=1) / len(of_asking) ** 0.5) if len(of_asking) > 1 else None
    alignment = distribution.Estimate(float(of_asking.mean()), error)
    rows.append(dataclasses.replace(measurement.row_of(one), alignment=alignment))
  common, remarks = distribution_report.against_reference(asked.name, list(found.values()))
  table = Table(*common, [Share(*values) for values in zip(shares, counts, rows)], reported=remarks)
  cut = shards.captions_cut() // num_images
  return Report(extractor.name, num_images, compared, seed, sampling, cut, [table]), found


def _cosines(
  extractor: features_lib.Extractor,
  names: Sequence[str],
  num_images: int,
  shards: picture_shards.PictureShards,
) -> Float64[np.ndarray, 'pictures']:
  """Returns the cosine of each picture and its text."""
  index_of = {name: index for index, name in enumerate(dict.fromkeys(names))}
  of_names = extractor.texts(list(index_of))
  assert of_names is not None
  of_names /= np.linalg.norm(of_names, axis=1, keepdims=True)
  own = np.array([index_of[name] for name in names]).repeat(num_images)
  start, found = 0, []
  for batch in shards.batches():
    values = features_lib.extract(extractor, [batch]).values
    texts = of_names[own[start : start + len(batch)]]
    found.append(np.einsum('pd,pd->p', values, texts) / np.linalg.norm(values, axis=1))
    start += len(batch)
  return np.concatenate(found).astype(np.float64)


def accepted_count(share: float, num_images: int) -> int:
  """Returns how many of a caption's pictures a share accepts, at least one."""
  return max(1, round(share * num_images))


def choose(
  scores: Float32[np.ndarray, 'captions num_images'], accepted: int, compared: int, seed: int
) -> Bool[np.ndarray, 'captions num_images']:
  """Chooses the pictures to compare among the accepted ones.

  Args:
    scores: the ranker's scores.
    accepted: number of pictures of each caption that are accepted, those of the highest scores.
    compared: number of these to compare.
    seed: seed of the choice.
  """
  captions, num_images = scores.shape
  rng = np.random.default_rng([seed, accepted, num_images])
  best = np.argsort(-scores, axis=1, kind='stable')[:, :accepted]
  kept = rng.permuted(best, axis=1)[:, :compared]
  chosen = np.zeros(scores.shape, bool)
  chosen[np.arange(captions)[:, None], kept] = True
  return chosen


def _scores(
  model, texts: Sequence[str], shards: picture_shards.PictureShards
) -> Float32[np.ndarray, 'pictures']:
  """Returns the ranker's score of each picture for its caption."""
  start, found = 0, []
  for batch in shards.batches():
    found.append(np.asarray(model.ranker.scores(texts[start : start + len(batch)], batch)))
    start += len(batch)
  return np.concatenate(found).astype(np.float32)


def _rows(
  comparison: Comparison,
  index: int,
  extractor: features_lib.Extractor,
  shards: picture_shards.PictureShards,
  chosen: Sequence[Bool[np.ndarray, 'captions num_images']],
) -> list[distribution.Row]:
  """Returns the row of each choice, over the features of one extractor."""
  num_images = chosen[0].shape[1]
  wanted = np.any(chosen, axis=0).reshape(-1)
  parts, start = [], 0
  for batch in shards.batches():
    keep = wanted[start : start + len(batch)]
    if keep.any():
      parts.append(features_lib.extract(extractor, [batch[keep]]))
    start += len(batch)
  features = features_lib.concatenated(parts)
  place = np.cumsum(wanted) - 1
  sets = distribution.Sets(
    real=comparison.real[index],
    reconstruction=comparison.real[index],
    generated=features,
    caption_of=np.flatnonzero(wanted) // num_images,
    picture_of=comparison.picture_of,
    texts=extractor.texts(comparison.captions),
    published=extractor.published(comparison.captions),
  )
  rows = []
  for choice in chosen:
    pictures = np.flatnonzero(choice.reshape(-1))
    rows.append(distribution.row(sets, features[place[pictures]], pictures // num_images))
  return rows
