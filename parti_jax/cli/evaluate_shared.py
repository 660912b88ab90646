"""What the points of a sweep of `parti-jax evaluate` share: model, networks and real pictures."""

from __future__ import annotations

import argparse
import functools
import sys

from parti_jax.cli import evaluate_reference
from parti_jax.cli import model_flags
from parti_jax.core import image_sizes
from parti_jax.core import texts
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import rejection
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import coco
from parti_jax.evaluation.datasets import localized_narratives
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.openmoji import openmoji_judge


class Shared:
  """What all points of a sweep share: each part is read once, when it is needed.

  Args:
    args: the flags, of which those of sampling are ignored.
  """

  def __init__(self, args: argparse.Namespace):
    self._args = args

  @functools.cached_property
  def model(self):
    """The model."""
    model = model_flags.load(self._args)
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
    """The captions and their pictures.

    Raises:
      UserError: captions can't be read, or are too few to be compared with --reference.
    """
    args = self._args
    found = _read_captions(args)
    if len(found.captions) < args.num_captions:
      print(
        f'{found.name}: using {texts.counted(len(found.captions), "caption")}, all that there are and '
        'fewer than '
        f'--num_captions={args.num_captions}',
        file=sys.stderr,
      )
    compared = len(found.captions)
    if args.rejection is not None:
      compared *= rejection.accepted_count(min(args.rejection), args.num_images)
    if args.reference is not None and compared < 2:
      raise UserError(
        f'{found.name}: one caption leads to one picture to compare with --reference; a distance needs '
        'at least two, so give more captions, or a larger --num_captions'
      )
    return found

  @functools.cached_property
  def real(self) -> captions_evaluation.RealPictures:
    """Features of the real pictures of `captioned`."""
    return captions_evaluation.RealPictures(
      self.model, self.captioned, self.extractors, progress=True
    )


def _read_captions(args: argparse.Namespace):
  """Reads the captions that the flags select."""
  if args.annotations is None:
    return coco.read_tfds(args.tfds_dir, args.num_captions, args.seed)
  reader = coco if args.dataset == 'coco' else localized_narratives
  return reader.read(args.annotations, args.pictures, args.num_captions, args.seed)
