"""Evaluates a model on scenes made of OpenMoji: generates pictures and judges them by their pixels.

The report compares them with references that the same judge judges: the tokenizer's reconstructions
of the real pictures (the ceiling), the training pictures of the most similar requests (what a model
that only remembers could do), random training pictures (the floor), and the real pictures
themselves (which must be right, or the judge is wrong).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from jaxtyping import UInt8
from PIL import Image
from scipy import sparse

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.openmoji import openmoji_report
from parti_jax.evaluation.openmoji import scene_judge
from parti_jax.evaluation.openmoji import scene_report
from parti_jax.sampling import sheets

_RIGHT, _WRONG = (26, 127, 55), (198, 40, 40)
# Width of a contact sheet's frames, relative to the picture.
_FRAME = 1 / 32


@dataclasses.dataclass(frozen=True)
class Sample:
  """The pictures of a split, for a contact sheet.

  Attributes:
    split: name of the split.
    captions: the prompts.
    real: the pictures of their scenes.
    generated: the pictures generated for each prompt.
    verdicts: verdicts on the generated pictures.
  """

  split: str
  captions: Sequence[str]
  real: UInt8[np.ndarray, 'prompts height width 3']
  generated: UInt8[np.ndarray, 'prompts num_images height width 3']
  verdicts: Sequence[Sequence[scene_judge.Verdict]]


def evaluate(
  model,
  folder: pathlib.Path,
  splits: Sequence[str] = openmoji_scenes.SPLITS,
  num_images: int = 4,
  max_prompts: int | None = None,
  seed: int = 0,
  *,
  train_prompts: int = 200,
  settings: openmoji_scenes.Settings = openmoji_scenes.Settings(),  # noqa: B008
  rank: bool = False,
  progress: bool = False,
  batch_size: int | None = None,
  **sampling,
) -> tuple[scene_report.Report, list[Sample]]:
  """Evaluates a model on splits of the scenes.

  Args:
    model: the result of `parti_jax.load`.
    folder: stores the generated pictures; an interrupted run may continue there.
    splits: names of splits.
    num_images: pictures to generate for each prompt.
    max_prompts: maximum number of prompts per split, chosen at random; None for all.
    seed: seed of the choice of prompts, the generated pictures and the references.
    train_prompts: the same limit for the train split, which is large.
    settings: which scenes.
    rank: whether to also report the choices of the model's ranker and of the judge among the
      pictures of each prompt.
    progress: whether to report progress on stderr, with bars if it is a terminal.
    batch_size: pictures generated at once.
    **sampling: passed to `model.generate` (guidance_scale, temperature, ...).

  Returns:
    The report, and the pictures of each split.

  Raises:
    UserError: an unknown split, a number that isn't positive, a ranker that is needed but missing,
      or damaged pictures in the folder.
  """
  splits = list(dict.fromkeys(splits))
  _check(splits, num_images=num_images, max_prompts=max_prompts, train_prompts=train_prompts)
  if rank and model.ranker is None:
    raise UserError('--rank needs a model with a ranker; give one with --ranker')
  sampling = {name: value for name, value in sampling.items() if value is not None}
  evaluation = _Evaluation(
    model,
    folder,
    num_images,
    seed,
    settings,
    rank,
    progress,
    {'batch_size': batch_size, **sampling},
  )
  limits = dict.fromkeys(splits, max_prompts)
  limits['train'] = min(train_prompts, max_prompts or train_prompts)
  reports, samples, cut = [], [], 0
  for split in splits:
    report, sample, captions_cut = evaluation.of_split(split, limits[split])
    reports.append(report)
    samples.append(sample)
    cut += captions_cut
  return (
    scene_report.Report(reports, num_images, seed, model.image_size, sampling, cut),
    samples,
  )


def _check(splits: Sequence[str], **numbers: int | None) -> None:
  """Raises UserError for an unknown split or a number that isn't positive."""
  if not splits:
    raise UserError(f'no split to evaluate: the splits are {", ".join(openmoji_scenes.SPLITS)}')
  for split in splits:
    openmoji_scenes.check_split(split)
  for name, number in numbers.items():
    if number is not None:
      checks.whole_number(name, number, 1)


