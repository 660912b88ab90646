"""The numbers of an evaluation on scenes, in GenEval's layout, as text tables, Markdown and JSON.

GenEval (arXiv 2310.11513) reports the share of right pictures for each of six tasks, and their mean
as the overall score. A second table shows which aspects of the pictures are right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from parti_jax.core import texts
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation import tables
from parti_jax.evaluation.openmoji import scene_judge
from parti_jax.evaluation.openmoji.report import Metric

OVERALL = 'overall'
TASKS = (*openmoji_scenes.TASKS, OVERALL)
# The order of rows, and their labels, as in `report.ROWS`.
ROWS = {
  'generated': 'generated',
  'ranked_first': 'of each prompt, the first by the ranker',
  'best': 'of each prompt, the best by the judge (what a ranker could choose)',
  'reconstruction': 'real picture through the tokenizer (ceiling)',
  'nearest': 'training picture of the most similar request',
  'random': 'random training picture (floor)',
  'real': 'real picture (checks the judge)',
}

_HOW_JUDGED = (
  'A picture is right if everything that its caption states is right and it shows nothing else, by '
  'its pixels alone. things: the kinds, and no others; counts: the number of each; colors: of kinds '
  'that come in several; sizes: of those that the caption calls small or big; places: the relation '
  'of the things; ground. overall: the mean of the tasks. In %; ± is the standard error over prompts.'
)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the tables.

  Attributes:
    tasks: key of TASKS -> share of right pictures; only tasks that the split has.
    aspects: key of `scene_judge.ASPECTS`, or 'right' -> share of pictures that are right in it,
      among those where it is judged.
  """

  tasks: Mapping[str, Metric]
  aspects: Mapping[str, Metric]

  @classmethod
  def of(
    cls,
    scenes: Sequence[openmoji_scenes.Scene],
    verdicts: Sequence[Sequence[scene_judge.Verdict]],
  ) -> Row:
    """Computes a row.

    Args:
      scenes: the scene of each prompt.
      verdicts: the verdicts on the pictures of each prompt, the same number for each.
    """
    right = np.array([[verdict.right for verdict in row] for row in verdicts], bool)
    of_task = np.array([scene.task for scene in scenes])
    tasks = {
      task: Metric.of(right[of_task == task])
      for task in openmoji_scenes.TASKS
      if (of_task == task).any()
    }
    aspects = {}
    for aspect in scene_judge.ASPECTS:
      judged = [row for row in verdicts if getattr(row[0], aspect) is not None]
      values = [[bool(getattr(verdict, aspect)) for verdict in row] for row in judged]
      aspects[aspect] = Metric.of(np.array(values, bool).reshape(len(judged), right.shape[1]))
    return cls(
      {**tasks, OVERALL: _mean(list(tasks.values()))}, {**aspects, 'right': Metric.of(right)}
    )


def _mean(metrics: Sequence[Metric]) -> Metric:
  """Returns the mean of several tasks and its standard error."""
  means = [metric.mean for metric in metrics if metric.mean is not None]
  errors = [metric.standard_error for metric in metrics]
  prompts = sum(metric.prompts for metric in metrics)
  if not means:
    return Metric(None, None, prompts)
  known = [error for error in errors if error is not None]
  error = (
    sum(error**2 for error in known) ** 0.5 / len(means) if len(known) == len(errors) else None
  )
  return Metric(sum(means) / len(means), error, prompts)


@dataclasses.dataclass(frozen=True)
class SplitReport:
  """The numbers of a split.

  Attributes:
    split: name of the split.
    prompts: number of prompts judged.
    scenes: number of scenes (and so of prompts) in the split.
    rows: key of ROWS -> row.
    psnr: of the tokenizer on the real pictures of the prompts, in dB.
    of_prompt: for each prompt its caption, its task, and the share of its generated pictures that
      are right, and right in each aspect (None if it isn't judged).
  """

  split: str
  prompts: int
  scenes: int
  rows: Mapping[str, Row]
  psnr: float
  of_prompt: Sequence[Mapping[str, Any]]

  def tables(self) -> list[list[list[str]]]:
    """Returns the cells of both tables, each with a header."""
    tasks = [task for task in TASKS if task in self.rows['generated'].tasks]
    prompts = [str(self.rows['generated'].tasks[task].prompts) for task in tasks]
    aspects = ['right', *scene_judge.ASPECTS]
    rows = [(label, self.rows[row]) for row, label in ROWS.items() if row in self.rows]
    return [
      [
        ['', *tasks],
        ['prompts', *prompts],
        *([label, *(str(row.tasks[task]) for task in tasks)] for label, row in rows),
      ],
      [
        ['', *aspects],
        *([label, *(str(row.aspects[aspect]) for aspect in aspects)] for label, row in rows),
      ],
    ]

  def title(self) -> str:
    return f'{self.split}: {self.prompts} of {self.scenes} prompts'


@dataclasses.dataclass(frozen=True)
class Report:
  """The whole evaluation.

  Attributes:
    splits: the splits, in the order requested.
    num_images: pictures generated for each prompt.
    seed: seed of the sampled prompts, the generated pictures and the references.
    image_size: height and width of the judged pictures, in pixels.
    sampling: settings that override the model's own.
    captions_cut: captions that were too long for the model, and were cut.
  """

  splits: Sequence[SplitReport]
  num_images: int
  seed: int
  image_size: int
  sampling: Mapping[str, Any]
  captions_cut: int = 0

  def notes(self) -> list[str]:
    """Returns explanations of the tables."""
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    notes = [
      f'{self.num_images} pictures per prompt, {self.image_size}x{self.image_size} pixels, '
      f'seed {self.seed}, sampling: {settings or "as the model is configured"}.',
      _HOW_JUDGED,
    ]
    if self.captions_cut:
      notes.append(
        f"Cut to the model's text length: {texts.counted(self.captions_cut, 'caption')}."
      )
    return notes

  def text(self) -> str:
    """Renders tables for a terminal."""
    blocks = []
    for split in self.splits:
      first, second = map(tables.text, split.tables())
      blocks += [f'{split.title()}\n{first}', f'{second}\ntokenizer: PSNR {split.psnr:.1f} dB']
    return '\n\n'.join([*blocks, '\n'.join(self.notes())]) + '\n'

  def markdown(self) -> str:
    """Renders tables in Markdown."""
    blocks = ['# Evaluation on scenes made of OpenMoji']
    for split in self.splits:
      blocks += [f'## {split.title()}', *map(tables.markdown, split.tables())]
      blocks.append(f'Tokenizer: PSNR {split.psnr:.1f} dB.')
    return '\n\n'.join([*blocks, *self.notes()]) + '\n'

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )
