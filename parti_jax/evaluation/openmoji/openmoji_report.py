"""Evaluates a model on OpenMoji: generates pictures and judges them by their pixels.

The report compares the generated pictures with four references, judged by the same code: the
tokenizer's reconstructions of the real pictures (the ceiling: no generator can do better), training
pictures of the same name in another tone, random training pictures (the floor), and the real
pictures themselves (which must always be right, or the judge is wrong).
"""

import collections
import dataclasses
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float64
from jaxtyping import Shaped
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features as features_lib
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.evaluation.openmoji import report as report_lib
from parti_jax.exported_model import sampling_settings

# Settings of `model.generate` that change its pictures; the report lists them.
_REPORTED = tuple(field.name for field in dataclasses.fields(sampling_settings.SamplingSettings))
# Pictures processed by the tokenizer at once: enough to keep a CPU busy.
_TOKENIZER_BATCH = 64
# The PSNR of an unchanged picture, which would be infinite.
_MAX_PSNR = 100.0


@dataclasses.dataclass(frozen=True)
class Sample:
  """The pictures of a split, for a contact sheet.

  Attributes:
    split: name of the split.
    asked: the real pictures whose captions were the prompts.
    real: these pictures.
    generated: the pictures generated for each prompt.
    verdicts: verdicts on the generated pictures.
  """

  split: str
  asked: Sequence
  real: UInt8[np.ndarray, 'prompts height width 3']
  generated: UInt8[np.ndarray, 'prompts num_images height width 3']
  verdicts: openmoji_judge.Verdicts


def evaluate(
  model,
  splits: Sequence[str] = openmoji.SPLITS,
  num_images: int = 4,
  max_prompts: int | None = None,
  seed: int = 0,
  *,
  train_prompts: int = 200,
  pictures: Sequence | None = None,
  render: Callable[[str, int], UInt8[np.ndarray, 'size size 3']] | None = None,
  judge: openmoji_judge.Judge | None = None,
  on_sample: Callable[[Sample], None] = lambda sample: None,
  progress: bool = False,
  extractors: Sequence[features_lib.Extractor] = (),
  **sampling,
) -> report_lib.Report:
  """Evaluates a model on splits of OpenMoji.

  Args:
    model: the result of `parti_jax.load`.
    splits: names of splits.
    num_images: pictures to generate for each prompt.
    max_prompts: maximum number of prompts per split, chosen at random; None for all.
    seed: seed of the choice of prompts, the generated pictures and the references.
    train_prompts: the same limit for the train split, which is large.
    pictures: the real pictures of all splits; None for OpenMoji's.
    render: renders a code at a size; None for OpenMoji's.
    judge: the judge of these pictures at the model's size, if several evaluations share it.
    on_sample: called with the pictures of each split once they are judged.
    progress: whether to report progress on stderr, with bars if it is a terminal.
    extractors: networks over whose features generated and real pictures are compared as sets, from
      `features.of_flags`.
    **sampling: passed to `model.generate` (guidance_scale, temperature, ...). With `rank`, the
      report also shows the choices of the ranker and the judge among each prompt's pictures.

  Returns:
    The report.

  Raises:
    UserError: an unknown split, a split without pictures, or a number that isn't positive.
  """
  splits = list(dict.fromkeys(splits))
  _check(splits, num_images=num_images, max_prompts=max_prompts, train_prompts=train_prompts)
  if judge is None:
    pictures = openmoji.pictures() if pictures is None else pictures
    if progress:
      _log(f'rendering {len(pictures)} real pictures')
    judge = openmoji_judge.Judge(pictures, model.image_size, render)
  evaluation = _Evaluation(model, judge, num_images, seed, sampling, progress, extractors)
  limits = dict.fromkeys(splits, max_prompts)
  limits['train'] = min(train_prompts, max_prompts or train_prompts)
  reports = []
  for split in splits:
    report, sample = evaluation.of_split(split, limits[split])
    on_sample(sample)
    reports.append(report)
  return report_lib.Report(
    splits=reports,
    num_images=num_images,
    seed=seed,
    image_size=model.image_size,
    sampling={key: sampling[key] for key in _REPORTED if sampling.get(key) is not None},
    duplicates=dataclasses.asdict(judge.duplicates()),
  )


def _log(line: str):
  print(line, file=sys.stderr, flush=True)


