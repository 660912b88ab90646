"""`parti-jax evaluate`: generates pictures for a data set's prompts and judges them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from parti_jax.cli import evaluate_captions
from parti_jax.cli import evaluate_classes
from parti_jax.cli import evaluate_flags
from parti_jax.cli import evaluate_measurements
from parti_jax.cli import evaluate_openmoji
from parti_jax.cli import evaluate_rejection
from parti_jax.cli import evaluate_shared
from parti_jax.cli import evaluate_sweep
from parti_jax.cli import sampling_flags
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import samples_evaluation

# Files of the measurements on captions, besides report.json.
_MEASUREMENT_FILES = {'inception': 'measurement.json', 'ranker': 'measurement_ranker.json'}


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  evaluate_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Evaluates, prints the table, and writes the report and the contact sheets.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, an unknown split, files that can't be read, or an output folder that
      can't be written or holds another run.
  """
  evaluate_flags.check(args)
  shared = evaluate_shared.Shared(args)
  if args.reference is not None:
    _ = shared.reference  # A file that can't be read is found before anything is loaded.
  if args.rejection is not None:
    return evaluate_rejection.run(args, shared)
  if args.sweep is not None:
    return evaluate_sweep.run(args, shared, lambda point: _point(point, shared))
  for path in _point(args, shared):
    print(path)
  return 0


def _point(args: argparse.Namespace, shared: evaluate_shared.Shared) -> list[pathlib.Path]:
  """Evaluates with the flags, prints the table, and returns the files, of which report.json is last."""
  evaluate, measurements_of = {
    'openmoji': (evaluate_openmoji.run, evaluate_measurements.of_openmoji),
    'openmoji_scenes': (evaluate_openmoji.run_scenes, evaluate_measurements.of_scenes),
    'imagenet': (evaluate_classes.run, evaluate_measurements.of_classes),
  }.get(args.dataset, (evaluate_captions.run, evaluate_measurements.of_captions))
  report, pages, folder = evaluate(args, shared)
  sampling = {**report.sampling, **sampling_flags.given_precision(args)}
  report = dataclasses.replace(report, sampling=sampling)
  print(report.text())
  files = {f'{name}.png': output_folder.png(page) for name, page in pages.items()}
  measured = measurements_of(args, report, shared)
  if measurement.REFERENCE in measured:
    found = measured[measurement.REFERENCE]
    print(found.text())
    files |= samples_evaluation.files(found)
  elif args.dataset in ('coco', 'localized_narratives'):
    for name, found in measured.items():
      files[_MEASUREMENT_FILES[name]] = found.json().encode()
  files['report.md'] = report.markdown().encode()
  files['report.json'] = measurement.with_measurements(report.json(), measured).encode()
  for name, content in files.items():
    output_folder.write(folder / name, content)
  return [folder / name for name in files]
