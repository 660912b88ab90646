"""`parti-jax evaluate --sweep`: evaluates at several settings, and draws the curve."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from parti_jax.cli import evaluate_classes
from parti_jax.cli import sampling_flags
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import sweep
from parti_jax.evaluation.metrics import features
from parti_jax.exported_model import sampling_settings

_DEFAULTS = sampling_settings.SamplingSettings()
# The settings that can vary.
_NAMES = tuple(field.name for field in dataclasses.fields(_DEFAULTS))
# Flags that determine the numbers of a point, besides those of sampling and files.
_OF_POINTS = (
  'dataset',
  'splits',
  'max_prompts',
  'train_prompts',
  'num_captions',
  'num_images',
  'rank',
  'seed',
  'image_size',
)
_REPORT = 'report.json'
_MAX_REPORT = 2**28


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of sweeps and of rejection."""
  group = parser.add_argument_group(
    'curves, for openmoji, coco, localized_narratives and, with --reference, imagenet'
  )
  group.add_argument(
    '--sweep',
    nargs='+',
    metavar='SETTING=VALUES',
    help='evaluate at each combination of values, such as guidance_scale=1,1.5,2 top_p=0.9,1, and draw '
    'the Fréchet distance against the alignment; finished points are kept, so a stopped sweep '
    'resumes, and more values can be added later',
  )
  group.add_argument(
    '--rejection',
    nargs='+',
    type=float,
    metavar='SHARE',
    help='draw --num_images pictures for each prompt, accept these shares of them by the ranker, such '
    'as 1 0.5 0.05, and compare the same number of accepted pictures at each',
  )


def check(args: argparse.Namespace):
  """Checks the flags and parses `args.sweep` to {setting: values}.

  Raises:
    UserError: a setting or value is invalid; the message names it.
  """
  if args.sweep is not None and args.rejection is not None:
    raise UserError('--sweep and --rejection exclude each other; run them one after the other')
  if args.rejection is not None:
    args.rejection = _shares(args.rejection, args.num_images)
  if args.sweep is None:
    return
  found: dict[str, tuple[Any, ...]] = {}
  for entry in args.sweep:
    name, equals, values = entry.partition('=')
    if name not in _NAMES or not equals:
      raise UserError(
        f'--sweep {entry}: expected SETTING=VALUE,VALUE with a setting of {", ".join(_NAMES)}'
      )
    if name in found:
      raise UserError(f'--sweep {entry}: {name} is given twice')
    if getattr(args, name) is not None:
      raise UserError(f'--sweep {entry}: leave out --{name}, which is one of the values')
    found[name] = _values(name, values, entry)
  base = sampling_flags.given(args)
  for chosen in _points(found):
    # Some values exclude others, so that each point is checked before the first one.
    _DEFAULTS.replace(**(base | chosen))
  args.sweep = found


def _shares(shares: Sequence[float], num_images: int) -> list[float]:
  """Returns the shares in ascending order; each accepts a picture."""
  for share in shares:
    if not (math.isfinite(share) and 0 < share <= 1):
      raise UserError(f'--rejection {share:g}: a share is above 0, and at most 1')
    if share * num_images < 1 - 1e-9:
      raise UserError(
        f'--rejection {share:g}: of --num_images={num_images} pictures that is not even one; draw '
        f'--num_images={math.ceil(1 / share - 1e-9)}'
      )
  return sorted(set(shares))


def _values(name: str, text: str, entry: str) -> tuple[Any, ...]:
  """Returns the values of a setting."""
  kind = type(getattr(_DEFAULTS, name))
  values = []
  for part in text.split(','):
    try:
      value = kind(part.strip())
    except ValueError as error:
      raise UserError(f'--sweep {entry}: {part!r} is not a value of {name}') from error
    if value in values:
      raise UserError(f'--sweep {entry}: {part} is given twice')
    values.append(value)
  return tuple(values)


def _points(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """Returns all combinations of values; the first setting varies fastest."""
  names = list(settings)
  combinations = itertools.product(*(settings[name] for name in reversed(names)))
  return [dict(zip(names, reversed(values))) for values in combinations]


def run(
  args: argparse.Namespace, shared, evaluate: Callable[[argparse.Namespace], list[pathlib.Path]]
) -> int:
  """Evaluates the points that the output folder doesn't have, and writes the curves.

  Args:
    args: the checked flags.
    shared: the model and the real pictures, `evaluate_shared.Shared`.
    evaluate: evaluates with flags and writes the report to their output folder.

  Returns:
    0, the exit status.

  Raises:
    UserError: the model has nothing to compare pictures with, or the output folder can't be written or
      holds another run.
  """
  if args.reference is None and not shared.extractors:
    raise UserError(
      f'--sweep: the model {shared.model.model_name} has no ranker whose features could be used to '
      'compare pictures; give --inception_weights or --ranker'
    )
  claim = _claim(args, shared)
  folder = output_folder.make(args.output_dir)
  output_folder.claim(folder, claim)
  points = _points(args.sweep)
  reports = []
  for number, chosen in enumerate(points, 1):
    name = _name(chosen)
    place = folder / 'points' / name
    if not (place / _REPORT).exists():
      print(f'point {number} of {len(points)}: {name}')
      evaluate(
        argparse.Namespace(**(vars(args) | chosen | {'output_dir': str(place), 'sweep': None}))
      )
    reports.append((chosen, _read(place / _REPORT, args.reference is not None)))
  measured = {
    _name(chosen): _measurements(folder / 'points' / _name(chosen), report)
    for chosen, report in reports
  }
  _check_protocols(measured)
  report = sweep.Report(args.sweep, claim, sweep.curves(reports))
  print(report.text())
  picture = report.picture()
  files = {} if picture is None else {'sweep.png': output_folder.png(picture)}
  of_points = {
    f'{point}/{name}': one for point, found in measured.items() for name, (_, one) in found.items()
  }
  numbers = measurement.with_measurements(report.json(), of_points)
  files |= {'sweep.md': report.markdown().encode(), 'sweep.json': numbers.encode()}
  for name, content in files.items():
    output_folder.write(folder / name, content)
    print(folder / name)
  return 0


def _name(chosen: Mapping[str, Any]) -> str:
  """Returns the name of a point's folder."""
  return ','.join(f'{key}={sweep.value_text(value)}' for key, value in chosen.items())


def _measurements(
  place: pathlib.Path, report: Mapping[str, Any]
) -> dict[str, tuple[str, measurement.Measurement]]:
  """Returns the measurements of a point: {name: (file, measurement)}."""
  path = place / _REPORT
  found = {name: (str(path), one) for name, one in measurement.of_report(str(path), report).items()}
  # The reports of older versions have none, but those of captions have files next to them.
  for file in [] if found else sorted(place.glob('measurement*.json')):
    name = 'ranker' if file.stem.endswith('_ranker') else 'inception'
    found[name] = str(file), measurement.read(str(file))
  return found


def _check_protocols(
  points: Mapping[str, Mapping[str, tuple[str, measurement.Measurement]]],
) -> None:
  """Raises UserError if measurements of points were made by unlike protocols.

  Real pictures, for example, may have been replaced between two runs of a sweep.
  """
  first: dict[str, tuple[str, measurement.Measurement]] = {}
  for found in points.values():
    for name, (path, one) in found.items():
      other, expected = first.setdefault(name, (path, one))
      if different := measurement.differences(expected.protocol, one.protocol):
        raise UserError(
          f'{other} and {path} were not measured by the same protocol; they differ in '
          f'{", ".join(different)}. Delete the folder of the point that is out of date, and the sweep '
          'evaluates it again'
        )


def _claim(args: argparse.Namespace, shared) -> dict[str, Any]:
  """Returns what the points depend on, except the settings that vary."""
  sampling = sampling_flags.overriding(args)
  claim: dict[str, Any] = {name: getattr(args, name) for name in _OF_POINTS}
  claim |= {
    'sampling': sampling | sampling_flags.given_precision(args),
    'model': output_folder.model_fingerprint(args.model),
    'ranker': output_folder.ranker_fingerprint(args.ranker),
  }
  if args.reference is not None:
    claim |= shared.against.identity
  else:
    claim |= {
      'features': [extractor.name for extractor in shared.extractors],
      'inception_weights': next(
        (found.digest for found in shared.extractors if isinstance(found, features.Inception)), None
      ),
    }
  if args.dataset == 'imagenet':
    claim |= evaluate_classes.claim(args)
  elif args.dataset != 'openmoji':
    captions = shared.captioned.captions
    claim['captions'] = output_folder.fingerprint(*(text.encode() for text in captions))
  return claim


def _read(path: pathlib.Path, against_reference: bool) -> Mapping[str, Any]:
  """Returns the content of a point's report."""
  try:
    with path.open('rb') as file:
      content = json.loads(file.read(_MAX_REPORT))
    sweep.curves([({}, content)])
    if (measurement.REFERENCE in content.get(measurement.MEASUREMENTS, {})) != against_reference:
      raise ValueError
    return content
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    UserError,
  ) as error:
    raise UserError(
      f'{path} is damaged; delete it, and the sweep evaluates this point again'
    ) from error
