"""Judging pictures by a text: the ranker, a contrastive captioner (CoCa; Parti, section 2).

Parti draws 16 pictures of a prompt, and CoCa puts them in order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary as vocabulary_lib
from parti_jax.exported_model import model_folder
from parti_jax.models import coca
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement

# Pictures, or texts, that go through the network at once.
_BATCH = 64


class Ranker:
  """A trained contrastive captioner that is ready to judge.

  Attributes:
    config: its sizes, CoCaConfig.
  """

  def __init__(
    self,
    config: coca.CoCaConfig,
    params,
    vocabulary: vocabulary_lib.TextVocabulary,
    place: placement.Placement | None = None,
  ):
    """Puts the network on the devices.

    Args:
      config: its sizes.
      params: of `coca.CoCa`, without axis names.
      vocabulary: turns texts into token ids.
      place: the devices; one by default.

    Raises:
      UserError: if the vocabulary is larger than the network's, or the mesh does not divide a
        parameter.
    """
    if vocabulary.size > config.text_vocabulary:
      raise UserError(
        f'{vocabulary.path} has {vocabulary.size} pieces, but the ranker knows '
        f'{config.text_vocabulary}; it is the vocabulary of another model'
      )
    self.config = config
    self._module = coca.CoCa(config)
    self._vocabulary = vocabulary
    self._place = place or placement.Placement()
    self._params = self._place.put(params, model_folder.abstract('ranker', config))

  def image_features(self, images) -> np.ndarray:
    """What pictures show, as vectors.

    Args:
      images: uint8 [n, height, width, 3]; another size than the ranker's is resized to it.

    Returns:
      float32 [n, feature_dim], unit vectors.

    Raises:
      UserError: if the pictures are of another shape or dtype.
    """
    return self._features(_image_features, images_lib.checked(images))

  def text_features(self, texts: Sequence[str]) -> np.ndarray:
    """What texts say, as vectors.

    Args:
      texts: any texts. Those longer than the ranker's text length are cut, with a warning that
        says what was left out.

    Returns:
      float32 [n, feature_dim], unit vectors.

    Raises:
      UserError: if there is something that is not a text.
    """
    texts = checks.texts('text', texts)
    tokens = np.empty([len(texts), self.config.text_length], np.int32)
    for row, text in enumerate(texts):
      tokens[row], cut = self._vocabulary.encode(text, self.config.text_length)
      if cut:
        warnings.warn(
          f'text {row + 1} is longer than the {self.config.text_length} text tokens of the '
          f'ranker; left out: {cut!r}',
          stacklevel=2,
        )
    return self._features(_text_features, tokens)

  def scores(self, texts: Sequence[str], images) -> np.ndarray:
    """How well each picture fits its text.

    Args:
      texts: one for each picture.
      images: uint8 [n, height, width, 3].

    Returns:
      float32 [n] in [-1, 1], the cosines of their vectors; more is better. They compare pictures
      of one text: those of different texts have different scales.

    Raises:
      UserError: if there are more texts than pictures or fewer, or as `image_features`.
    """
    texts, images = checks.texts('text', texts), images_lib.checked(images)
    if len(texts) != len(images):
      raise UserError(f'{len(texts)} texts for {len(images)} pictures; give one for each')
    different = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(different)}
    rows = np.array([row_of[text] for text in texts], int)
    of_text = self.text_features(different)[rows]
    return np.sum(of_text * self.image_features(images), axis=1)

  def _features(self, function, inputs: np.ndarray) -> np.ndarray:
    features = np.empty([len(inputs), self.config.feature_dim], np.float32)
    # Powers of two, since each size is compiled anew.
    batch = self._place.divisible(min(_BATCH, 1 << max(len(inputs) - 1, 0).bit_length()))
    for start, chosen in placement.pieces(len(inputs), batch):
      part = self._place.run(function, (self._params,), (inputs[chosen],), module=self._module)
      features[start : start + batch] = part[: len(features) - start]
    return features


@functools.partial(jax.jit, static_argnames='module')
def _image_features(params, images, *, module: nn.Module):
  size = module.config.image_size
  images = images.astype(jnp.float32) / 255.0
  if images.shape[1:3] != (size, size):
    images = jax.image.resize(images, (len(images), size, size, 3), 'linear')
  return module.apply({'params': params}, images, method='image_features')


@functools.partial(jax.jit, static_argnames='module')
def _text_features(params, tokens, *, module: nn.Module):
  return module.apply({'params': params}, tokens, method='text_features')
