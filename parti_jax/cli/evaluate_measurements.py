"""The numbers of `parti-jax evaluate` as measurements, each with its protocol.

{name: measurement}: a name begins with the split where there are several, and ends in what judged the
pictures ('judge') or in the features over which they were compared as a set ('inception', 'ranker').
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from parti_jax.cli import sampling_flags
from parti_jax.data import class_names
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import class_samples
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection
from parti_jax.evaluation.datasets import captioned_pictures
from parti_jax.evaluation.datasets import generated_set
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.openmoji import report as report_lib
from parti_jax.evaluation.openmoji import scene_report

_OVER_PROMPTS = 'standard error over prompts'
_OVER_CLASSES = 'standard error over classes'
# Row of generated pictures -> the end of its measurement's name.
_JUDGED_ROWS = {'generated': 'judge', 'ranked_first': 'judge_of_ranked_first'}


def of_openmoji(
  args: argparse.Namespace, report: report_lib.Report, shared
) -> dict[str, measurement.Measurement]:
  """Returns the measurements of an evaluation on OpenMoji.

  Args:
    args: the flags.
    report: the report.
    shared: has the model, the judge and the extractors, `evaluate_shared.Shared`.
  """
  subject = subject_of(args, report.seed, report.num_images, report.image_size)
  real = _of_emoji(shared)
  found = {}
  for split in report.splits:
    captions = [prompt['caption'] for prompt in split.of_prompt]
    protocol = {
      'dataset': f'OpenMoji, {split.split}',
      'prompts': split.prompts,
      'digest': _digest(captions),
      'real_digest': real,
      'picture_size': report.image_size,
    }
    for row, name in _JUDGED_ROWS.items():
      if row in split.rows:
        found[f'{split.split}/{name}'] = measurement.Measurement(
          'openmoji',
          {**protocol, 'judge': 'nearest real picture in pixels'},
          subject | _of_ranker(args, row),
          _shares(split.rows[row]),
          split.remarks(),
        )
    for table, extractor in zip(split.distributions, shared.extractors):
      found[f'{split.split}/{_kind(extractor)}'] = _as_set(
        args, 'openmoji', protocol, subject, table.rows['generated'], table.remarks, extractor
      )
  return found


def of_scenes(
  args: argparse.Namespace, report: scene_report.Report, shared
) -> dict[str, measurement.Measurement]:
  """Returns the measurements of an evaluation on scenes; the arguments are those of `of_openmoji`."""
  del shared
  subject = subject_of(args, report.seed, report.num_images, report.image_size)
  settings = openmoji_scenes.Settings(of_seen_names=args.of_seen_names)
  found = {}
  for split in report.splits:
    protocol = {
      'dataset': f'scenes of OpenMoji, {split.split}',
      'scenes': openmoji_grammar.digest(settings),
      'prompts': split.prompts,
      'digest': _digest([prompt['caption'] for prompt in split.of_prompt]),
      'picture_size': report.image_size,
      'judge': 'connected parts against all drawings',
    }
    for row, name in _JUDGED_ROWS.items():
      if row in split.rows:
        shares = split.rows[row]
        values = {f'task.{task}': metric for task, metric in shares.tasks.items()}
        values |= {f'aspect.{aspect}': metric for aspect, metric in shares.aspects.items()}
        found[f'{split.split}/{name}'] = measurement.Measurement(
          'openmoji_scenes', protocol, subject | _of_ranker(args, row), _shares(values)
        )
  return found


def of_classes(
  args: argparse.Namespace, report: class_samples.Report, shared
) -> dict[str, measurement.Measurement]:
  """Returns how the samples compare with --reference, and what the ranker recognizes.

  Args:
    args: the flags.
    report: the report of the samples, which are in the output folder.
    shared: has the reference, `evaluate_shared.Shared`.
  """
  found = {}
  if args.reference is not None:
    folder = pathlib.Path(args.output_dir)
    form = 'npz' if 'npz' in args.samples else 'png'
    name = {'npz': class_samples.NPZ_FILE, 'png': class_samples.PNG_FOLDER}[form]
    samples = picture_sets.open_path(str(folder / name))
    found[measurement.REFERENCE] = shared.against.measure(samples, folder)
  if report.recognized is None:
    return found
  values = {
    'alignment': report.recognized.alignment,
    'class_top1': report.recognized.top1,
    'class_top5': report.recognized.top5,
  }
  found['ranker'] = measurement.Measurement(
    'classes',
    {
      'classes': report.classes,
      'names': _digest(class_names.read(args.classes).texts('name', args.template)),
      'per_class': report.per_class,
      'features': _ranker_protocol(args),
    },
    subject_of(args, report.seed, report.num_images, report.model_image_size)
    | {'label': report.label, 'texts': report.texts},
    {
      name: measurement.Value(one.mean, one.error, '' if one.error is None else _OVER_CLASSES)
      for name, one in values.items()
    },
  )
  return found


def of_captions(
  args: argparse.Namespace, report: captions_evaluation.Report, shared
) -> dict[str, measurement.Measurement]:
  """Returns the measurements of an evaluation on captions.

  Args:
    args: the flags.
    report: the report.
    shared: has the captions, the real pictures and the extractors, `evaluate_shared.Shared`.
  """
  if args.reference is not None:
    return _of_captions_against_reference(args, report, shared)
  subject = subject_of(args, report.seed, report.num_images, report.model_image_size)
  found = {}
  for table, extractor in zip(report.distributions, shared.extractors):
    found[_kind(extractor)] = _as_set(
      args,
      'captions',
      {
        'dataset': report.dataset,
        'captions': report.captions,
        'digest': _digest(shared.captioned.captions),
        'real_digest': shared.real.digests[extractor.image_size],
      },
      subject,
      table.rows['generated'],
      table.remarks,
      extractor,
    )
  return found


def _of_captions_against_reference(
  args: argparse.Namespace, report: captions_evaluation.Report, shared
) -> dict[str, measurement.Measurement]:
  """Returns how the pictures compare with --reference, and their alignment by the ranker."""
  folder = pathlib.Path(args.output_dir)
  shards = captions_evaluation.generated(folder, shared.captioned)
  samples = generated_set.GeneratedSet(str(shards.folder), shards, report.model_image_size)
  compared = shared.against.measure(samples, folder)
  found = {measurement.REFERENCE: with_captions(args, shared, compared)}
  for table in report.distributions:
    row = table.rows['generated']
    found['ranker'] = measurement.Measurement(
      'captions',
      {
        **_of_captions(shared.captioned),
        'pictures': row.pictures,
        'features': _ranker_protocol(args),
      },
      subject_of(args, report.seed, report.num_images, report.model_image_size),
      measurement.of_row(row, inception=False),
      table.remarks,
    )
  return found


def with_captions(
  args: argparse.Namespace, shared, found: measurement.Measurement
) -> measurement.Measurement:
  """Adds the captions to the protocol of a comparison with a reference, and what drew the pictures.

  Args:
    args: the flags.
    shared: has the captions and the model, `evaluate_shared.Shared`.
    found: the comparison.
  """
  captioned = shared.captioned
  drawn = subject_of(args, args.seed, args.num_images, shared.model.image_size)
  return dataclasses.replace(
    found,
    kind='captions',
    protocol={**_of_captions(captioned), **found.protocol},
    subject={**found.subject, **drawn},
    remarks=[*captions_evaluation.skipped_remarks(captioned.skipped), *found.remarks],
  )


def _of_captions(captioned: captioned_pictures.Captioned) -> dict[str, Any]:
  """Returns what a protocol says of captions."""
  return {
    'dataset': captioned.name,
    'captions': len(captioned.captions),
    'digest': _digest(captioned.captions),
  }


def of_rejection(
  args: argparse.Namespace,
  report: rejection.Report,
  comparisons: Sequence[rejection.Comparison],
  shared,
) -> dict[str, measurement.Measurement]:
  """Returns a measurement for each share of acceptance, set of pictures and kind of features.

  Args:
    args: the flags.
    report: the report.
    comparisons: what it compares with.
    shared: has the real pictures and the extractors, `evaluate_shared.Shared`.
  """
  subject = subject_of(args, report.seed, report.num_images, shared.model.image_size)
  found = {}
  tables = iter(report.tables)
  for comparison in comparisons:
    for extractor in shared.extractors:
      table = next(tables)
      for share in table.shares:
        place = f'{comparison.name}/' if len(comparisons) > 1 else ''
        found[f'share={share.share:g}/{place}{_kind(extractor)}'] = _as_set(
          args,
          'rejection',
          {
            'dataset': comparison.name,
            'captions': len(comparison.captions),
            'digest': _digest(comparison.captions),
            'real_digest': _of_emoji(shared)
            if args.dataset == 'openmoji'
            else shared.real.digests[extractor.image_size],
            'compared': report.compared,
          },
          subject
          | {
            'share': share.share,
            'accepted': share.accepted,
            'ranker': output_folder.ranker_weights(args.ranker or args.model),
          },
          share.row,
          table.remarks(),
          extractor,
        )
  return found


def _as_set(
  args: argparse.Namespace,
  kind: str,
  protocol: Mapping[str, Any],
  subject: Mapping[str, Any],
  row: distribution.Row,
  remarks: Sequence[str],
  extractor: features.Extractor,
) -> measurement.Measurement:
  """Returns the measurement of generated pictures that were compared with real ones as a set."""
  inception = isinstance(extractor, features.Inception)
  return measurement.Measurement(
    kind,
    {
      **protocol,
      'pictures': row.pictures,
      'real_pictures': row.real,
      'picture_size': extractor.image_size,
      # Generated pictures are enlarged, or reduced, to the size of the real ones.
      'resize': 'as its authors' if extractor.resizes else picture_sets.RESIZE_FILTER,
      'compression': 'lossless',
      'features': {'name': 'Inception v3', 'weights': extractor.digest}
      if isinstance(extractor, features.Inception)
      else _ranker_protocol(args),
    },
    subject,
    measurement.of_row(row, inception),
    list(remarks),
  )


def _ranker_protocol(args: argparse.Namespace) -> dict[str, Any]:
  return {'name': 'ranker', 'weights': output_folder.ranker_weights(args.ranker or args.model)}


def _of_emoji(shared) -> str:
  """Returns the digest of all real pictures of OpenMoji at the model's size."""
  return hashlib.sha256(shared.judge.images.tobytes()).hexdigest()