def _check(splits: Sequence[str], **numbers: int | None):
  """Raises UserError for an unknown split or a number that isn't positive."""
  for split in splits:
    if split not in openmoji.SPLITS:
      raise UserError(f'unknown split {split!r}: the splits are {", ".join(openmoji.SPLITS)}')
  if not splits:
    raise UserError(f'no split to evaluate: the splits are {", ".join(openmoji.SPLITS)}')
  for name, number in numbers.items():
    if isinstance(number, int) and number < 1:
      raise UserError(f'{name} must be a positive number, not {number}')
    if number is not None:
      checks.count(name, number)


@dataclasses.dataclass
class _Evaluation:
  """State shared by all splits."""

  model: Any
  judge: openmoji_judge.Judge
  num_images: int
  seed: int
  sampling: Mapping[str, Any]
  progress: bool
  extractors: Sequence[features_lib.Extractor]

  def log(self, line: str):
    if self.progress:
      _log(line)

  def members(self, split: str) -> list:
    """Returns the real pictures of a split; raises UserError if it has none."""
    members = [picture for picture in self.judge.pictures if picture.split == split]
    if not members:
      raise UserError(f'the split {split} has no pictures')
    return members

  def of_split(self, split: str, limit: int | None) -> tuple[report_lib.SplitReport, Sample]:
    """Evaluates a split on at most `limit` of its prompts."""
    members = self.members(split)
    rng = np.random.default_rng([self.seed, *split.encode()])
    count = min(limit or len(members), len(members))
    chosen = np.sort(rng.choice(len(members), count, replace=False))
    asked = [members[index] for index in chosen]
    self.log(f'{split}: generating {self.num_images} pictures for each of {count} prompts')
    generated = self.model.generate(
      [picture.caption for picture in asked],
      num_images=self.num_images,
      seed=self.seed,
      progress=self.progress,
      **self.sampling,
    ).images
    self.log(f'{split}: the tokenizer on {len(members)} pictures')
    reconstructed, tokenizer = measure_tokenizer(
      self.model, self.judge.real(members), self.progress
    )
    self.log(f'{split}: judging')
    verdicts = self.judge.judge(asked, generated)
    real = self.judge.real(asked)
    rows = {
      'generated': _metrics(verdicts),
      **(_of_ranked(verdicts) if self.sampling.get('rank') else {}),
      'reconstruction': _metrics(self.judge.judge(asked, reconstructed[chosen][:, None])),
      'other_tone': _metrics(self.other_tones(asked, rng)),
      'random': _metrics(self.random(asked, rng)),
      'real': _metrics(self.judge.judge(asked, real[:, None])),
    }
    report = report_lib.SplitReport(
      split=split,
      prompts=count,
      pictures=len(members),
      rows=rows,
      tokenizer=tokenizer,
      of_prompt=_of_prompt(asked, verdicts),
      distributions=self.distributions(split, asked, real, reconstructed[chosen], generated),
    )
    return report, Sample(split, asked, real, generated, verdicts)

  def distributions(
    self,
    split: str,
    asked: Sequence,
    real: UInt8[np.ndarray, 'prompts height width 3'],
    reconstructed: UInt8[np.ndarray, 'prompts height width 3'],
    generated: UInt8[np.ndarray, 'prompts num_images height width 3'],
  ) -> list[distribution.Distribution]:
    """Compares generated and real pictures as sets, over each kind of features."""
    tables = []
    for extractor in self.extractors:
      self.log(f'{split}: features of the {extractor.name}')
      tables.append(
        distribution.of_pictures(
          extractor,
          [picture.caption for picture in asked],
          np.arange(len(asked)),
          real,
          reconstructed,
          generated,
          self.seed,
        )
      )
    return tables

  def other_tones(self, asked: Sequence, rng: np.random.Generator) -> openmoji_judge.Verdicts:
    """Judges training pictures of the prompts' names in other tones, for prompts that have any."""
    of_name = collections.defaultdict(list)
    for picture in self.members('train'):
      of_name[picture.name].append(picture)
    prompts: list = []
    drawn: list = []
    for picture in asked:
      others = [other for other in of_name[picture.name] if other.tones != picture.tones]
      if others:
        prompts.append(picture)
        drawn.extend(others[i] for i in rng.integers(len(others), size=self.num_images))
    return self.judge_real(prompts, drawn)

  def random(self, asked: Sequence, rng: np.random.Generator) -> openmoji_judge.Verdicts:
    """Judges training pictures of any name."""
    training = self.members('train')
    drawn = rng.integers(len(training), size=len(asked) * self.num_images)
    return self.judge_real(asked, [training[i] for i in drawn])

  def judge_real(self, asked: Sequence, pictures: Sequence) -> openmoji_judge.Verdicts:
    """Judges real pictures, num_images for each prompt, as if they had been generated."""
    size = self.judge.size
    images = self.judge.real(pictures).reshape(len(asked), self.num_images, size, size, 3)
    return self.judge.judge(asked, images)


