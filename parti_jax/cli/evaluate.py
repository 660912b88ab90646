"""`parti-jax evaluate`: generates pictures for a data set's prompts and judges them."""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import parti_jax
from parti_jax.cli import evaluate_classes
from parti_jax.cli import evaluate_measurements
from parti_jax.cli import evaluate_reference
from parti_jax.cli import evaluate_sweep
from parti_jax.cli import sampling_flags
from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import start_cache
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import coco
from parti_jax.evaluation.datasets import localized_narratives
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.openmoji import contact_sheet
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.evaluation.openmoji import openmoji_report
from parti_jax.evaluation.openmoji import scene_evaluation
from parti_jax.sampling import sheets

DATASETS = ('openmoji', 'openmoji_scenes', 'coco', 'localized_narratives', 'imagenet')
_SPLITS = {'openmoji': openmoji.SPLITS, 'openmoji_scenes': openmoji_scenes.SPLITS}

# Flags that only apply to some data sets, with their defaults.
_OF_DATASETS: dict[tuple[str, ...], dict[str, Any]] = {
  ('openmoji', 'openmoji_scenes'): {
    'splits': [],  # All.
    'max_prompts': None,
    'train_prompts': 200,
    'rank': False,
  },
  ('openmoji_scenes',): {'of_seen_names': False},
  ('coco', 'localized_narratives'): {'annotations': None, 'pictures': None, 'num_captions': 30_000},
  ('coco',): {'tfds_dir': None},
  ('imagenet',): evaluate_classes.DEFAULTS,
  evaluate_reference.DATASETS: {'reference': None},
}
_NUM_IMAGES = {
  'openmoji': 4,
  'openmoji_scenes': 4,
  'coco': 1,
  'localized_narratives': 1,
  'imagenet': 1,
}
# Files of the measurements on captions, besides report.json.
_MEASUREMENT_FILES = {'inception': 'measurement.json', 'ranker': 'measurement_ranker.json'}
# Size at which Inception compares pictures, in pixels.
_IMAGE_SIZE = 256
# Data sets whose pictures are compared with real ones as a set.
_AS_SETS = ('openmoji', 'coco', 'localized_narratives', 'imagenet')


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    '--model', metavar='PATH', help='an exported model (default: the demo model in the package)'
  )
  parser.add_argument(
    '--ranker',
    metavar='PATH',
    help="folder of a ranker to use instead of the model's, such as a CLIP that `parti-jax import` "
    'wrote',
  )
  parser.add_argument(
    '--dataset', default='openmoji', help=f'one of {", ".join(DATASETS)} (default: %(default)s)'
  )
  parser.add_argument(
    '--output_dir',
    default='evaluation',
    metavar='DIR',
    help='output folder of report.json, report.md, contact sheets and, for captions, the '
    'generated pictures (default: %(default)s)',
  )
  parser.add_argument(
    '--num_images',
    type=int,
    help='number of pictures for each prompt (default: 4 for openmoji and openmoji_scenes, else 1; '
    "with more, captions and imagenet use the one that the model's ranker prefers)",
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='seed of the choice of prompts and of the pictures (default: %(default)s)',
  )
  parser.add_argument(
    '--inception_weights',
    metavar='FILE',
    help="Inception's weights for the FID and the inception score, "
    f"{features.INCEPTION_FILE} (default: none; then the features of the model's "
    'ranker are used to compare pictures)',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='size at which Inception compares pictures; a ranker has a fixed one, and imagenet has '
    f'--sample_size (default: {_IMAGE_SIZE})',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    help='number of pictures to generate at once; affects memory, not the pictures',
  )
  sampling_flags.add_arguments(parser)
  sampling_flags.add_precision(parser)
  evaluate_sweep.add_arguments(parser)
  emoji = parser.add_argument_group('openmoji, openmoji_scenes')
  emoji.add_argument(
    '--rank',
    action='store_true',
    default=None,
    help="also judge the picture of each prompt that the model's ranker prefers",
  )
  emoji.add_argument(
    '--of_seen_names',
    action='store_true',
    default=None,
    help="scenes without the things that OpenMoji's split `validation` holds out, for a model that "
    'trained with openmoji_scenes.of_seen_names=True',
  )
  emoji.add_argument(
    '--splits',
    nargs='+',
    metavar='SPLIT',
    help='splits among '
    + ', or '.join(', '.join(splits) for splits in _SPLITS.values())
    + ' (default: all)',
  )
  emoji.add_argument(
    '--max_prompts',
    type=int,
    metavar='N',
    help='maximum number of prompts of a split, chosen at random (default: all)',
  )
  emoji.add_argument(
    '--train_prompts',
    type=int,
    metavar='N',
    help='number of prompts of the train split, chosen at random (default: 200)',
  )
  captions = parser.add_argument_group('coco, localized_narratives')
  captions.add_argument(
    '--annotations',
    metavar='FILE',
    help='captions_val2014.json, or coco_val_localized_narratives.jsonl (default for coco: '
    'coco_captions of tensorflow-datasets)',
  )
  captions.add_argument('--pictures', metavar='DIR', help='folder with the picture files')
  captions.add_argument(
    '--tfds_dir',
    metavar='DIR',
    help='folder where tensorflow-datasets has prepared coco_captions (default: its own folder)',
  )
  captions.add_argument(
    '--num_captions',
    type=int,
    metavar='N',
    help='maximum number of captions, chosen at random (default: 30000)',
  )
  evaluate_classes.add_arguments(parser)
  evaluate_reference.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Evaluates, prints the table, and writes the report and the contact sheets.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, an unknown split, files that can't be read, or an output folder that
      can't be written or holds another run.
  """
  _check_flags(args)
  shared = _Shared(args)
  if args.reference is not None:
    _ = shared.reference  # A file that can't be read is found before anything is loaded.
  if args.rejection is not None:
    return _rejection(args, shared)
  if args.sweep is not None:
    return evaluate_sweep.run(args, shared, lambda point: _point(point, shared))
  for path in _point(args, shared):
    print(path)
  return 0


def _point(args: argparse.Namespace, shared: '_Shared') -> list[pathlib.Path]:
  """Evaluates with the flags, prints the table, and returns the files, of which report.json is last."""
  evaluate, measurements_of = {
    'openmoji': (_openmoji, evaluate_measurements.of_openmoji),
    'openmoji_scenes': (_openmoji_scenes, evaluate_measurements.of_scenes),
    'imagenet': (evaluate_classes.run, evaluate_measurements.of_classes),
  }.get(args.dataset, (_captions, evaluate_measurements.of_captions))
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


class _Shared:
  """What all points of a sweep share: each part is read once, when it is needed.

  Args:
    args: the flags, of which those of sampling are ignored.
  """

  def __init__(self, args: argparse.Namespace):
    self._args = args

  @functools.cached_property
  def model(self):
    """The model."""
    args = self._args
    start_cache.enable()
    model = parti_jax.load(args.model, ranker=args.ranker, **sampling_flags.given_precision(args))
    image_sizes.square(model.image_size, 'parti-jax evaluate compares')
    return model

  @functools.cached_property
  def extractors(self) -> list[features.Extractor]:
    """The networks over whose features sets of pictures are compared.

    Raises:
      UserError: a data set whose pictures are only compared as a set, and no network.
    """
    args = self._args
    found = features.of_flags(self.model, args.inception_weights, args.image_size)
    if not found and args.dataset in ('coco', 'localized_narratives'):
      raise UserError(
        f'the model {self.model.model_name} has no ranker whose features could be used to compare '
        'pictures; give --inception_weights or --ranker'
      )
    return found

  @functools.cached_property
  def reference(self) -> samples_evaluation.Reference:
    """The file or folder of --reference."""
    return samples_evaluation.open_reference(self._args.reference)

  @functools.cached_property
  def against(self) -> evaluate_reference.Against:
    """The reference that generated pictures are compared with, and how."""
    return evaluate_reference.Against(self._args, self.model, self.reference)

  @functools.cached_property
  def judge(self) -> openmoji_judge.Judge:
    """The judge for OpenMoji, with all real pictures."""
    pictures = openmoji.pictures()
    print(f'rendering {len(pictures)} real pictures', file=sys.stderr, flush=True)
    return openmoji_judge.Judge(pictures, self.model.image_size)

  @functools.cached_property
  def captioned(self):
    """The captions and their pictures."""
    args = self._args
    found = _read_captions(args)
    if len(found.captions) < args.num_captions:
      print(
        f'{found.name}: using all {len(found.captions):,} captions, which are fewer than '
        f'--num_captions={args.num_captions}',
        file=sys.stderr,
      )
    return found

  @functools.cached_property
  def real(self) -> captions_evaluation.RealPictures:
    """Features of the real pictures of `captioned`."""
    return captions_evaluation.RealPictures(
      self.model, self.captioned, self.extractors, progress=True
    )


def _openmoji(args: argparse.Namespace, shared: _Shared):
  """Evaluates on OpenMoji; returns the report, its contact sheets by name, and their folder."""
  folder = output_folder.make(args.output_dir)
  pages = {}

  def on_sample(sample):
    pages[sample.split] = contact_sheet.contact_sheet(sample)

  report = openmoji_report.evaluate(
    shared.model,
    args.splits,
    args.num_images,
    args.max_prompts,
    args.seed,
    train_prompts=args.train_prompts,
    judge=shared.judge,
    on_sample=on_sample,
    progress=True,
    extractors=shared.extractors,
    batch_size=args.batch_size,
    rank=args.rank,
    **sampling_flags.given(args),
  )
  return report, pages, folder


def _openmoji_scenes(args: argparse.Namespace, shared: _Shared):
  """Evaluates on scenes made of OpenMoji; returns the same values as `_openmoji`."""
  folder = output_folder.make(args.output_dir)
  settings = openmoji_scenes.Settings(of_seen_names=args.of_seen_names)
  sampling = sampling_flags.overriding(args)
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'seed': args.seed,
      'num_images': args.num_images,
      'max_prompts': args.max_prompts,
      'train_prompts': args.train_prompts,
      'sampling': sampling,
      'scenes': openmoji_grammar.digest(settings)[:16],
      'model': output_folder.model_fingerprint(args.model),
    },
  )
  report, samples = scene_evaluation.evaluate(
    shared.model,
    folder,
    args.splits,
    args.num_images,
    args.max_prompts,
    args.seed,
    train_prompts=args.train_prompts,
    settings=settings,
    rank=args.rank,
    progress=True,
    batch_size=args.batch_size,
    **sampling,
  )
  pages = {sample.split: scene_evaluation.contact_sheet(sample) for sample in samples}
  return report, pages, folder


def _captions(args: argparse.Namespace, shared: _Shared):
  """Evaluates on captions of pictures; returns the same values as `_openmoji`."""
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


def _rejection(args: argparse.Namespace, shared: _Shared) -> int:
  """Compares the pictures that the ranker accepts at several shares; returns the exit status."""
  rejection.check_ranker(shared.model)
  if args.reference is not None:
    of_dataset = evaluate_classes.rejection_of_classes
    if args.dataset != 'imagenet':
      of_dataset = _rejection_of_captions
    return _write_rejection(args, *of_dataset(args, shared))
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
  return _write_rejection(args, report, measured)


def _rejection_of_captions(
  args: argparse.Namespace, shared: _Shared
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


def _write_rejection(
  args: argparse.Namespace,
  report: rejection.Report,
  measured: Mapping[str, measurement.Measurement],
) -> int:
  """Prints the table and writes the files of `_rejection`; returns the exit status."""
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


def _read_captions(args: argparse.Namespace):
  """Reads the captions that the flags select."""
  if args.annotations is None:
    return coco.read_tfds(args.tfds_dir, args.num_captions, args.seed)
  reader = coco if args.dataset == 'coco' else localized_narratives
  return reader.read(args.annotations, args.pictures, args.num_captions, args.seed)


def _check_captions(args: argparse.Namespace):
  """Raises UserError for flags that don't say which captions and pictures to read."""
  if args.annotations is None:
    if args.dataset == 'coco' and args.pictures is None:
      return  # From tensorflow-datasets.
    raise UserError(
      f'--dataset={args.dataset} needs --annotations FILE, and --pictures DIR or --reference PATH'
    )
  if args.tfds_dir is not None:
    raise UserError('--annotations FILE excludes --tfds_dir')
  if (args.pictures is None) == (args.reference is None):
    raise UserError(
      '--annotations FILE needs either --pictures DIR, the pictures of these captions, or --reference '
      'PATH, what all generated pictures are compared with'
    )


