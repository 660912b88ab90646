"""Features of pictures, over which sets of pictures are compared.

There are two kinds: those of Inception v3 with the FID's weights, computed by torch-fidelity, and
the picture features of a ranker, which need no download. Reports name the features, since values
over different features aren't comparable.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import NamedTuple
from typing import Protocol

import numpy as np
from jaxtyping import Float32
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation.metrics import clip_score

# The original file name; torch-fidelity's releases contain the same file as
# weights-inception-2015-12-05-6726825d.pth.
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Maximum height and width of the pictures that Inception compares.
LARGEST_SIZE = 4096
# Pictures processed by a network at once.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Features:
  """A network's outputs for pictures.

  Attributes:
    values: the features.
    logits: logits of classes, for the inception score; None for a network without classes.
  """

  values: Float32[np.ndarray, 'pictures dim']
  logits: Float32[np.ndarray, 'pictures classes'] | None = None

  def __len__(self):
    return len(self.values)

  def __getitem__(self, chosen) -> Features:
    return Features(self.values[chosen], None if self.logits is None else self.logits[chosen])


class Published(NamedTuple):
  """A published score, and the features of the captions that it needs.

  Attributes:
    score: the score.
    texts: features of the captions with the score's prefix.
  """

  score: clip_score.Score
  texts: Float32[np.ndarray, 'captions dim']


class Extractor(Protocol):
  """A network that computes features of pictures.

  Attributes:
    name: description for reports.
    image_size: height and width of its input pictures, in pixels.
    resizes: whether it resizes pictures itself; otherwise it takes only those of `image_size`.
  """

  name: str
  image_size: int
  resizes: bool

  def __call__(self, images: UInt8[np.ndarray, 'pictures size size 3']) -> Features:
    """Returns the features of square pictures."""

  def texts(self, captions: Sequence[str]) -> Float32[np.ndarray, 'captions dim'] | None:
    """Returns the features of captions; None without a text encoder."""

  def published(self, captions: Sequence[str]) -> list[Published]:
    """Returns the published scores that the features give."""

  def cut(self, captions: Sequence[str]) -> int:
    """Returns the number of captions that `texts` or `published` truncate."""


class Inception:
  """Inception v3 as defined for the FID, from torch-fidelity: its pool of 2,048 features.

  The network itself resizes to 299 pixels like TensorFlow 1, as the FID's definition requires.
  """

  resizes = False

  def __init__(self, weights: str, image_size: int = 256):
    """Loads the weights; uses a GPU if torch finds one.

    Args:
      weights: path of torch-fidelity's file, INCEPTION_FILE.
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
      # torch-fidelity unpickles anything in the file; this call accepts only tensors.
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
        f'--inception_weights {weights} does not hold weights of Inception v3 in '
        f"torch-fidelity's format; expected the file {INCEPTION_FILE}"
      ) from error

  def __call__(self, images: UInt8[np.ndarray, 'pictures size size 3']) -> Features:
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

  def published(self, captions: Sequence[str]) -> list[Published]:
    del captions
    return []

  def cut(self, captions: Sequence[str]) -> int:
    del captions
    return 0


class RankerFeatures:
  """The picture features of a ranker: unit vectors, trained to distinguish captions."""

  def __init__(self, ranker, model_name: str):
    """Wraps a `parti_jax.sampling.ranking.Ranker`; `model_name` is used in reports."""
    self.ranker = ranker
    self.image_size = ranker.config.image_size
    self.resizes = ranker.preprocessing is not None
    whose = f'ranker {ranker.name}' if ranker.name else f'ranker of the model {model_name}'
    self.name = f'{whose}, pictures of {self.image_size} pixels'

  def __call__(self, images: UInt8[np.ndarray, 'pictures size size 3']) -> Features:
    return Features(self.ranker.image_features(images))

  def texts(self, captions: Sequence[str]) -> Float32[np.ndarray, 'captions dim']:
    """Returns the features of captions; long captions are truncated, and `cut` counts them."""
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', UserWarning)
      return self.ranker.text_features(captions)

  def published(self, captions: Sequence[str]) -> list[Published]:
    """Returns the published scores of a CLIP."""
    return [
      Published(score, self.texts([score.prefix + caption for caption in captions]))
      for score in self._scores
    ]

  def cut(self, captions: Sequence[str]) -> int:
    prefix = max(['', *(score.prefix for score in self._scores)], key=len)
    _, left_out = self.ranker.encode([prefix + caption for caption in captions])
    return sum(map(bool, left_out))

  @property
  def _scores(self) -> Sequence[clip_score.Score]:
    return clip_score.scores_of(self.ranker.kind, self.ranker.file_format)


def resized(
  images: UInt8[np.ndarray, 'pictures height width 3'], size: int
) -> UInt8[np.ndarray, 'pictures {size} {size} 3']:
  """Resizes square pictures with antialiasing (bicubic), like the real pictures.

  Args:
    images: the pictures.
    size: height and width of the result.
  """
  if images.shape[1:3] == (size, size):
    return images
  return np.stack(
    [
      np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
      for image in images
    ]
  )


def extract(
  extractor: Extractor, batches: Iterable[UInt8[np.ndarray, 'batch height width 3']]
) -> Features:
  """Returns the features of batches of square pictures."""
  size = extractor.image_size
  return concatenated(
    [extractor(batch if extractor.resizes else resized(batch, size)) for batch in batches]
  )


def concatenated(parts: Sequence[Features]) -> Features:
  """Joins the features of several batches."""
  logits = None if parts[0].logits is None else np.concatenate([part.logits for part in parts])
  return Features(np.concatenate([part.values for part in parts]), logits)


def of_flags(model, inception_weights: str | None, image_size: int) -> list[Extractor]:
  """Returns the available extractors: Inception if its weights are given, and the model's ranker.

  Args:
    model: the result of `parti_jax.load`.
    inception_weights: path, or None.
    image_size: size of the pictures that Inception compares.

  Returns:
    At most two extractors.

  Raises:
    UserError: `Inception` raises it.
  """
  extractors: list[Extractor] = []
  if inception_weights is not None:
    extractors.append(Inception(inception_weights, image_size))
  if model.ranker is not None:
    extractors.append(RankerFeatures(model.ranker, model.model_name))
  return extractors
