"""CLIP (arXiv 2103.00020): a picture and a text as vectors whose cosine says how well they fit.

There are two Transformers. Projections of the image encoder's class token and of the text encoder's
output at the end of the text give the two vectors. CLIP ranks pictures, scores them (CLIPScore,
HPSv2, PickScore), and its text encoder alone conditions generators.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import clip_layers
from parti_jax.models import config_checks
from parti_jax.models import quantizer
from parti_jax.models.nn import layers

# Mean and standard deviation of the training pictures' red, green and blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_EPSILON = 1e-5
# exp(2.6592), the scale of logits at the beginning of CLIP's training.
_FIRST_LOG_SCALE = 2.6592


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Sizes of CLIP's text encoder; the defaults are those of ViT-B/32.

  Attributes:
    text_vocabulary: number of token ids.
    text_length: maximum number of text tokens, including the first and the last one.
    layers: number of blocks.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: number of attention heads; must divide `width`.
    end_id: id of the token at the end of a text.
    activation: activation of the MLPs: a name in `clip_layers.ACTIVATIONS`. OpenAI's weights need
      'quick_gelu', most others 'gelu'. The weights don't say which.
    dtype: name of the dtype of the computation; norms and features are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if `heads` does not divide the width, or a value is out of range.
  """

  text_vocabulary: int = 49408
  text_length: int = 77
  layers: int = 12
  width: int = 512
  mlp_width: int = 2048
  heads: int = 8
  end_id: int = 49407
  activation: str = 'quick_gelu'
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'heads', 'width')
    clip_layers.check_activation(self)
    clip_layers.check_end(self)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Sizes of CLIP; the defaults are those of ViT-B/32.

  Attributes:
    image_size: height and width of the pictures, in pixels.
    patch_size: height and width of a patch.
    image_layers: number of blocks of the image encoder.
    image_width: model dimension of the image encoder.
    image_mlp_width: hidden dimension of its MLPs.
    image_heads: number of its attention heads; must divide `image_width`.
    text_vocabulary: number of token ids.
    text_length: maximum number of text tokens, including the first and the last one.
    text_layers: number of blocks of the text encoder.
    text_width: model dimension of the text encoder.
    text_mlp_width: hidden dimension of its MLPs.
    text_heads: number of its attention heads; must divide `text_width`.
    end_id: id of the token at the end of a text.
    feature_dim: length of the feature vectors.
    activation: activation of the MLPs of both encoders, as in CLIPTextConfig.
    pixel_mean: mean of red, green and blue in [0, 1], which is subtracted from pixels.
    pixel_std: standard deviation of red, green and blue, by which the difference is divided.
    dtype: name of the dtype of the computation; norms and features are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if heads do not divide a width, or a value is out of range.
  """

  image_size: int = 224
  patch_size: int = 32
  image_layers: int = 12
  image_width: int = 768
  image_mlp_width: int = 3072
  image_heads: int = 12
  text_vocabulary: int = 49408
  text_length: int = 77
  text_layers: int = 12
  text_width: int = 512
  text_mlp_width: int = 2048
  text_heads: int = 8
  end_id: int = 49407
  feature_dim: int = 512
  activation: str = 'quick_gelu'
  pixel_mean: tuple[float, float, float] = PIXEL_MEAN
  pixel_std: tuple[float, float, float] = PIXEL_STD
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS = {'pixel_mean': (0, 1), 'pixel_std': (1e-3, 1)}

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'image_heads', 'image_width')
    config_checks.check_divides(self, 'text_heads', 'text_width')
    clip_layers.check_activation(self)
    clip_layers.check_end(self)
    clip_layers.check_patches(self)

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def text(self) -> CLIPTextConfig:
    """Sizes of the text encoder alone."""
    return CLIPTextConfig(
      text_vocabulary=self.text_vocabulary,
      text_length=self.text_length,
      layers=self.text_layers,
      width=self.text_width,
      mlp_width=self.text_mlp_width,
      heads=self.text_heads,
      end_id=self.end_id,
      activation=self.activation,
      dtype=self.dtype,
      remat=self.remat,
      unroll=self.unroll,
    )


def end_positions(text_tokens: Int[Array, 'batch text_length'], end_id: int) -> Int[Array, 'batch']:
  """Returns the position of the first `end_id` in each text; 0 in a text without one."""
  return jnp.argmax(text_tokens == end_id, axis=1)


def text_mask(
  text_tokens: Int[Array, 'batch text_length'], end_id: int
) -> Bool[Array, 'batch 1 1 text_length']:
  """Returns an attention mask that hides padding: all tokens after the first `end_id`.

  Padding can't be recognized by its id, because id 0 is also the token of '!'.
  """
  ends = text_tokens == end_id
  return (jnp.cumsum(ends, axis=1) - ends == 0)[:, None, None, :]


class ImageEncoder(nn.Module):
  """A Transformer over a class token and patches.

  Attributes:
    config: sizes.
  """

  config: CLIPConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch image_embed']:
    """Encodes pictures in [0, 1]. Returns the class token's output."""
    config = self.config
    width, dtype = config.image_width, config.compute_dtype
    images = (images - jnp.array(config.pixel_mean)) / jnp.array(config.pixel_std)
    patches = clip_layers.whole_patches(images, config.image_size, config.patch_size)
    x = layers.Projection((width,), 1, ('patch', 'embed'), dtype, name='patch_embedding')(patches)
    initial = nn.initializers.normal(width**-0.5)
    class_embedding = layers.parameter(self, 'class_embedding', initial, ('norm',), (width,))
    class_tokens = jnp.broadcast_to(class_embedding.astype(dtype), (x.shape[0], 1, width))
    positions = layers.Embedding(
      config.patches + 1, width, ('position', 'embed'), name='position_embedding'
    )
    x = jnp.concatenate([class_tokens, x], axis=1)
    x = x + positions(jnp.arange(config.patches + 1), dtype)
    x = clip_layers.layer_norm(_EPSILON, dtype, 'pre_norm')(x)
    x = clip_layers.Transformer(
      config.image_layers,
      width,
      config.image_mlp_width,
      config.image_heads,
      config.activation,
      _EPSILON,
      dtype=dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x)
    return clip_layers.layer_norm(_EPSILON, dtype, 'post_norm')(x[:, 0])


