"""`parti-jax evaluate --rejection`: compares the pictures that the ranker accepts."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

from parti_jax.cli import evaluate_captions
from parti_jax.cli import evaluate_classes
from parti_jax.cli import evaluate_measurements
from parti_jax.cli import evaluate_shared
from parti_jax.cli import sampling_flags
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection


def run(args: argparse.Namespace, shared: evaluate_shared.Shared) -> int:
  """Compares the pictures that the ranker accepts at several shares; returns the exit status."""
  rejection.check_ranker(shared.model)
  if args.reference is not None:
    of_dataset = evaluate_classes.rejection_of_classes
    if args.dataset != 'imagenet':
      of_dataset = evaluate_captions.rejection_of_captions
    return _write(args, *of_dataset(args, shared))
  folder = output_folder.make(args.output_dir)
  sampling = sampling_flags.overriding(args)
  if args.dataset == 'openmoji':
    comparisons = [
      rejection.of_openmoji(
        shared.judge, split, args.max_prompts, args.train_prompts, args.seed, shared.extractors
      )
      for split in args.splits
    ]
  else:
    comparisons = [rejection.of_captions(shared.captioned, shared.real)]
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'num_images': args.num_images,
      'seed': args.seed,
      'sampling': sampling | sampling_flags.given_precision(args),
      'captions': output_folder.fingerprint(
        *(text.encode() for found in comparisons for text in found.captions)
      ),
      'model': output_folder.model_fingerprint(args.model),
    },
  )
  report = rejection.evaluate(
    shared.model,
    comparisons,
    shared.extractors,
    folder,
    args.rejection,
    args.num_images,
    args.seed,
    progress=True,
    batch_size=args.batch_size,
    **sampling,
  )
  measured = evaluate_measurements.of_rejection(args, report, comparisons, shared)
  return _write(args, report, measured)


def _write(
  args: argparse.Namespace,
  report: rejection.Report,
  measured: Mapping[str, measurement.Measurement],
) -> int:
  """Prints the table and writes the files of `run`; returns the exit status."""
  folder = pathlib.Path(args.output_dir)
  report = dataclasses.replace(
    report, sampling={**report.sampling, **sampling_flags.given_precision(args)}
  )
  print(report.text())
  picture = report.picture()
  files = {} if picture is None else {'rejection.png': output_folder.png(picture)}
  numbers = measurement.with_measurements(report.json(), measured)
  files |= {'rejection.md': report.markdown().encode(), 'rejection.json': numbers.encode()}
  for name, content in files.items():
    output_folder.write(folder / name, content)
    print(folder / name)
  return 0