def _check_flags(args: argparse.Namespace):
  """Raises UserError for invalid flags, before loading a model, and fills in defaults."""
  if args.dataset not in DATASETS:
    raise UserError(
      f'--dataset: unknown data set {args.dataset!r}; choose from {", ".join(DATASETS)}'
    )
  for datasets, defaults in _OF_DATASETS.items():
    for flag, default in defaults.items():
      if getattr(args, flag) is None:
        setattr(args, flag, default)
      elif args.dataset not in datasets:
        *others, last = datasets
        names = f'{", ".join(others)} and {last}' if others else last
        raise UserError(f'--{flag} only applies to --dataset={names}, not to {args.dataset}')
  if args.num_images is None:
    args.num_images = _NUM_IMAGES[args.dataset]
  counts = (
    'num_images',
    'max_prompts',
    'train_prompts',
    'num_captions',
    'per_class',
    'sample_size',
    'image_size',
    'batch_size',
  )
  for flag in counts:
    value = getattr(args, flag)
    if value is not None and value < 1:
      raise UserError(f'--{flag} must be a positive number, not {value}')
  if args.seed < 0:
    raise UserError(f'--seed={args.seed} must not be negative')
  sampling_flags.check_numbers(args, *counts)
  if args.image_size is None:
    args.image_size = _IMAGE_SIZE
  else:
    checks.whole_number('--image_size', args.image_size, 1, features.LARGEST_SIZE)
    if args.dataset == 'imagenet':
      raise UserError(
        '--image_size does not apply to --dataset=imagenet, whose pictures have --sample_size'
      )
    if args.inception_weights is None:
      raise UserError(
        '--image_size is the size at which Inception compares pictures, and needs --inception_weights '
        'FILE; a ranker compares them at its own size'
      )
  if args.inception_weights is not None and not pathlib.Path(args.inception_weights).is_file():
    raise UserError(
      f"--inception_weights {args.inception_weights} isn't a file; give "
      f'{features.INCEPTION_FILE} of pytorch-fid or torch-fidelity'
    )
  sampling_flags.given(args)
  sampling_flags.given_precision(args)
  if args.dataset == 'openmoji_scenes' and args.inception_weights is not None:
    raise UserError(
      '--inception_weights does not apply to --dataset=openmoji_scenes, whose pictures are judged one '
      'by one'
    )
  for flag in ('sweep', 'rejection'):
    if getattr(args, flag) is None:
      continue
    if args.dataset not in _AS_SETS:
      raise UserError(
        f'--{flag} compares sets of pictures with real ones; it applies to --dataset='
        f'{", ".join(_AS_SETS)}, not to {args.dataset}'
      )
    if args.dataset == 'imagenet' and args.reference is None:
      raise UserError(
        f'--{flag} compares sets of pictures with real ones, for which --dataset=imagenet needs '
        '--reference PATH'
      )
  evaluate_sweep.check(args)
  if args.dataset == 'imagenet':
    evaluate_classes.check(args)
  elif args.dataset in evaluate_reference.DATASETS:
    _check_captions(args)
  known = _SPLITS.get(args.dataset, ())
  args.splits = args.splits or list(known)
  for split in args.splits:
    if split not in known:
      raise UserError(f'--splits: unknown split {split!r}; choose from {", ".join(known)}')
