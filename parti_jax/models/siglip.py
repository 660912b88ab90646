"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786), of one fixed picture size.

As in CLIP, a picture and a text become vectors that are compared by their cosine. Unlike in CLIP,
each pair is judged by itself, with the sigmoid of scale · cosine + bias. The picture's vector comes
from a learned query that attends to all patches (the MAP head, arXiv 2106.04560, appendix B). The
text encoder attends to the whole text, including padding, and the text's vector comes from its last
position.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import clip_layers
from parti_jax.models import config_checks
from parti_jax.models import quantizer
from parti_jax.models.nn import layers

ACTIVATION = 'gelu_tanh'
# The token at the end of a text.
END_ID = 1
_EPSILON = 1e-6
# The paper's first temperature, log 10, and bias (section 3.1).
_FIRST_LOG_SCALE = 2.302585
_FIRST_BIAS = -10.0


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
  """Sizes of SigLIP; the defaults are SigLIP 2's B/16 of 256 × 256 pixels.

  Attributes:
    image_size: height and width of the pictures, in pixels.
    patch_size: height and width of a patch. It need not divide `image_size`; the remainder at the
      right and the bottom is left out.
    image_layers: number of blocks of the image encoder.
    image_width: model dimension of the image encoder, and length of the feature vectors.
    image_mlp_width: hidden dimension of its MLPs.
    image_heads: number of its attention heads; must divide `image_width`.
    text_vocabulary: number of token ids.
    text_length: number of text tokens, including padding.
    text_layers: number of blocks of the text encoder.
    text_width: model dimension of the text encoder.
    text_mlp_width: hidden dimension of its MLPs.
    text_heads: number of its attention heads; must divide `text_width`.
    dtype: name of the dtype of the computation; norms and features are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if heads do not divide a width, or a value is out of range.
  """

  image_size: int = 256
  patch_size: int = 16
  image_layers: int = 12
  image_width: int = 768
  image_mlp_width: int = 3072
  image_heads: int = 12
  text_vocabulary: int = 256000
  text_length: int = 64
  text_layers: int = 12
  text_width: int = 768
  text_mlp_width: int = 3072
  text_heads: int = 12
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'image_heads', 'image_width')
    config_checks.check_divides(self, 'text_heads', 'text_width')
    clip_layers.check_patches(self)

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def feature_dim(self) -> int:
    return self.image_width

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)


class AttentionPooling(nn.Module):
  """The MAP head: a learned query that attends to all patches, and an MLP.

  Attributes:
    config: sizes.
  """

  config: SigLIPConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'batch patches embed']) -> Float[Array, 'batch embed']:
    config = self.config
    width, dtype = config.image_width, config.compute_dtype
    initial = nn.initializers.normal(width**-0.5)
    probe = layers.parameter(self, 'probe', initial, ('norm',), (width,))
    query = jnp.broadcast_to(probe.astype(dtype), (x.shape[0], 1, width))
    pooled = clip_layers.Attention(width, config.image_heads, dtype, name='attention')(query, x)
    normed = clip_layers.layer_norm(_EPSILON, dtype, 'norm')(pooled)
    mlp = clip_layers.MLP(width, config.image_mlp_width, ACTIVATION, dtype, name='mlp')
    return (pooled + mlp(normed))[:, 0]


class ImageEncoder(nn.Module):
  """A Transformer over patches, and the MAP head.

  Attributes:
    config: sizes.
  """

  config: SigLIPConfig

  @nn.compact
  def __call__(self, images: Float[Array, 'batch height width 3']) -> Float[Array, 'batch embed']:
    """Encodes pictures in [0, 1]."""
    config = self.config
    width, dtype = config.image_width, config.compute_dtype
    patches = clip_layers.whole_patches(images * 2.0 - 1.0, config.image_size, config.patch_size)
    embed = clip_layers.Linear((width,), 1, ('patch', 'embed'), dtype, name='patch_embedding')
    positions = layers.Embedding(
      config.patches, width, ('position', 'embed'), name='position_embedding'
    )
    x = embed(patches) + positions(jnp.arange(config.patches), dtype)
    x = clip_layers.Transformer(
      config.image_layers,
      width,
      config.image_mlp_width,
      config.image_heads,
      ACTIVATION,
      _EPSILON,
      dtype=dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x)
    x = clip_layers.layer_norm(_EPSILON, dtype, 'norm')(x)
    return AttentionPooling(config, name='pooling')(x)


