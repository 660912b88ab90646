"""`parti-jax calibrate`: finds the threshold that saves most work and preserves image quality.

`calibration` has the statistical test, and `alignment` the measures of quality.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from parti_jax.cli import generate
from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation import calibration
from parti_jax.evaluation.openmoji import alignment

THRESHOLDS = ('exit_threshold', 'guidance_skip_threshold')
# Dense near 1, where the confidence of most tokens is.
_CANDIDATES = (0.999, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
# The table's columns: key of a row -> its heading.
_COLUMNS = {
  'threshold': 'threshold',
  'alignment': 'alignment',
  'loss': 'loss',
  'p_value': 'p-value',
  'layers': 'layers/token',
  'computed': 'computed',
  'unguided': 'skipped passes',
}


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  model_flags.add_model(parser)
  parser.add_argument(
    '--calibrate',
    default=THRESHOLDS[0],
    choices=THRESHOLDS,
    help='the threshold to calibrate (default: %(default)s)',
  )
  parser.add_argument(
    '--tolerance',
    type=float,
    default=0.05,
    help='acceptable loss of alignment (default: %(default)s)',
  )
  parser.add_argument(
    '--risk',
    type=float,
    default=0.05,
    help='acceptable probability of a larger loss (default: %(default)s)',
  )
  parser.add_argument(
    '--candidates',
    type=float,
    nargs='+',
    default=list(_CANDIDATES),
    metavar='THRESHOLD',
    help='thresholds to try, from the highest down (default: 0.999, 0.99, ... 0)',
  )
  parser.add_argument(
    '--measure',
    default='name_top1',
    choices=(*alignment.OpenMojiAlignment.measures, alignment.RANKER),
    help="measure of alignment: one of OpenMoji's judge, or the score of the model's ranker "
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--split',
    default='unseen_combinations',
    metavar='SPLIT',
    help='split of the OpenMoji prompts: ' + ', '.join(openmoji.SPLITS) + ' (default: %(default)s)',
  )
  parser.add_argument(
    '--prompts_file',
    metavar='FILE',
    help='a text file with a prompt on each line, to use instead with --measure=ranker',
  )
  parser.add_argument(
    '--max_prompts',
    type=int,
    metavar='N',
    help='maximum number of prompts, chosen at random (default: all)',
  )
  parser.add_argument(
    '--num_images', type=int, default=4, help='pictures for each prompt (default: %(default)s)'
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='seed of the choice of prompts and of the pictures (default: %(default)s)',
  )
  parser.add_argument('--batch_size', type=int, help='number of pictures to generate at once')
  parser.add_argument(
    '--output',
    default='calibration.json',
    metavar='FILE',
    help='file of the table; rows that it already has are not measured again (default: %(default)s)',
  )
  sampling_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Measures thresholds until one fails, prints the table and writes it.

  Returns:
    0 if a threshold was found, 1 if none keeps the alignment.

  Raises:
    UserError: bad flags, a model without the ranker that the flags ask for, or an output file of
      another calibration.
  """
  _check_flags(args)
  model = model_flags.load(args)
  judge = _judge(args, model)
  _check_prompts(args, judge)
  study = _Study(args, model, judge)
  found, rows = calibration.fixed_sequence(
    sorted(set(args.candidates), reverse=True), study.row, args.risk
  )
  study.write(result={'threshold': found, 'rows': rows})
  where = f'{args.measure} within {args.tolerance:g}, at a risk of {args.risk:g}'
  if found is None:
    print(f'no threshold keeps {where}; more prompts or a larger --tolerance may')
    return 1
  print(
    f'{args.calibrate}={found:g} keeps {where}:\n'
    f'  parti-jax generate PROMPT --{args.calibrate}={found:g}\n{args.output}'
  )
  return 0


