"""`parti-jax evaluate --reference`: compares generated pictures with statistics or pictures of a file.

Of captions and of classes alike, at one setting, in a sweep, or by the share that a ranker accepts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from parti_jax.cli import evaluate_samples
from parti_jax.cli import sampling_flags
from parti_jax.core.errors import UserError
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import rejection
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import picture_sets

# Data sets that can be compared with a reference.
DATASETS = ('coco', 'localized_narratives', 'imagenet')


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flag, whose default is None."""
  parser.add_argument_group(', '.join(DATASETS)).add_argument(
    '--reference',
    metavar='PATH',
    help='compare the pictures with this .npz of statistics or pictures, or this folder of pictures, as '
    "`parti-jax evaluate_samples` does, over Inception's features with --inception_weights and else over a "
    "ranker's; for captions in place of --pictures, and for imagenet needed for --sweep and --rejection",
  )


class Against:
  """A reference that generated pictures are compared with, at one setting or at several.

  Args:
    args: the flags, with the output folder of the whole command.
    model: the model, whose ranker computes features without --inception_weights.
    reference: what --reference names.

  Raises:
    UserError: the network can't be read, or the reference is an .npz of pictures of another size, or of
      statistics of another network.

  Attributes:
    size: height and width at which pictures are compared, in pixels.
    identity: what the features depend on, for the output folder.
  """

  def __init__(self, args: argparse.Namespace, model, reference: samples_evaluation.Reference):
    self._reference = reference
    self.size, way_out = _size(args, model)
    pictures = reference.pictures
    if isinstance(pictures, picture_sets.NpzSet) and pictures.size() != (self.size, self.size):
      height, width = pictures.size()
      raise UserError(
        f'--reference {args.reference} has pictures of {height}×{width} pixels, but the samples have '
        f'{self.size}×{self.size}; give {way_out}a reference of that size'
      )
    self._extractor, self._of_features = evaluate_samples.network(args, model=model)
    samples_evaluation.check_network(reference, self._extractor, self.size)
    self._folder = pathlib.Path(args.output_dir)
    self.identity: dict[str, Any] = {
      'reference': reference.identity(),
      'features': self._of_features,
    }

  @functools.cached_property
  def store(self) -> feature_blocks.Store:
    """The features of the reference's pictures, which are computed once.

    Raises:
      UserError: pictures can't be read or are too few.
    """
    store = self._store(self._folder / 'reference', 'reference', self.identity['reference'])
    if self._reference.pictures is not None:
      # Pictures of a folder are cropped and resized where they have another size; the protocol says so.
      samples_evaluation.compute(
        self._reference.pictures, self._extractor, store, self.size, progress='reference'
      )
      samples_evaluation.check_number(
        samples_evaluation.facts(store, self._reference.place).pictures, self._reference.place
      )
    return store

  def measure(
    self, samples: picture_sets.PictureSet, folder: pathlib.Path
  ) -> measurement.Measurement:
    """Compares samples, and keeps their features in the folder `measured` of their output folder."""
    store = self._store(folder / 'measured', 'samples', samples.identity())
    samples_evaluation.compute(samples, self._extractor, store, self.size, progress='samples')
    return samples_evaluation.evaluate(
      samples, self._reference, self._extractor, self._of_features, (store, self.store)
    )

  def _store(self, folder: pathlib.Path, name: str, identity: str) -> feature_blocks.Store:
    """Returns the store of a set, so that another reference, network or size has another one."""
    key = json.dumps([identity, self._of_features, self.size], sort_keys=True)
    place = output_folder.make(str(folder / output_folder.fingerprint(key.encode())))
    return feature_blocks.Store(place, name)


def _size(args: argparse.Namespace, model) -> tuple[int, str]:
  """Returns the size at which pictures are compared, and the flag that chooses another one."""
  if args.dataset == 'imagenet':
    return args.sample_size or model.image_size, '--sample_size, or '
  if args.inception_weights is not None:
    return args.image_size, '--image_size, or '
  return model.image_size, ''


def compare_accepted(
  args: argparse.Namespace,
  shared,
  asked: rejection.Asked,
  claimed: Mapping[str, Any],
  complete: Callable[[measurement.Measurement], measurement.Measurement],
) -> tuple[rejection.Report, dict[str, measurement.Measurement]]:
  """Compares the samples that the ranker accepts at several shares with --reference.

  Args:
    args: the checked flags.
    shared: has the model and what to compare with, `evaluate_shared.Shared`.
    asked: what is drawn.
    claimed: what the pictures depend on besides the flags of all data sets.
    complete: adds to the protocol and the subject of a share.

  Returns:
    The report, and the measurement of each share.

  Raises:
    UserError: the output folder can't be written or holds another run.
  """
  ranker = output_folder.ranker_weights(args.ranker or args.model)
  sampling = sampling_flags.overriding(args)
  identity = shared.against.identity
  folder = output_folder.make(args.output_dir)
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'rejection': True,
      'num_images': args.num_images,
      'seed': args.seed,
      'sampling': sampling | sampling_flags.given_precision(args),
      'model': output_folder.model_fingerprint(args.model),
      'ranker': ranker,
      **claimed,
      **identity,
    },
  )
  _ = shared.against.store  # Damaged references are found before pictures are drawn.

  def measure(share: float, accepted: picture_sets.PictureSet) -> measurement.Measurement:
    found = complete(shared.against.measure(accepted, folder))
    count = rejection.accepted_count(share, args.num_images)
    drawn = {'share': share, 'accepted': count, 'ranker': ranker}
    return dataclasses.replace(found, subject={**found.subject, **drawn})

  return rejection.against_reference(
    shared.model,
    asked,
    folder,
    args.rejection,
    args.num_images,
    measure,
    args.seed,
    progress=True,
    batch_size=args.batch_size,
    **sampling,
  )
