"""Features of pictures, over which sets of pictures are compared.

There are two kinds: those of Inception v3 with the FID's weights, and the picture features of a
ranker, which need no download. Reports name the features, since values over different features
aren't comparable.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float32
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.evaluation.metrics import clip_score
from parti_jax.importers import inception_file
from parti_jax.models import inception
from parti_jax.partitioning import device_groups

# The original file name; torch-fidelity's releases contain the same file as
# weights-inception-2015-12-05-6726825d.pth.
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'

# Maximum height and width of the pictures that Inception compares.
LARGEST_SIZE = 4096
# How pictures get Inception's size: by the network itself, as the FID is defined and ADM's evaluator
# computes it; or as clean-fid does.
RESIZES = {
  'tensorflow1': 'to 299 pixels, bilinear as TensorFlow 1, without antialiasing',
  'clean': 'to 299 pixels, bicubic of float32 with antialiasing, by Pillow, as clean-fid',
}
_RESIZE_THREADS = 4
# Pictures that an accelerator processes at once.
_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Features:
  """A network's outputs for pictures.

  Attributes:
    values: the features.
    logits: logits of classes, for the inception score; None for a network without classes.
    spatial: features of places in the pictures, for sFID; None unless they were asked for.
  """

  values: Float32[np.ndarray, 'pictures dim']
  logits: Float32[np.ndarray, 'pictures classes'] | None = None
  spatial: Float32[np.ndarray, 'pictures spatial'] | None = None

  def __len__(self):
    return len(self.values)

  def __getitem__(self, chosen) -> Features:
    return Features(
      self.values[chosen],
      None if self.logits is None else self.logits[chosen],
      None if self.spatial is None else self.spatial[chosen],
    )


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
  """Inception v3 as defined for the FID: its pool of 2,048 features.

  The network itself resizes to 299 pixels like TensorFlow 1, as the FID's definition requires, unless
  the pictures are resized before as clean-fid does. It runs on all devices of this process; the
  features of a picture depend neither on their number nor on the batch.

  Attributes:
    digest: SHA-256 of the file of weights.
  """

  def __init__(
    self,
    weights: str,
    image_size: int | None = 256,
    spatial: bool = False,
    module: inception.Inception = inception.PUBLISHED,
    resize: str = 'tensorflow1',
  ):
    """Loads the weights.

    Args:
      weights: path of torch-fidelity's file, INCEPTION_FILE.
      image_size: height and width at which pictures are compared; None leaves it to the network alone
        to resize them.
      spatial: whether to compute features of places, for sFID.
      module: the network.
      resize: how pictures get the size of the network, a key of RESIZES.

    Raises:
      UserError: the file is missing or damaged, or holds other weights.
    """
    self.image_size = image_size or inception.SIZE
    self.resizes = image_size is None
    size = f'{image_size} pixels' if image_size else 'their own size'
    self.name = f'Inception v3 ({os.path.basename(weights)}), pictures of {size}'
    try:
      params, self.digest = inception_file.read(weights, module)
    except UserError as error:
      raise UserError(
        f'--inception_weights {weights} does not hold the weights of Inception v3, the file '
        f'{INCEPTION_FILE} of torch-fidelity and pytorch-fid: {error}'
      ) from error

    self._clean_size = module.size if resize == 'clean' else None
    apply: Callable[..., Any] = module.apply

    def outputs(params, images):
      found = apply({'params': params}, images)
      return found if spatial else found._replace(spatial=None)

    devices = jax.local_devices()
    group = device_groups.GROUP if devices[0].platform == 'cpu' else _GROUP
    self._run = device_groups.DeviceGroups(outputs, params, devices, group)

  def __call__(self, images: UInt8[np.ndarray, 'pictures height width 3']) -> Features:
    if self._clean_size is not None:
      parts = self._run(clean_resized(images, self._clean_size))()
    else:
      parts = self._run(images)()
    pool, spatial, logits = (
      None if part[0] is None else np.concatenate(part)[: len(images)] for part in zip(*parts)
    )
    assert pool is not None and logits is not None
    return Features(pool, logits, spatial)

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
    self.image_size = image_sizes.square(ranker.config.image_size, 'features are compared of')
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


def clean_resized(
  images: UInt8[np.ndarray, 'pictures height width 3'], size: int
) -> Float32[np.ndarray, 'pictures {size} {size} 3']:
  """Resizes pictures as clean-fid does (Parmar et al. 2022, arXiv 2104.11222).

  Pillow's bicubic filter with antialiasing, of each color in float32, so that nothing is rounded
  between its two passes or after them. Values are clipped to [0, 255].

  Args:
    images: the pictures.
    size: height and width of the result.
  """

  def resized_color(color: UInt8[np.ndarray, 'height width']) -> Float32[np.ndarray, '_ _']:
    image = Image.fromarray(color.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)

  def resized_image(image: UInt8[np.ndarray, 'height width 3']) -> Float32[np.ndarray, '_ _ 3']:
    return np.stack([resized_color(image[..., color]) for color in range(3)], axis=-1)

  with concurrent.futures.ThreadPoolExecutor(_RESIZE_THREADS) as threads:
    return np.stack(list(threads.map(resized_image, images)))


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
  values, logits, spatial = (
    None if found[0] is None else np.concatenate(found)
    for found in zip(*((part.values, part.logits, part.spatial) for part in parts))
  )
  assert values is not None
  return Features(values, logits, spatial)


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
