"""The numbers of an evaluation, rendered as text tables, Markdown and JSON."""

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from parti_jax.evaluation import distribution_report
from parti_jax.evaluation import tables
from parti_jax.evaluation.metrics import distribution as distribution_lib

METRICS = {'tone_right': 'tone right', 'name_top1': 'name top 1', 'name_top5': 'name top 5'}

# The order of rows, and their labels. The first row is the result; the next two exist if the
# pictures were ranked; the others are references.
ROWS = {
  'generated': 'generated',
  'ranked_first': 'of each prompt, the first by the ranker',
  'best': 'of each prompt, the best by the judge (what a ranker could choose)',
  'reconstruction': 'real picture through the tokenizer (ceiling)',
  'other_tone': 'training picture, same name, another tone',
  'random': 'random training picture (floor)',
  'real': 'real picture (checks the judge)',
}

_HOW_JUDGED = (
  'tone right: among the real pictures of the requested name, the nearest in pixels has the '
  'requested tones (only names with tones). name top 1, top 5: among the real pictures of all '
  'names in the requested tones, the nearest, or one of the five nearest, has the requested name. '
  'In %; ± is the standard error over prompts.'
)


@dataclasses.dataclass(frozen=True)
class Metric:
  """A share of right pictures.

  Attributes:
    mean: over all (prompt, image) pairs, in [0, 1]; None if there are none.
    standard_error: standard error of the mean over prompts; None with fewer than two prompts.
    prompts: number of prompts.
  """

  mean: float | None
  standard_error: float | None
  prompts: int

  @classmethod
  def of(cls, right: Bool[np.ndarray, 'prompts num_images']) -> 'Metric':
    """Computes the metric of `right`."""
    prompts = right.shape[0]
    if not right.size:
      return cls(None, None, prompts)
    of_prompt = right.mean(axis=1)
    error = float(of_prompt.std(ddof=1) / prompts**0.5) if prompts > 1 else None
    return cls(float(of_prompt.mean()), error, prompts)

  def __str__(self):
    if self.mean is None:
      return '-'
    if self.standard_error is None:
      return f'{100 * self.mean:.1f}'
    return f'{100 * self.mean:.1f} ± {100 * self.standard_error:.1f}'


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Measurements of the tokenizer on all real pictures of a split.

  Attributes:
    pictures: number of pictures.
    psnr: mean over pictures, in dB, for values in [0, 255].
    codes_used: number of distinct codes in their tokens.
    codebook_size: number of codes in the codebook.
  """

  pictures: int
  psnr: float
  codes_used: int
  codebook_size: int

  @property
  def share_of_codes_used(self) -> float:
    return self.codes_used / self.codebook_size

  def __str__(self):
    return (
      f'PSNR {self.psnr:.1f} dB, {self.codes_used} of {self.codebook_size} codes used '
      f'({100 * self.share_of_codes_used:.1f}%)'
    )


@dataclasses.dataclass(frozen=True)
class SplitReport:
  """The numbers of a split.

  Attributes:
    split: name of the split.
    prompts: number of prompts judged.
    pictures: number of real pictures (and so of prompts) in the split.
    rows: key of ROWS -> key of METRICS -> metric.
    tokenizer: measured over the whole split.
    of_prompt: for each prompt, its caption and the share of its generated pictures that are
      right, by key of METRICS (None if the tone isn't judged).
    distributions: the generated pictures as a set, over each available kind of features.
  """

  split: str
  prompts: int
  pictures: int
  rows: Mapping[str, Mapping[str, Metric]]
  tokenizer: Tokenizer
  of_prompt: Sequence[Mapping[str, Any]]
  distributions: Sequence[distribution_lib.Distribution] = ()

  def of_ceiling(self, metric: str) -> float | None:
    """Returns generated / reconstruction for a metric; None if it is undefined."""
    generated = self.rows['generated'][metric].mean
    ceiling = self.rows['reconstruction'][metric].mean
    return generated / ceiling if ceiling and generated is not None else None

  def table(self) -> list[list[str]]:
    """Returns the cells: a header, a line for each row, and the share of the ceiling."""
    lines = [['', 'prompts', *METRICS.values()]]
    for row, label in ROWS.items():
      if row not in self.rows:
        continue
      metrics = self.rows[row]
      lines.append([label, str(metrics['name_top1'].prompts), *map(str, metrics.values())])
    shares = [self.of_ceiling(metric) for metric in METRICS]
    lines.insert(
      2,
      [
        'generated / ceiling',
        '',
        *('-' if share is None else f'{100 * share:.1f}' for share in shares),
      ],
    )
    return lines

  def remarks(self) -> list[str]:
    """Reports metrics with too few prompts for their standard errors."""
    few = []
    for metric, label in METRICS.items():
      prompts = [metrics[metric].prompts for metrics in self.rows.values()]
      fewest = min((number for number in prompts if number), default=distribution_lib.FEW_PROMPTS)
      if fewest < distribution_lib.FEW_PROMPTS:
        few.append(f'{label}: {fewest}')
    if not few:
      return []
    return [
      f'Standard errors over fewer than {distribution_lib.FEW_PROMPTS} prompts are rough, '
      f'and undefined for one prompt (fewest prompts of a row: {", ".join(few)}).'
    ]

  def title(self) -> str:
    return f'{self.split}: {self.prompts} of {self.pictures} prompts'


@dataclasses.dataclass(frozen=True)
class Report:
  """The whole evaluation.

  Attributes:
    splits: the splits, in the order requested.
    num_images: pictures generated for each prompt.
    seed: seed of the sampled prompts, the generated pictures and the references.
    image_size: height and width of the judged pictures, in pixels.
    sampling: settings that override the model's own.
    duplicates: the fields of `openmoji_judge.Duplicates`, by name.
  """

  splits: Sequence[SplitReport]
  num_images: int
  seed: int
  image_size: int
  sampling: Mapping[str, Any]
  duplicates: Mapping[str, int]

  def notes(self) -> list[str]:
    """Returns explanations of the tables."""
    duplicates = self.duplicates
    settings = ', '.join(f'{key} {value}' for key, value in self.sampling.items())
    return [
      f'{self.num_images} pictures per prompt, {self.image_size}x{self.image_size} pixels, '
      f'seed {self.seed}, sampling: {settings or "as the model is configured"}.',
      _HOW_JUDGED,
      f'Of {duplicates["pictures"]} real pictures, {duplicates["same_tone"]} are identical to '
      f'one of another name in the same tones, and {duplicates["same_name"]} to one of the same '
      'name in other tones: such a picture counts as right for both.',
      *distribution_report.notes(table for split in self.splits for table in split.distributions),
    ]

  def text(self) -> str:
    """Renders tables for a terminal."""
    blocks = []
    for split in self.splits:
      blocks.append(
        '\n'.join(
          [
            split.title(),
            tables.text(split.table()),
            f'tokenizer: {split.tokenizer}',
            *split.remarks(),
          ]
        )
      )
      blocks += map(distribution_report.text, split.distributions)
    return '\n\n'.join([*blocks, '\n'.join(self.notes())]) + '\n'

  def markdown(self) -> str:
    """Renders tables in Markdown."""
    blocks = ['# Evaluation on OpenMoji']
    for split in self.splits:
      blocks.append(f'## {split.title()}')
      blocks.append(tables.markdown(split.table()))
      blocks.append(f'Tokenizer: {split.tokenizer}.')
      blocks += split.remarks()
      blocks += map(distribution_report.markdown, split.distributions)
    return '\n\n'.join([*blocks, *self.notes()]) + '\n'

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    content = dataclasses.asdict(self)
    for split, rendered in zip(self.splits, content['splits']):
      rendered['tokenizer']['share_of_codes_used'] = split.tokenizer.share_of_codes_used
      rendered['remarks'] = split.remarks()
      rendered['of_ceiling'] = {metric: split.of_ceiling(metric) for metric in METRICS}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