def _metrics(verdicts: openmoji_judge.Verdicts) -> Mapping[str, report_lib.Metric]:
  """Converts verdicts to a metric for each key of METRICS."""
  return {
    'tone_right': report_lib.Metric.of(verdicts.tone_right[verdicts.tone_judged]),
    'name_top1': report_lib.Metric.of(verdicts.name_top1),
    'name_top5': report_lib.Metric.of(verdicts.name_top5),
  }


def _of_ranked(verdicts: openmoji_judge.Verdicts) -> Mapping[str, Mapping[str, report_lib.Metric]]:
  """Returns the rows of ranked pictures, best first: the first one, and the judge's choice.

  The judge chooses separately for each metric: whether any picture of the prompt is right.
  """

  def of(choose):
    return _metrics(
      openmoji_judge.Verdicts(
        verdicts.tone_judged,
        *(choose(right) for right in (verdicts.tone_right, verdicts.name_top1, verdicts.name_top5)),
      )
    )

  return {
    'ranked_first': of(lambda right: right[:, :1]),
    'best': of(lambda right: right.any(axis=1, keepdims=True)),
  }


def _of_prompt(asked, verdicts: openmoji_judge.Verdicts) -> list[dict]:
  """Returns each prompt's caption and its share of right pictures, by key of METRICS."""
  return [
    {
      'caption': picture.caption,
      'tone_right': float(verdicts.tone_right[i].mean()) if verdicts.tone_judged[i] else None,
      'name_top1': float(verdicts.name_top1[i].mean()),
      'name_top5': float(verdicts.name_top5[i].mean()),
    }
    for i, picture in enumerate(asked)
  ]


def measure_tokenizer(
  model, images: UInt8[np.ndarray, 'pictures height width 3'], progress: bool = False
) -> tuple[UInt8[np.ndarray, 'pictures height width 3'], report_lib.Tokenizer]:
  """Measures a model's tokenizer on real pictures.

  Args:
    model: the result of `parti_jax.load`.
    images: the pictures.
    progress: whether to show bars on a terminal.

  Returns:
    The reconstructions and the measurements.
  """
  reconstructed = _in_batches(model.reconstruct, images, 'reconstructing', progress)
  tokens = _in_batches(model.tokenize, images, 'tokenizing', progress)
  return reconstructed, report_lib.Tokenizer(
    pictures=len(images),
    psnr=float(psnr(images, reconstructed).mean()),
    codes_used=len(np.unique(tokens)),
    codebook_size=int(model.codebook_size),
  )


def _in_batches(
  function: Callable[[np.ndarray], np.ndarray],
  images: UInt8[np.ndarray, 'pictures height width 3'],
  description: str,
  progress: bool,
) -> Shaped[np.ndarray, 'pictures *values']:
  """Applies a function to batches of one shape, so that it compiles once."""
  results = []
  starts = range(0, len(images), _TOKENIZER_BATCH)
  # disable=None: no bar unless stderr is a terminal.
  for start in tqdm.tqdm(starts, description, leave=False, disable=None if progress else True):
    batch = images[start : start + _TOKENIZER_BATCH]
    padding = np.repeat(batch[-1:], _TOKENIZER_BATCH - len(batch), axis=0)
    results.append(np.asarray(function(np.concatenate([batch, padding])))[: len(batch)])
  return np.concatenate(results)


def psnr(
  images: UInt8[np.ndarray, 'pictures height width 3'],
  others: UInt8[np.ndarray, 'pictures height width 3'],
) -> Float64[np.ndarray, 'pictures']:
  """Returns the peak signal-to-noise ratio of each picture, in dB, at most 100 (if equal)."""
  difference = images.astype(np.float32) - others.astype(np.float32)
  error = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
  return 10 * np.log10(255.0**2 / np.maximum(error, 255.0**2 / 10 ** (_MAX_PSNR / 10)))