class TextEncoder(nn.Module):
  """A bidirectional Transformer over all positions, including padding.

  Attributes:
    config: sizes.
  """

  config: SigLIPConfig

  @nn.compact
  def __call__(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch text_length text_embed']:
    config = self.config
    # The vector comes from the last position, so the length must be that of training.
    clip_layers.check_length(text_tokens, config.text_length, exactly=True)
    tokens = layers.Embedding(config.text_vocabulary, config.text_width, name='token_embedding')
    positions = layers.Embedding(
      config.text_length, config.text_width, ('position', 'embed'), name='position_embedding'
    )
    x = tokens(text_tokens) + positions(jnp.arange(config.text_length))
    x = clip_layers.Transformer(
      config.text_layers,
      config.text_width,
      config.text_mlp_width,
      config.text_heads,
      ACTIVATION,
      _EPSILON,
      dtype=config.compute_dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x.astype(config.compute_dtype))
    return clip_layers.layer_norm(_EPSILON, config.compute_dtype, 'norm')(x)


class SigLIP(nn.Module):
  """SigLIP.

  Attributes:
    config: sizes.
  """

  config: SigLIPConfig

  def setup(self):
    self.image_encoder = ImageEncoder(self.config)
    self.text_encoder = TextEncoder(self.config)
    self.text_projection = clip_layers.Linear((self.config.feature_dim,), 1, ('embed', 'feature'))
    first = nn.initializers.constant
    self.log_scale = layers.parameter(self, 'log_scale', first(_FIRST_LOG_SCALE), (), ())
    self.bias = layers.parameter(self, 'bias', first(_FIRST_BIAS), (), ())

  def __call__(
    self,
    images: Float[Array, 'images height width 3'],
    text_tokens: Int[Array, 'texts text_length'],
  ) -> dict[str, Array]:
    """Compares pictures and texts.

    Args:
      images: pictures in [0, 1].
      text_tokens: `config.text_length` tokens for each text: the text in lower case, its end (1),
        and padding (0).

    Returns:
      A dict: 'image_features' [images, feature_dim] and 'text_features' [texts, feature_dim], unit
      vectors; 'logit_scale' []; 'logit_bias' []; 'logits' [images, texts], whose sigmoids are the
      probabilities that a text belongs to a picture; all float32.
    """
    image_features, text_features = self.image_features(images), self.text_features(text_tokens)
    products = image_features @ text_features.T
    return {
      'image_features': image_features,
      'text_features': text_features,
      'logit_scale': self.logit_scale(),
      'logit_bias': self.logit_bias(),
      'logits': self.logit_scale() * products + self.logit_bias(),
    }

  def image_features(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of pictures in [0, 1]."""
    return quantizer.normalize(self.image_encoder(images))

  def text_features(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of texts."""
    last = self.text_encoder(text_tokens)[:, -1].astype(jnp.float32)
    return quantizer.normalize(self.text_projection(last))

  def logit_scale(self) -> Float[Array, '']:
    """The factor of the cosines in the logits."""
    return jnp.exp(self.log_scale)

  def logit_bias(self) -> Float[Array, '']:
    """The bias that is added to the scaled cosines."""
    return jnp.asarray(self.bias)


def example_inputs(config: SigLIPConfig, batch: int = 1) -> tuple[Any, ...]:
  """Returns arrays with the shapes and dtypes of the arguments of `SigLIP`, for initialization."""
  return (
    jnp.zeros((batch, config.image_size, config.image_size, 3), jnp.float32),
    jnp.ones((batch, config.text_length), jnp.int32),
  )