def _kind(extractor: features.Extractor) -> str:
  return 'inception' if isinstance(extractor, features.Inception) else 'ranker'


def subject_of(
  args: argparse.Namespace, seed: int, num_images: int, picture_size: int
) -> dict[str, Any]:
  """Returns what drew the pictures.

  Args:
    args: the flags.
    seed: seed of the pictures.
    num_images: pictures drawn for each prompt.
    picture_size: their height and width, in pixels.
  """
  return {
    'model': args.model or 'demo',
    'weights': output_folder.model_fingerprint(args.model),
    'seed': seed,
    'num_images': num_images,
    'picture_size': picture_size,
    'sampling': sampling_flags.overriding(args) | sampling_flags.given_precision(args),
  }


def _of_ranker(args: argparse.Namespace, row: str) -> dict[str, Any]:
  """Returns the ranker that chose the pictures of a row; {} if none did."""
  if row == 'generated':
    return {}
  return {'chosen_by': output_folder.ranker_weights(args.ranker or args.model)}


def _shares(metrics: Mapping[str, report_lib.Metric]) -> dict[str, measurement.Value]:
  """Returns the shares that are defined."""
  return {
    name: measurement.Value(
      metric.mean, metric.standard_error, '' if metric.standard_error is None else _OVER_PROMPTS
    )
    for name, metric in metrics.items()
    if metric.mean is not None
  }


def _digest(captions: Sequence[str]) -> str:
  return output_folder.fingerprint(*(text.encode() for text in captions))