class _Study:
  """The measurements so far, stored in a file."""

  def __init__(self, args, model, judge):
    self._args, self._model, self._judge = args, model, judge
    self._order = np.random.default_rng(args.seed).permutation(len(judge.prompts))
    sampling = model.sampling.replace(**sampling_flags.given(args))
    self._conditions = {
      'model': str(args.model),
      'prompts': judge.prompts,
      'num_images': args.num_images,
      'seed': args.seed,
      'measure': args.measure,
      'calibrate': args.calibrate,
      'sampling': vars(sampling.replace(**{args.calibrate: 1.0})),
    }
    self._measured = self._read()
    self._printed = False

  def row(self, threshold: float) -> dict[str, Any]:
    """Returns a row of the table; measures it unless the file has it."""
    everything = self._measure(1.0)
    measured = self._measure(threshold)
    losses = np.array(everything['scores']) - np.array(measured['scores'])
    losses = losses[self._order][~np.isnan(losses[self._order])]
    span = alignment.SPANS[self._args.measure]
    row = {
      'threshold': threshold,
      'alignment': float(np.nanmean(measured['scores'])),
      'loss': float(losses.mean()),
      'p_value': calibration.p_value(losses, self._args.tolerance, -span, span, self._args.risk),
    }
    row |= {name: measured[name] for name in _COLUMNS if name in measured}
    if not self._printed:
      print('| ' + ' | '.join(_COLUMNS.values()) + ' |\n|' + '---|' * len(_COLUMNS))
      first = everything | {'threshold': 1.0, 'alignment': float(np.nanmean(everything['scores']))}
      print(_line(first))
      self._printed = True
    print(_line(row), flush=True)
    return row

  def write(self, **more):
    """Writes the file atomically."""
    content = self._conditions | {
      'tolerance': self._args.tolerance,
      'risk': self._args.risk,
      'measured': self._measured,
    }
    try:
      storage.write(self._args.output, json.dumps(content | more, indent=1) + '\n')
    except OSError as error:
      raise UserError(
        f'--output {self._args.output} cannot be written: {error.strerror}; choose another file'
      ) from error

  def _measure(self, threshold: float) -> dict[str, Any]:
    key = checks.number_text(threshold)
    if key not in self._measured:
      result = self._model.generate(
        self._judge.prompts,
        num_images=self._args.num_images,
        seed=self._args.seed,
        batch_size=self._args.batch_size,
        progress=True,
        **sampling_flags.given(self._args) | {self._args.calibrate: threshold},
      )
      scores = self._judge.scores(result.images)[self._args.measure]
      self._measured[key] = _used(result, self._model.decoder_layers) | {'scores': scores.tolist()}
      self.write()
    return self._measured[key]

  def _read(self) -> dict[str, Any]:
    path = pathlib.Path(self._args.output)
    if not path.exists():
      return {}
    try:
      content = json.loads(path.read_text(encoding='utf-8'))
      different = [
        name
        for name, value in self._conditions.items()
        if content[name] != json.loads(json.dumps(value))
      ]
      measured = content['measured']
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"--output {path} exists and isn't a calibration; choose another file or remove it"
      ) from error
    if different:
      raise UserError(
        f'--output {path} is from a calibration with another {different[0]}; choose '
        'another file or remove it'
      )
    return measured


def _used(result, decoder_layers: int) -> dict[str, float]:
  """Returns the average work per token of a result."""
  if result.usage is None:
    return {'layers': decoder_layers, 'computed': decoder_layers, 'unguided': 0.0}
  return {
    'layers': float(result.usage.layers.mean()),
    'computed': float(result.usage.computed[..., 0].mean()),
    'unguided': float(result.usage.unguided.mean()),
  }


def _line(row) -> str:
  """Returns a row of the table, in Markdown."""
  return '| ' + ' | '.join(f'{row[name]:.3g}' if name in row else '' for name in _COLUMNS) + ' |'


def _judge(args, model):
  """Returns the object that measures alignment."""
  if args.measure != alignment.RANKER:
    return alignment.OpenMojiAlignment(model.image_size, args.split, args.max_prompts, args.seed)
  if model.ranker is None:
    raise UserError(
      '--measure=ranker: the model folder has no ranker; choose one of '
      f'{", ".join(alignment.OpenMojiAlignment.measures)}'
    )
  if args.prompts_file is not None:
    prompts = generate.read_prompts(args.prompts_file)
  else:
    prompts = [picture.caption for picture in openmoji.pictures() if picture.split == args.split]
  return alignment.RankerAlignment(model.ranker, prompts, args.max_prompts, args.seed)


def _check_prompts(args: argparse.Namespace, judge):
  """Warns, before generating pictures, if there are too few prompts to find a threshold.

  Raises:
    UserError: if no prompt can be judged.
  """
  count, span = judge.judged(args.measure), alignment.SPANS[args.measure]
  if not count:
    raise UserError(
      f'--measure={args.measure} can judge none of the {len(judge.prompts)} prompts; choose '
      'another measure, or more --max_prompts'
    )
  least = calibration.p_value(np.zeros(count), args.tolerance, -span, span, args.risk)
  if least > args.risk:
    print(
      f'parti-jax: warning: {count} prompts are too few for --tolerance={args.tolerance:g}: '
      f'even without any loss the p-value is {least:.2g}, above --risk={args.risk:g}; give more '
      'prompts or a larger tolerance',
      file=sys.stderr,
    )


def _check_flags(args: argparse.Namespace):
  """Raises UserError for invalid values, before loading a model."""
  sampling_flags.check_numbers(args, 'num_images', 'max_prompts', 'batch_size')
  for name in ('tolerance', 'risk'):
    if not 0 < getattr(args, name) < 1:
      raise UserError(f'--{name}={getattr(args, name):g} must be between 0 and 1')
  if args.split not in openmoji.SPLITS:
    raise UserError(
      f'--split: unknown split {args.split!r}; choose from {", ".join(openmoji.SPLITS)}'
    )
  if args.prompts_file is not None and args.measure != alignment.RANKER:
    raise UserError(
      "--prompts_file: OpenMoji's judge knows only OpenMoji's prompts; add --measure=ranker"
    )
  for candidate in args.candidates:
    if not 0 <= candidate < 1:
      raise UserError(
        f'--candidates: {candidate:g} must be at least 0 and below 1, which skips nothing'
      )
  sampling_flags.given(args)
