"""Scores pictures by a text with the ranker (Parti, section 2).

Parti samples 16 pictures for a prompt, and a contrastive captioner (CoCa) orders them. Networks
that others have trained, such as CLIP, do so too (`parti_jax.models.rankers`).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import preprocessing as preprocessing_lib
from parti_jax.models import pixels as pixels_lib
from parti_jax.models import rankers
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import kept_programs
from parti_jax.sampling import placement

# Maximum number of pictures or texts in a batch.
_BATCH = 64


class Ranker:
  """A trained network that scores pictures by texts.

  Attributes:
    config: sizes of the network.
    preprocessing: how pictures become squares of the network's size; None if they are stretched.
    name: a name for reports, if it is not the ranker of the model that it is used with.
    file_format: the format that it was imported from, such as 'hpsv2'; None for any other ranker.
  """

  def __init__(
    self,
    config: rankers.Config,
    params: PyTree,
    vocabulary: text_tokenizer.TextTokenizer,
    place: placement.Placement | None = None,
    preprocessing: preprocessing_lib.Preprocessing | None = None,
    name: str | None = None,
    file_format: str | None = None,
  ):
    """Puts the network on the devices.

    Args:
      config: sizes of the network, of a kind in `rankers.KINDS`.
      params: parameters of its module, without axis names.
      vocabulary: the text tokenizer that the network was trained with.
      place: the devices; by default a single one.
      preprocessing: see the attribute.
      name: see the attribute.
      file_format: see the attribute.

    Raises:
      UserError: if the tokenizer belongs to another network, or the mesh does not divide a
        parameter.
    """
    check_tokenizer(vocabulary, config)
    self.config = config
    self.preprocessing = preprocessing
    self.name = name
    self.file_format = file_format
    self._module = rankers.module(config)
    self._vocabulary = vocabulary
    self._place = place or placement.Placement()
    self._params = self._place.put(
      params, functools.partial(model_folder.abstract, 'ranker', config)
    )

  @property
  def kind(self) -> str:
    """The name in `rankers.KINDS` of the network's kind."""
    return rankers.kind(self.config)

  def image_features(self, images) -> Float32[np.ndarray, 'images feature_dim']:
    """Embeds pictures.

    Args:
      images: uint8 [images, height, width, 3]; they become squares of the ranker's size.

    Returns:
      Unit vectors.

    Raises:
      UserError: if the shape or the dtype is wrong.
    """
    images = images_lib.checked(images)
    if self.preprocessing is None:
      return self._features(_features_of_bytes, images)
    return self._features(_features_of_squares, images, self.squares)

  def squares(self, pictures: Iterable[np.ndarray]) -> Float32[np.ndarray, 'pictures size size 3']:
    """Preprocesses pictures, for `features_of_squares`.

    Args:
      pictures: uint8 [height, width, 3] each, of any sizes.

    Raises:
      UserError: if a shape or dtype is wrong, or the ranker has no preprocessing of its own.
    """
    if self.preprocessing is None:
      raise UserError(
        'the ranker has no preprocessing for pictures of different sizes; use one that '
        '`parti-jax import ranker` wrote'
      )
    size = image_sizes.square(self.config.image_size, 'a ranker with preprocessing takes')
    return preprocessing_lib.preprocess(pictures, size, self.preprocessing)

  def features_of_squares(
    self, squares: Float32[np.ndarray, 'pictures size size 3']
  ) -> Float32[np.ndarray, 'pictures feature_dim']:
    """Embeds the results of `squares`. Returns unit vectors."""
    return self._features(_features_of_squares, squares)

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
    tokens, left_out = self.encode(texts)
    for row, cut in enumerate(left_out):
      if cut:
        warnings.warn(
          f'text {row + 1} is longer than the {self.config.text_length} text tokens of the '
          f'ranker; left out: {cut!r}',
          stacklevel=2,
        )
    return self.features_of_tokens(tokens)

  def encode(
    self, texts: Sequence[str]
  ) -> tuple[Int32[np.ndarray, 'texts text_length'], list[str]]:
    """Encodes texts to text tokens.

    Args:
      texts: any texts.

    Returns:
      The tokens, for `features_of_tokens`; and of each text the end that did not fit.

    Raises:
      UserError: if one is not a string.
    """
    texts = checks.texts('text', texts)
    tokens = np.empty([len(texts), self.config.text_length], np.int32)
    left_out = []
    for row, text in enumerate(texts):
      tokens[row], cut = self._vocabulary.encode(text, self.config.text_length)
      left_out.append(cut)
    return tokens, left_out

  def features_of_tokens(
    self, tokens: Int32[np.ndarray, 'texts text_length']
  ) -> Float32[np.ndarray, 'texts feature_dim']:
    """Embeds the tokens of `encode`. Returns unit vectors."""
    return self._features(_text_features, tokens)

  def scores(self, texts: Sequence[str], images) -> np.ndarray:
    """Scores how well each picture matches its text.

    Args:
      texts: a text for each picture.
      images: uint8 [images, height, width, 3].

    Returns:
      float32 [images], the cosine similarities of their features; higher is better. They compare
      pictures of one text, since different texts have different scales.

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
    self,
    function: Callable[..., Any],
    inputs: np.ndarray,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda chosen: chosen,
  ) -> Float32[np.ndarray, 'inputs feature_dim']:
    """Computes the features of inputs, of which each batch is prepared on the host."""
    features = np.empty([len(inputs), self.config.feature_dim], np.float32)
    # A power of two, since each batch size is compiled separately.
    batch = self._place.divisible(min(_BATCH, 1 << max(len(inputs) - 1, 0).bit_length()))
    for start, chosen in placement.pieces(len(inputs), batch):
      part = self._place.run(
        function, (self._params,), (prepare(inputs[chosen]),), module=self._module
      )
      features[start : start + batch] = part[: len(features) - start]
    return features


def load(folder: str | os.PathLike[str], place: placement.Placement | None = None) -> Ranker:
  """Loads a ranker alone.

  Args:
    folder: a path or a URL: a folder that `parti-jax import ranker` wrote, or a model folder.
    place: the devices; by default a single one.

  Raises:
    UserError: if the folder is missing, unfinished or damaged, or has no ranker.
  """
  folder = checks.text('ranker', folder)
  part = model_folder.load_ranker(folder)
  provenance = model_folder.part_provenance('ranker', folder)
  return of_part(part, provenance, None, place, storage.name(folder))


def of_part(
  part: model_folder.Part,
  provenance: Mapping[str, Any],
  vocabulary: text_tokenizer.TextTokenizer | None,
  place: placement.Placement | None = None,
  name: str | None = None,
) -> Ranker:
  """Makes a ranker from a part of a model.

  Args:
    part: the ranker, of `model_folder.load` or `model_folder.load_ranker`.
    provenance: what the folder's config.json says about its origin.
    vocabulary: the model's, which is used if the part has no text tokenizer of its own.
    place: as Ranker.
    name: as Ranker.

  Raises:
    UserError: as Ranker.
  """
  if part.vocabulary_path is not None:
    vocabulary = text_tokenizer.open_tokenizer(part.vocabulary_path, part.lower_case)
  assert vocabulary is not None
  origin = provenance.get('ranker')
  file_format = origin.get('format') if isinstance(origin, dict) else None
  return Ranker(part.config, part.params, vocabulary, place, part.preprocessing, name, file_format)


def check_tokenizer(tokenizer: text_tokenizer.TextTokenizer, config: rankers.Config) -> None:
  """Raises UserError if a text tokenizer makes tokens that the ranker doesn't know, or can't use.

  Args:
    tokenizer: the tokenizer.
    config: sizes of the ranker.
  """
  if tokenizer.size > config.text_vocabulary:
    raise UserError(
      f'{tokenizer.path} has {tokenizer.size} pieces, but the ranker knows '
      f'{config.text_vocabulary}; it belongs to another model'
    )
  end_id = rankers.end_id(config)
  if end_id is not None:
    tokens, _ = tokenizer.encode('a', config.text_length)
    # The first one counts as the end; what follows must be padding.
    text = tokens[: np.argmax(tokens == end_id)]
    if not text.size or tokens[text.size + 1 :].any():
      raise UserError(
        f'{tokenizer.path} does not end a text with the token {end_id}, as the ranker needs; it '
        'belongs to another model'
      )


@kept_programs.keep
@functools.partial(jax.jit, static_argnames='module')
def _features_of_bytes(
  params: PyTree, images: UInt8[Array, 'batch height width 3'], *, module: nn.Module
) -> Float32[Array, 'batch feature_dim']:
  """Embeds pictures that are stretched to the ranker's size."""
  sides = image_sizes.sides(module.config.image_size)
  pixels = pixels_lib.from_bytes(images)
  if pixels.shape[1:3] != sides:
    pixels = jax.image.resize(pixels, (len(pixels), *sides, 3), 'linear')
  return _image_features(params, pixels, module)


@kept_programs.keep
@functools.partial(jax.jit, static_argnames='module')
def _features_of_squares(
  params: PyTree, squares: Float32[Array, 'batch size size 3'], *, module: nn.Module
) -> Float32[Array, 'batch feature_dim']:
  return _image_features(params, squares, module)


def _image_features(
  params: PyTree, pixels: Float[Array, 'batch size size 3'], module: nn.Module
) -> Float32[Array, 'batch feature_dim']:
  apply: Callable[..., Any] = module.apply
  return apply({'params': params}, pixels, method='image_features')


@kept_programs.keep
@functools.partial(jax.jit, static_argnames='module')
def _text_features(
  params: PyTree, tokens: Int32[Array, 'batch text_length'], *, module: nn.Module
) -> Float32[Array, 'batch feature_dim']:
  apply: Callable[..., Any] = module.apply
  return apply({'params': params}, tokens, method='text_features')
