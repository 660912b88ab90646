"""`parti-jax evaluate` on captions of pictures."""

from __future__ import annotations

import argparse
import functools

from parti_jax.cli import evaluate_measurements
from parti_jax.cli import evaluate_reference
from parti_jax.cli import evaluate_shared
from parti_jax.cli import sampling_flags
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection
from parti_jax.sampling import sheets


def run(args: argparse.Namespace, shared: evaluate_shared.Shared):
  """Evaluates on captions of pictures; returns the same values as `evaluate_openmoji.run`."""
  captioned, model = shared.captioned, shared.model
  # Networks that can't be read are found before the folder is made.
  _ = shared.extractors if args.reference is None else shared.against
  folder = output_folder.make(args.output_dir)
  sampling = sampling_flags.overriding(args)
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'num_captions': args.num_captions,
      'seed': args.seed,
      'num_images': args.num_images,
      'sampling': sampling | sampling_flags.given_precision(args),
      'captions': output_folder.fingerprint(*(text.encode() for text in captioned.captions)),
      'model': output_folder.model_fingerprint(args.model),
      # Of one picture for each caption the ranker has nothing to choose.
      'ranker': output_folder.ranker_fingerprint(args.ranker if args.num_images > 1 else None),
    },
  )
  drawing = {
    'num_images': args.num_images,
    'seed': args.seed,
    'progress': True,
    'batch_size': args.batch_size,
    **sampling,
  }
  if args.reference is None:
    report, shown = captions_evaluation.evaluate(
      model, captioned, shared.extractors, folder, real=lambda: shared.real, **drawing
    )
    title = 'for each caption the real picture (left) and the generated one (right)'
  else:
    _ = shared.against.store  # Damaged references are found before pictures are drawn.
    report, shown = captions_evaluation.draw(model, captioned, folder, **drawing)
    title = 'generated pictures'
  pages = {}
  if shown.captions:
    pages['contact_sheet'] = sheets.sheet(
      f'{captioned.name}: {title}', shown.captions, list(zip(*shown.columns)), columns=4
    )
  return report, pages, folder


def rejection_of_captions(
  args: argparse.Namespace, shared: evaluate_shared.Shared
) -> tuple[rejection.Report, dict[str, measurement.Measurement]]:
  """Compares the pictures of captions that the ranker accepts with --reference."""
  captioned = shared.captioned
  captions = list(captioned.captions)
  return evaluate_reference.compare_accepted(
    args,
    shared,
    rejection.Asked(captioned.name, captions, captions, shared.model.image_size),
    {'captions': output_folder.fingerprint(*(text.encode() for text in captions))},
    functools.partial(evaluate_measurements.with_captions, args, shared),
  )