@dataclasses.dataclass
class _Evaluation:
  """State shared by all splits."""

  model: Any
  folder: pathlib.Path
  num_images: int
  seed: int
  settings: openmoji_scenes.Settings
  rank: bool
  progress: bool
  sampling: Mapping[str, Any]

  @functools.cached_property
  def judge(self) -> scene_judge.Judge:
    return scene_judge.Judge(self.model.image_size)

  @functools.cached_property
  def training(self) -> list[openmoji_scenes.Scene]:
    self.log('listing the training scenes')
    return list(openmoji_scenes.split_scenes('train', self.settings))

  def log(self, line: str) -> None:
    if self.progress:
      print(line, file=sys.stderr, flush=True)

  def of_split(self, split: str, limit: int | None) -> tuple[scene_report.SplitReport, Sample, int]:
    """Evaluates a split on at most `limit` of its prompts; also returns how many were cut."""
    rng = np.random.default_rng([self.seed, *split.encode()])
    available = self.settings.count(split)
    count = min(limit or available, available)
    chosen = np.sort(rng.choice(available, count, replace=False)).tolist()
    asked = [self.settings.scene(split, index) for index in chosen]
    captions = [openmoji_grammar.captions_of(self.settings, split, index)[0] for index in chosen]
    self.log(f'{split}: generating {self.num_images} pictures for each of {count} prompts')
    generated, cut = self.generate(split, captions)
    self.log(f'{split}: judging')
    verdicts = self.verdicts(asked, generated)
    real = self.render(asked)
    reconstructed = self.model.reconstruct(real)
    nearest = [self.training[index] for index in nearest_requests(asked, self.training)]
    random = [self.training[index] for index in rng.integers(len(self.training), size=count)]
    rows = {
      'generated': verdicts,
      **(self.ranked(captions, generated, verdicts) if self.rank else {}),
      'reconstruction': self.verdicts(asked, reconstructed[:, None]),
      'nearest': self.verdicts(asked, self.render(nearest)[:, None]),
      'random': self.verdicts(asked, self.render(random)[:, None]),
      'real': self.verdicts(asked, real[:, None]),
    }
    report = scene_report.SplitReport(
      split=split,
      prompts=count,
      scenes=available,
      rows={name: scene_report.Row.of(asked, found) for name, found in rows.items()},
      psnr=float(openmoji_report.psnr(real, reconstructed).mean()),
      of_prompt=[_of_prompt(*each) for each in zip(captions, asked, verdicts)],
    )
    return report, Sample(split, captions, real, generated, verdicts), cut

  def generate(
    self, split: str, captions: Sequence[str]
  ) -> tuple[UInt8[np.ndarray, 'prompts num_images height width 3'], int]:
    """Generates the pictures of a split that the folder doesn't have yet.

    Returns:
      All pictures, and the number of captions that were too long for the model.
    """
    texts = [caption for caption in captions for _ in range(self.num_images)]
    shards = picture_shards.PictureShards(self.folder / 'generated' / split, texts)
    shards.draw(self.model, 1, self.progress, seed=self.seed, **self.sampling)
    images = np.concatenate(list(shards.batches()))
    cut = shards.captions_cut() // self.num_images
    return images.reshape(len(captions), self.num_images, *images.shape[1:]), cut

  def render(
    self, scenes: Sequence[openmoji_scenes.Scene]
  ) -> UInt8[np.ndarray, 'scenes height width 3']:
    """Renders scenes at the model's picture size."""
    return np.stack([openmoji_scenes.render(scene, self.model.image_size) for scene in scenes])

  def verdicts(
    self,
    asked: Sequence[openmoji_scenes.Scene],
    images: UInt8[np.ndarray, 'prompts num_images height width 3'],
  ) -> list[list[scene_judge.Verdict]]:
    """Judges the pictures of each prompt."""
    return [
      [self.judge.judge(scene, image) for image in pictures]
      for scene, pictures in zip(asked, images)
    ]

  def ranked(
    self,
    captions: Sequence[str],
    generated: UInt8[np.ndarray, 'prompts num_images height width 3'],
    verdicts: Sequence[Sequence[scene_judge.Verdict]],
  ) -> dict[str, list[list[scene_judge.Verdict]]]:
    """Returns the verdicts on the ranker's first picture of each prompt, and on the best one."""
    texts = [caption for caption in captions for _ in range(self.num_images)]
    scores = np.asarray(
      self.model.ranker.scores(texts, generated.reshape(-1, *generated.shape[2:]))
    ).reshape(len(captions), self.num_images)
    first = [[row[index]] for row, index in zip(verdicts, scores.argmax(axis=1))]
    best = [[max(row, key=_how_right)] for row in verdicts]
    return {'ranked_first': first, 'best': best}


