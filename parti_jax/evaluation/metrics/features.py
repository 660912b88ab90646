"""Pictures as features, over which sets of pictures are compared.

Two kinds: Inception v3 with the weights of the FID, computed by torch-fidelity, and the picture
features of a ranker, which need no download. A report says which it is about; values over
different features do not compare.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from parti_jax.core import storage
from parti_jax.core.errors import UserError

# The file's first name; torch-fidelity's releases hold the same as
# weights-inception-2015-12-05-6726825d.pth.
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Height and width of the pictures that Inception compares, at most.
LARGEST_SIZE = 4096
# Pictures that go through a network at once.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Features:
  """What a network says of pictures.

  Attributes:
    values: float32 [pictures, dim].
    logits: float32 [pictures, classes], for the inception score; None of a network without
      classes.
  """

  values: np.ndarray
  logits: np.ndarray | None = None

  def __len__(self):
    return len(self.values)

  def __getitem__(self, chosen) -> Features:
    return Features(self.values[chosen], None if self.logits is None else self.logits[chosen])


class Extractor(Protocol):
  """A network that turns pictures into features.

  Attributes:
    name: for reports.
    image_size: height and width of the pictures that it compares, in pixels.
  """

  name: str
  image_size: int

  def __call__(self, images: np.ndarray) -> Features:
    """Takes uint8 [pictures, image_size, image_size, 3]."""

  def texts(self, captions: Sequence[str]) -> np.ndarray | None:
    """Features of captions, float32 [captions, dim]; None of a network that knows no texts."""


class Inception:
  """Inception v3 as the FID is defined, through torch-fidelity: its pool of 2,048 features.

  Of its own it resizes to 299 pixels as TensorFlow 1 did, which is part of that definition.
  """

  def __init__(self, weights: str, image_size: int = 256):
    """Reads the weights; a GPU that torch sees is used.

    Args:
      weights: path of torch-fidelity's file, see INCEPTION_FILE.
      image_size: height and width at which pictures are compared.

    Raises:
      UserError: the file holds other weights.
      ImportError: torch-fidelity is not installed.
    """
    import torch
    from torch_fidelity import utils

    self._torch = torch
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    self.image_size = image_size
    self.name = f'Inception v3 ({os.path.basename(weights)}), pictures of {image_size} pixels'
    if os.path.isfile(weights):
      storage.check_size(weights, storage.MAX_WEIGHTS)
    try:
      # torch-fidelity unpickles whatever is in the file; this takes nothing but tensors.
      torch.load(weights, map_location='cpu', weights_only=True)
      self._network = utils.create_feature_extractor(
        'inception-v3-compat',
        ['2048', 'logits_unbiased'],
        cuda=self._device == 'cuda',
        feature_extractor_weights_path=weights,
        verbose=False,
      )
    except (
      OSError,
      RuntimeError,
      EOFError,
      TypeError,
      AttributeError,
      KeyError,
      pickle.UnpicklingError,
    ) as error:
      raise UserError(
        f'--inception_weights {weights} holds no weights of Inception v3 in '
        f"torch-fidelity's form; it is the file {INCEPTION_FILE}"
      ) from error

  def __call__(self, images: np.ndarray) -> Features:
    torch = self._torch
    parts = []
    with torch.no_grad():
      for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[start : start + _BATCH].transpose(0, 3, 1, 2).copy())
        parts.append([part.cpu().numpy() for part in self._network(batch.to(self._device))])
    values, logits = (np.concatenate(part) for part in zip(*parts))
    return Features(values, logits)

  def texts(self, captions: Sequence[str]) -> None:
    del captions


class RankerFeatures:
  """The picture features of a ranker: unit vectors, made to tell captions apart."""

  def __init__(self, ranker, model_name: str):
    """Takes a `parti_jax.sampling.ranking.Ranker` and the name of its model."""
    self.ranker = ranker
    self.image_size = ranker.config.image_size
    self.name = f'ranker of the model {model_name}, pictures of {self.image_size} pixels'

  def __call__(self, images: np.ndarray) -> Features:
    return Features(self.ranker.image_features(images))

  def texts(self, captions: Sequence[str]) -> np.ndarray:
    """Returns features of captions, float32 [captions, dim]; those that are long are cut."""
    with warnings.catch_warnings():
      # The pipeline has said so already when it drew for them.
      warnings.simplefilter('ignore', UserWarning)
      return self.ranker.text_features(captions)


def resized(images: np.ndarray, size: int) -> np.ndarray:
  """Resizes square pictures with antialiasing (bicubic), as real ones are.

  Args:
    images: uint8 [pictures, height, width, 3].
    size: height and width of the result.

  Returns:
    uint8 [pictures, size, size, 3].
  """
  if images.shape[1:3] == (size, size):
    return images
  return np.stack(
    [
      np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
      for image in images
    ]
  )


def extract(extractor: Extractor, batches: Iterable[np.ndarray]) -> Features:
  """Returns the features of pictures that come in batches, uint8 [batch, height, width, 3]."""
  return concatenated([extractor(resized(batch, extractor.image_size)) for batch in batches])


def concatenated(parts: Sequence[Features]) -> Features:
  """Joins the features of several batches."""
  logits = None if parts[0].logits is None else np.concatenate([part.logits for part in parts])
  return Features(np.concatenate([part.values for part in parts]), logits)


def of_flags(pipeline, inception_weights: str | None, image_size: int) -> list:
  """Returns the extractors that a user has: Inception by its weights, the ranker of the model.

  Args:
    pipeline: as `parti_jax.load` gives it.
    inception_weights: path, or None.
    image_size: of the pictures that Inception compares.

  Returns:
    None, one or two of them.

  Raises:
    UserError: as `Inception`.
  """
  extractors = []
  if inception_weights is not None:
    extractors.append(Inception(inception_weights, image_size))
  if pipeline.ranker is not None:
    extractors.append(RankerFeatures(pipeline.ranker, pipeline.model_name))
  return extractors
