"""`parti-jax evaluate --dataset=imagenet`: draws the same number of pictures of each class."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from parti_jax.cli import evaluate_measurements
from parti_jax.cli import evaluate_reference
from parti_jax.cli import sampling_flags
from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.evaluation import class_samples
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection
from parti_jax.evaluation.metrics import features
from parti_jax.sampling import sheets

# Flags that only apply to this data set, with their defaults.
DEFAULTS: dict[str, Any] = {
  'classes': None,
  'label': 'name',
  'template': '{}',
  'per_class': 50,
  'samples': ['npz'],
  'sample_size': None,
}


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of classes; their defaults are None."""
  classes = parser.add_argument_group('imagenet')
  classes.add_argument(
    '--classes',
    metavar='FILE',
    help='names of the classes in the order of their ids: LOC_synset_mapping.txt, synset_words.txt, '
    'imagenet_class_index.json, or any text file with a name on each line',
  )
  classes.add_argument(
    '--label',
    metavar='NAME',
    help='the text of a class: name, or id for its number, which class-conditional generators read '
    '(default: name)',
  )
  classes.add_argument(
    '--template',
    metavar='TEXT',
    help='text around a name, with {} in its place (default: {}, only the name)',
  )
  classes.add_argument(
    '--per_class', type=int, metavar='N', help='number of pictures of each class (default: 50)'
  )
  classes.add_argument(
    '--samples',
    nargs='+',
    metavar='FORM',
    help=f'{class_samples.NPZ_FILE} as evaluators read it (npz), or a folder of PNG files (png), or '
    'both (default: npz)',
  )
  classes.add_argument(
    '--sample_size',
    type=int,
    metavar='PIXELS',
    help="height and width of these pictures (default: the model's)",
  )


def check(args: argparse.Namespace):
  """Raises UserError for flags that don't apply to --dataset=imagenet, or are missing."""
  if args.classes is None:
    raise UserError(
      '--dataset=imagenet needs --classes FILE, the names of the classes in the order of their ids'
    )
  if args.inception_weights is not None and args.reference is None:
    raise UserError(
      '--inception_weights needs --reference PATH with --dataset=imagenet: real pictures that the samples '
      'are compared with'
    )
  if args.sample_size is not None:
    checks.whole_number('--sample_size', args.sample_size, 1, features.LARGEST_SIZE)
  for form in args.samples:
    if form not in class_samples.FORMS:
      raise UserError(
        f'--samples: unknown form {form!r}; choose from {", ".join(class_samples.FORMS)}'
      )
  class_names.read(args.classes).texts(args.label, args.template)


def claim(args: argparse.Namespace) -> dict[str, Any]:
  """Returns what the points of a sweep depend on besides the flags of all data sets."""
  texts = class_names.read(args.classes).texts(args.label, args.template)
  return {
    'classes': output_folder.fingerprint(*(text.encode() for text in texts)),
    'per_class': args.per_class,
    'sample_size': args.sample_size,
  }


def _texts(args: argparse.Namespace, model) -> tuple[class_names.Classes, list[str]]:
  """Returns the classes and their texts; raises UserError if the model doesn't draw them."""
  classes = class_names.read(args.classes)
  texts = classes.texts(args.label, args.template)
  known = getattr(model.config, 'classes', None)
  if known is not None and args.label != 'id':
    raise UserError(
      f'--label={args.label}: the model {model.model_name} draws classes by their numbers; give '
      '--label=id'
    )
  if known is not None and len(texts) > known:
    raise UserError(
      f'--classes {args.classes} has {len(texts):,} classes, but the model '
      f'{model.model_name} knows {known:,}'
    )
  return classes, texts


def rejection_of_classes(
  args: argparse.Namespace, shared
) -> tuple[rejection.Report, dict[str, measurement.Measurement]]:
  """Compares the samples that the ranker accepts at several shares with --reference.

  Args:
    args: the checked flags.
    shared: has the model and what to compare with, `evaluate_shared.Shared`.

  Returns:
    The report, and the measurement of each share.

  Raises:
    UserError: the model doesn't draw these classes, the classes have no names, or the output folder
      can't be written or holds another run.
  """
  classes, texts = _texts(args, shared.model)
  asked = rejection.Asked(
    'samples of classes',
    texts * args.per_class,
    classes.texts('name', args.template) * args.per_class,
    shared.against.size,
  )
  claimed = {'label': args.label, 'template': args.template, **claim(args)}

  def complete(found: measurement.Measurement) -> measurement.Measurement:
    drawn = evaluate_measurements.subject_of(
      args, args.seed, args.num_images, shared.model.image_size
    )
    return dataclasses.replace(found, subject={**found.subject, **drawn})

  return evaluate_reference.compare_accepted(args, shared, asked, claimed, complete)


def run(args: argparse.Namespace, shared):
  """Draws pictures of classes.

  Args:
    args: the checked flags.
    shared: has the model, and with --reference what to compare with, `evaluate_shared.Shared`.

  Returns:
    The report, its contact sheets by name, and their folder.

  Raises:
    UserError: the model doesn't draw these classes, or the output folder can't be written or holds
      another run.
  """
  classes, texts = _texts(args, shared.model)
  against = None if args.reference is None else shared.against
  folder = output_folder.make(args.output_dir)
  sampling = sampling_flags.overriding(args)
  digest = output_folder.fingerprint(*(text.encode() for text in texts))
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'classes': digest,
      'per_class': args.per_class,
      'num_images': args.num_images,
      'sample_size': args.sample_size,
      'seed': args.seed,
      'sampling': sampling | sampling_flags.given_precision(args),
      'model': output_folder.model_fingerprint(args.model),
      'ranker': output_folder.ranker_fingerprint(args.ranker if args.num_images > 1 else None),
    },
  )
  if against is not None:
    _ = against.store  # Damaged references are found before pictures are drawn.
  report, shown = class_samples.draw(
    shared.model,
    texts,
    args.per_class,
    folder,
    label=args.label,
    template=args.template,
    forms=args.samples,
    sample_size=args.sample_size,
    num_images=args.num_images,
    seed=args.seed,
    texts_digest=digest,
    names=classes.texts('name', args.template) if classes.named else None,
    progress=True,
    batch_size=args.batch_size,
    **sampling,
  )
  page = sheets.sheet(
    f'The first picture of {len(shown.texts)} of {len(texts)} classes',
    shown.texts,
    [[image] for image in shown.images],
  )
  return report, {'contact_sheet': page}, folder