def _how_right(verdict: scene_judge.Verdict) -> int:
  return sum(getattr(verdict, aspect) is not False for aspect in scene_judge.ASPECTS)


def _of_prompt(
  caption: str, scene: openmoji_scenes.Scene, verdicts: Sequence[scene_judge.Verdict]
) -> dict[str, Any]:
  """Returns a prompt's caption, its task and the shares of its right pictures."""
  shares = {}
  for aspect in scene_judge.ASPECTS:
    values = [getattr(verdict, aspect) for verdict in verdicts]
    shares[aspect] = None if None in values else sum(values) / len(values)
  right = sum(verdict.right for verdict in verdicts) / len(verdicts)
  return {'caption': caption, 'task': scene.task, 'right': right, **shares}


def nearest_requests(
  asked: Sequence[openmoji_scenes.Scene], training: Sequence[openmoji_scenes.Scene]
) -> Int[np.ndarray, 'asked']:
  """Returns for each scene the index of the training scene with the most similar request.

  The similarity is the number of facts that both state, over the number that one of them states.
  """
  numbers: dict[tuple, int] = {}

  def table(scenes: Sequence[openmoji_scenes.Scene]) -> sparse.csr_array:
    facts = [[numbers.setdefault(fact, len(numbers)) for fact in _facts(scene)] for scene in scenes]
    rows = np.repeat(np.arange(len(scenes)), [len(found) for found in facts])
    columns = np.array([number for found in facts for number in found])
    return sparse.csr_array(
      (np.ones(len(rows), np.float32), (rows, columns)), (len(scenes), len(numbers))
    )

  wanted = table(asked)
  known = table(training)
  wanted.resize(len(asked), len(numbers))
  shared = (wanted @ known.T).toarray()
  sizes = np.asarray(wanted.sum(axis=1))[:, None] + np.asarray(known.sum(axis=1))[None, :]
  return (shared / (sizes - shared)).argmax(axis=1)


def _facts(scene: openmoji_scenes.Scene) -> set[tuple]:
  """Returns what the captions of a scene state, in parts."""
  facts: set[tuple] = {('ground', scene.ground), ('groups', len(scene.groups))}
  for group in scene.groups:
    kind = group.kind
    facts |= {
      (kind,),
      (kind, group.count),
      (kind, 'color', group.color),
      (kind, 'size', group.size),
    }
  if scene.relation:
    names = [group.kind for group in scene.groups]
    facts.add((scene.relation, *names))
    if scene.relation in openmoji_scenes.INVERSE:
      facts.add((openmoji_scenes.INVERSE[scene.relation], *names[::-1]))
  return facts


def contact_sheet(sample: Sample, max_rows: int = 40) -> Image.Image:
  """Draws a page: for each prompt the real picture and the generated ones, in a frame.

  The frame is green around right pictures and red around others; the text names what is wrong.

  Args:
    sample: the pictures of a split.
    max_rows: maximum number of prompts, spread evenly over the sample.
  """
  count = len(sample.captions)
  shown = np.unique(np.linspace(0, count - 1, min(count, max_rows)).round().astype(int))
  texts, images = [], []
  for index in shown:
    verdicts = sample.verdicts[index]
    wrong = [
      aspect
      for aspect in scene_judge.ASPECTS
      if any(getattr(verdict, aspect) is False for verdict in verdicts)
    ]
    right = sum(verdict.right for verdict in verdicts)
    texts.append(
      f'{sample.captions[index]} | {right} of {len(verdicts)} right'
      + (f'; wrong: {", ".join(wrong)}' if wrong else '')
    )
    framed = [
      _framed(image, _RIGHT if verdict.right else _WRONG)
      for image, verdict in zip(sample.generated[index], verdicts)
    ]
    images.append([sample.real[index], *framed])
  title = (
    f'{sample.split}: {len(shown)} of {count} prompts. Left: the real picture; others: generated'
  )
  return sheets.sheet(title, texts, images, columns=2)


def _framed(
  image: UInt8[np.ndarray, 'height width 3'], color: tuple[int, int, int]
) -> UInt8[np.ndarray, 'height width 3']:
  """Draws a frame on a copy of a picture."""
  framed, width = image.copy(), max(1, round(_FRAME * len(image)))
  framed[:width] = framed[-width:] = framed[:, :width] = framed[:, -width:] = color
  return framed
