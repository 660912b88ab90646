"""Scores pictures by a text with the ranker, a contrastive captioner (CoCa; Parti, section 2).

Parti samples 16 pictures for a prompt, and CoCa orders them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary as vocabulary_lib
from parti_jax.exported_model import model_folder
from parti_jax.models import coca
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement

# Maximum number of pictures or texts in a batch.
_BATCH = 64


class Ranker:
  """A trained contrastive captioner that scores pictures.

  Attributes:
    config: sizes of the network.
  """

  def __init__(
    self,
    config: coca.CoCaConfig,
    params: PyTree,
    vocabulary: vocabulary_lib.TextVocabulary,
    place: placement.Placement | None = None,
  ):
    """Puts the network on the devices.

    Args:
      config: sizes of the network.
      params: parameters of `coca.CoCa`, without axis names.
      vocabulary: the vocabulary that the network was trained with.
      place: the devices; by default a single one.

    Raises:
      UserError: if the vocabulary is larger than the network's, or the mesh does not divide a
        parameter.
    """
    if vocabulary.size > config.text_vocabulary:
      raise UserError(
        f'{vocabulary.path} has {vocabulary.size} pieces, but the ranker knows '
        f'{config.text_vocabulary}; it belongs to another model'
      )
    self.config = config
    self._module = coca.CoCa(config)
    self._vocabulary = vocabulary
    self._place = place or placement.Placement()
    self._params = self._place.put(params, model_folder.abstract('ranker', config))

  def image_features(self, images) -> Float32[np.ndarray, 'images feature_dim']:
    """Embeds pictures.

    Args:
      images: uint8 [images, height, width, 3]; they are resized to the ranker's size.

    Returns:
      Unit vectors.

    Raises:
      UserError: if the shape or the dtype is wrong.
    """
    return self._features(_image_features, images_lib.checked(images))

  def text_features(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts.

    Args:
      texts: any texts. Those longer than the ranker's text length are truncated, with a warning
        that shows the rest.

    Returns:
      float32 [texts, feature_dim], unit vectors.

    Raises:
      UserError: if one is not a string.
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
    """Scores how well each picture matches its text.

    Args:
      texts: a text for each picture.
      images: uint8 [images, height, width, 3].

    Returns:
      float32 [images], the cosine similarities of their features; higher is better. They compare pictures of one
      text, since different texts have different scales.

    Raises:
      UserError: if the numbers of texts and pictures differ, a text is not a string, or the shape
        or the dtype of the pictures is wrong.
    """
    texts, images = checks.texts('text', texts), images_lib.checked(images)
    if len(texts) != len(images):
      raise UserError(
        f'{len(texts)} texts for {len(images)} pictures; give a text for each picture'
      )
    different = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(different)}
    rows = np.array([row_of[text] for text in texts], int)
    of_text = self.text_features(different)[rows]
    return np.sum(of_text * self.image_features(images), axis=1)

  def _features(
    self, function: Callable[..., Any], inputs: np.ndarray
  ) -> Float32[np.ndarray, 'inputs feature_dim']:
    features = np.empty([len(inputs), self.config.feature_dim], np.float32)
    # A power of two, since each batch size is compiled separately.
    batch = self._place.divisible(min(_BATCH, 1 << max(len(inputs) - 1, 0).bit_length()))
    for start, chosen in placement.pieces(len(inputs), batch):
      part = self._place.run(function, (self._params,), (inputs[chosen],), module=self._module)
      features[start : start + batch] = part[: len(features) - start]
    return features


@functools.partial(jax.jit, static_argnames='module')
def _image_features(
  params: PyTree, images: UInt8[Array, 'batch height width 3'], *, module: coca.CoCa
) -> Float32[Array, 'batch feature_dim']:
  size = module.config.image_size
  pixels = images.astype(jnp.float32) / 255.0
  if pixels.shape[1:3] != (size, size):
    pixels = jax.image.resize(pixels, (len(pixels), size, size, 3), 'linear')
  apply: Callable[..., Any] = module.apply
  return apply({'params': params}, pixels, method='image_features')


@functools.partial(jax.jit, static_argnames='module')
def _text_features(
  params: PyTree, tokens: Int32[Array, 'batch text_length'], *, module: coca.CoCa
) -> Float32[Array, 'batch feature_dim']:
  apply: Callable[..., Any] = module.apply
  return apply({'params': params}, tokens, method='text_features')