class CLIPTextEncoder(nn.Module):
  """CLIP's text encoder: a causal Transformer over byte pairs.

  Its output at a position depends only on the tokens up to that position, so padding after the end
  of a text changes nothing before it.

  Attributes:
    config: sizes.
  """

  config: CLIPTextConfig

  @nn.compact
  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    masked: tuple[Bool[Array, 'batch text_length'], Float[Array, 'embed']] | None = None,
  ) -> Float[Array, 'batch text_length embed']:
    """Encodes texts.

    Args:
      text_tokens: a first token, the text, `config.end_id`, and any padding. At most
        `config.text_length` tokens.
      dropout_keys: not used, because CLIP has no dropout.
      masked: for masked language modeling: True for each token to replace, and the mask vector
        that replaces its embedding.

    Returns:
      The encoded tokens, of `config.compute_dtype`; `text_mask` says which are not padding.

    Raises:
      UserError: if the texts are longer than that.
    """
    del dropout_keys
    config = self.config
    clip_layers.check_length(text_tokens, config.text_length)
    tokens = layers.Embedding(config.text_vocabulary, config.width, name='token_embedding')
    positions = layers.Embedding(
      config.text_length, config.width, ('position', 'embed'), name='position_embedding'
    )
    x = tokens(text_tokens)
    if masked is not None:
      hidden, vector = masked
      x = jnp.where(hidden[..., None], vector, x)
    x = x + positions(jnp.arange(text_tokens.shape[1]))
    x = clip_layers.Transformer(
      config.layers,
      config.width,
      config.mlp_width,
      config.heads,
      config.activation,
      _EPSILON,
      causal=True,
      dtype=config.compute_dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x.astype(config.compute_dtype))
    return clip_layers.layer_norm(_EPSILON, config.compute_dtype, 'norm')(x)


class CLIP(nn.Module):
  """CLIP.

  Attributes:
    config: sizes.
  """

  config: CLIPConfig

  def setup(self):
    feature = lambda: layers.Projection((self.config.feature_dim,), 1, ('embed', 'feature'))
    self.image_encoder = ImageEncoder(self.config)
    self.image_projection = feature()
    self.text_encoder = CLIPTextEncoder(self.config.text)
    self.text_projection = feature()
    first = nn.initializers.constant(_FIRST_LOG_SCALE)
    self.log_scale = layers.parameter(self, 'log_scale', first, (), ())

  def __call__(
    self,
    images: Float[Array, 'images height width 3'],
    text_tokens: Int[Array, 'texts text_length'],
  ) -> dict[str, Array]:
    """Compares pictures and texts.

    Args:
      images: pictures in [0, 1].
      text_tokens: text tokens, as for CLIPTextEncoder.

    Returns:
      A dict: 'image_features' [images, feature_dim] and 'text_features' [texts, feature_dim], unit
      vectors; 'logit_scale' []; 'logits' [images, texts], the scaled cosines; all float32.
    """
    image_features, text_features = self.image_features(images), self.text_features(text_tokens)
    return {
      'image_features': image_features,
      'text_features': text_features,
      'logit_scale': self.logit_scale(),
      'logits': self.logit_scale() * image_features @ text_features.T,
    }

  def image_features(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of pictures in [0, 1]."""
    encoded = self.image_encoder(images).astype(jnp.float32)
    return quantizer.normalize(self.image_projection(encoded))

  def text_features(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of texts."""
    encoded = self.text_encoder(text_tokens).astype(jnp.float32)
    ends = end_positions(text_tokens, self.config.end_id)
    at_end = jnp.take_along_axis(encoded, ends[:, None, None], axis=1)[:, 0]
    return quantizer.normalize(self.text_projection(at_end))

  def logit_scale(self) -> Float[Array, '']:
    """The factor that turns cosines into logits."""
    return jnp.exp(self.log_scale)


def example_inputs(config: CLIPConfig, batch: int = 1) -> tuple[Any, ...]:
  """Returns arrays with the shapes and dtypes of the arguments of `CLIP`, for initialization."""
  return (
    jnp.zeros((batch, config.image_size, config.image_size, 3), jnp.float32),
    jnp.ones((batch, config.text_length), jnp.int32),
  )


def example_text(config: CLIPTextConfig, batch: int = 1) -> tuple[Any, ...]:
  """Returns `example_inputs` for CLIPTextEncoder."""
  return (jnp.ones((batch, config.text_length), jnp.int32),)
