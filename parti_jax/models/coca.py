"""The contrastive captioner, which ranks pictures for a text.

CoCa (arXiv 2205.01917) ranks the 16 pictures that Parti samples for each prompt (Parti, section 2).
It consists of an image encoder and a text decoder in two halves. The first half processes the text
alone; its class token gives the contrastive vector of the text. The second half also attends to the
picture and predicts the caption. Two attentional poolers turn the output of the image encoder into
the contrastive vector of the picture and into what the second half attends to (CoCa, section 3.2
and figure 2).
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import image_sizes
from parti_jax.models import config_checks
from parti_jax.models import contrastive
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import attention
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class CoCaConfig:
  """Sizes of a contrastive captioner; the defaults are those of CoCa-Base (CoCa, table 1).

  Attributes:
    image_size: height and width of the pictures, in pixels; one number for squares.
    patch_size: height and width of a patch, in pixels; must divide `image_size`.
    image_layers: number of blocks of the image encoder.
    unimodal_layers: number of blocks in the first half of the text decoder.
    multimodal_layers: number of blocks in its second half.
    width: model dimension of all three, `embed`.
    mlp_width: hidden dimension of their MLPs.
    heads: number of their attention heads; must divide `width`.
    caption_queries: number of vectors of a picture that the second half attends to.
    feature_dim: length of the contrastive vectors.
    text_vocabulary: number of SentencePiece pieces.
    text_length: maximum number of text tokens.
    dropout: dropout rate in training.
    dtype: name of the dtype of projections; norms, logits and features are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes.

  Raises:
    UserError: if `patch_size` does not divide `image_size`, if `heads` does not divide `width`, or
      if a value is out of range.
  """

  image_size: image_sizes.ImageSize = 288
  patch_size: int = 18
  image_layers: int = 12
  unimodal_layers: int = 12
  multimodal_layers: int = 12
  width: int = 768
  mlp_width: int = 3072
  heads: int = 12
  caption_queries: int = 256
  feature_dim: int = 768
  text_vocabulary: int = 64000
  text_length: int = 64
  dropout: float = 0.0
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS = {'dropout': (0, 1)}  # 1 is excluded by `config_checks.check_dropout`.

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'patch_size', 'image_size')
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_dropout(self)

  @property
  def patches(self) -> int:
    return math.prod(side // self.patch_size for side in image_sizes.sides(self.image_size))

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def sizes(self) -> tuple[int, int, int, float, jnp.dtype]:
    """The sizes that all blocks share, in the order of the arguments of `EncoderBlock`."""
    return self.width, self.mlp_width, self.heads, self.dropout, self.compute_dtype


class ImageEncoder(nn.Module):
  """A Transformer over patches (ViT, arXiv 2010.11929).

  Attributes:
    config: sizes.
  """

  config: CoCaConfig

  @nn.compact
  def __call__(
    self,
    images: Float[Array, 'batch height width 3'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch patches embed']:
    """Encodes pictures with values in [0, 1]."""
    config = self.config
    patches = vit_vqgan.to_patches(images * 2.0 - 1.0, config.patch_size)
    x = layers.Projection(
      (config.width,), 1, ('patch', 'embed'), config.compute_dtype, name='project_patches'
    )(patches)
    positions = layers.Embedding(
      config.patches, config.width, ('position', 'embed'), name='position_embedding'
    )
    x = x + positions(jnp.arange(config.patches), config.compute_dtype)
    x = layers.Dropout(config.dropout)(x, layers.fold(dropout_keys, 0))
    return transformer.Encoder(
      config.image_layers, *config.sizes, config.remat, config.unroll, name='transformer'
    )(x, dropout_keys=layers.fold(dropout_keys, 1))


class AttentionalPooler(nn.Module):
  """Learned queries that attend to the patches of a picture, and a layer norm (CoCa, section 3.2).

  Attributes:
    queries: number of vectors of the output.
    width: model dimension.
    heads: number of attention heads.
    dtype: dtype of the computation.
  """

  queries: int
  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, encoded: Float[Array, 'batch patches embed']
  ) -> Float[Array, 'batch queries embed']:
    """Pools the output of the image encoder."""
    table = layers.Embedding(self.queries, self.width, ('query', 'embed'), name='queries')
    query = table(jnp.arange(self.queries), self.dtype)
    query = jnp.broadcast_to(query, (encoded.shape[0],) + query.shape)
    attend = attention.CrossAttention(self.width, self.heads, self.dtype, name='attention')
    return layers.LayerNorm(self.dtype, name='norm')(attend(query, encoded))


class MultimodalBlock(nn.Module):
  """Cross-attention to the picture, causal self-attention over the text, and MLP.

  The attributes are those of transformer.EncoderBlock.
  """

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.text_block = transformer.EncoderBlock(
      self.width, self.mlp_width, self.heads, self.dropout, self.dtype
    )
    self.cross_norm = layers.LayerNorm(self.dtype)
    self.cross_attention = attention.CrossAttention(self.width, self.heads, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    pooled: Float[Array, 'batch queries embed'],
    mask: Bool[Array, 'batch 1 length length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Computes the block.

    Args:
      x: input of the block.
      pooled: the pooled picture.
      mask: True where a text position may attend to another one.
      dropout_keys: keys of this block; None if dropout is off.
    """
    attended = self.cross_attention(self.cross_norm(x), pooled)
    x = x + self.drop(attended, layers.fold(dropout_keys, 0))
    return self.text_block(x, mask, layers.fold(dropout_keys, 1))


class MultimodalDecoder(nn.Module):
  """The second half of the text decoder, and a final layer norm.

  Attributes:
    config: sizes.
  """

  config: CoCaConfig

  def setup(self):
    self.block = MultimodalBlock(*self.config.sizes, parent=None)
    self.norm = layers.LayerNorm(self.config.compute_dtype)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    pooled: Float[Array, 'batch queries embed'],
    mask: Bool[Array, 'batch 1 length length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Decodes; the arguments are those of MultimodalBlock, with keys of the whole stack."""
    config = self.config
    stacked = layer_stack.parameters(
      self, self.block, config.multimodal_layers, x[:1], pooled[:1], mask[:1]
    )

    def layer(params, pattern_index, x, side_inputs, keys):
      del pattern_index  # All layers are alike.
      return self.block.apply({'params': params}, x, *side_inputs, keys)

    if not self.is_initializing():
      stack = layer_stack.LayerStack(layer, config.remat, config.unroll)
      x = stack.run(stacked, x, (pooled, mask), dropout_keys)
    return self.norm(x)


def text_mask(
  text_tokens: Int[Array, 'batch text_length'],
) -> Bool[Array, 'batch 1 text_length+1 text_length+1']:
  """Returns which inputs of the text decoder each input attends to: itself and earlier text.

  Args:
    text_tokens: text tokens, padded with 0.

  Returns:
    The mask. Input 0 is the beginning, input i the text token i - 1, and the last input the class
    token, which attends to all inputs except padding.
  """
  batch, length = text_tokens.shape
  causal = jnp.tril(jnp.ones((length + 1, length + 1), bool))
  ones = jnp.ones((batch, 1), bool)
  is_text = jnp.concatenate([ones, text_tokens[:, :-1] > 0, ones], axis=1)
  return (causal & is_text[:, None, :] | jnp.eye(length + 1, dtype=bool))[:, None]


class UnimodalDecoder(nn.Module):
  """The first half of the text decoder: causal, without the picture, with a class token at the end.

  Its final layer norm applies to the class token and to the input of the second half. CoCa applies
  it to the class token only.

  Attributes:
    config: sizes.
  """

  config: CoCaConfig

  @nn.compact
  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch text_length+1 embed']:
    """Encodes texts.

    Args:
      text_tokens: text tokens, padded with 0. The last one is not an input, since it is only
        predicted.
      dropout_keys: keys of this network; None if dropout is off.

    Returns:
      The output i < text_length depends on the tokens before i. The last output is that of the
      class token.
    """
    config = self.config
    batch, length = text_tokens.shape
    tokens = layers.Embedding(config.text_vocabulary, config.width, name='token_embedding')
    positions = layers.Embedding(
      length + 1, config.width, ('position', 'embed'), name='position_embedding'
    )
    class_token = layers.parameter(
      self, 'class_token', nn.initializers.normal(0.02), ('norm',), (config.width,)
    )
    # The id 0 of padding is not needed as an input, so it represents the beginning.
    inputs = jnp.pad(text_tokens[:, :-1], ((0, 0), (1, 0)))
    class_tokens = jnp.broadcast_to(class_token, (batch, 1, config.width))
    x = jnp.concatenate([tokens(inputs), class_tokens], axis=1) + positions(jnp.arange(length + 1))
    x = layers.Dropout(config.dropout)(x.astype(config.compute_dtype), layers.fold(dropout_keys, 0))
    return transformer.Encoder(
      config.unimodal_layers, *config.sizes, config.remat, config.unroll, name='transformer'
    )(x, text_mask(text_tokens), layers.fold(dropout_keys, 1))


class CoCa(nn.Module):
  """A contrastive captioner.

  Attributes:
    config: sizes.
  """

  config: CoCaConfig

  def setup(self):
    config = self.config
    pooler = lambda queries: AttentionalPooler(
      queries, config.width, config.heads, config.compute_dtype
    )
    feature = lambda: layers.Projection((config.feature_dim,), 1, ('embed', 'feature'))
    self.image_encoder = ImageEncoder(config)
    self.contrastive_pooler = pooler(1)
    self.caption_pooler = pooler(config.caption_queries)
    self.image_feature = feature()
    self.unimodal = UnimodalDecoder(config)
    self.text_feature = feature()
    self.multimodal = MultimodalDecoder(config)
    self.logits = layers.Projection((config.text_vocabulary,), 1, ('embed', 'vocab'))
    self.logit_scale = contrastive.LogitScale()

  def __call__(
    self,
    images: Float[Array, 'batch height width 3'],
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> dict[str, Array]:
    """Computes the inputs of both losses.

    Args:
      images: pictures with values in [0, 1].
      text_tokens: text tokens, padded with 0.
      dropout_keys: keys of this batch; None if dropout is off.

    Returns:
      A dict of float32 arrays: unit vectors 'image_features' and 'text_features', both [batch,
      feature_dim]; 'logit_scale' [], the factor of their dot products; and 'logits' [batch,
      text_length, text_vocabulary], where entry i predicts text_tokens[:, i].
    """
    encoded = self.image_encoder(images, layers.fold(dropout_keys, 0))
    texts = self.unimodal(text_tokens, layers.fold(dropout_keys, 1))
    mask = text_mask(text_tokens)[:, :, :-1, :-1]
    captions = self.multimodal(
      texts[:, :-1], self.caption_pooler(encoded), mask, layers.fold(dropout_keys, 2)
    )
    logits = nn.with_logical_constraint(
      self.logits(captions.astype(jnp.float32)),
      ('activation_batch', 'activation_length', 'activation_vocab'),
    )
    return {
      'image_features': self._image_features(encoded),
      'text_features': self._text_features(texts),
      'logit_scale': self.logit_scale(),
      'logits': logits,
    }

  def image_features(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns the contrastive unit vectors of pictures with values in [0, 1]."""
    return self._image_features(self.image_encoder(images))

  def text_features(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns the contrastive unit vectors of texts."""
    return self._text_features(self.unimodal(text_tokens))

  def _image_features(
    self, encoded: Float[Array, 'batch patches embed']
  ) -> Float[Array, 'batch feature_dim']:
    return quantizer.normalize(self.image_feature(self.contrastive_pooler(encoded)[:, 0]))

  def _text_features(
    self, texts: Float[Array, 'batch inputs embed']
  ) -> Float[Array, 'batch feature_dim']:
    return quantizer.normalize(self.text_feature(texts[:, -1]))


def example_inputs(
  config: CoCaConfig, batch: int = 1
) -> tuple[Float[Array, 'batch height width 3'], Int[Array, 'batch text_length']]:
  """Returns arrays with the shapes and dtypes of the arguments of `CoCa`, for initialization."""
  return (
    jnp.zeros((batch, *image_sizes.sides(config.image_size), 3), jnp.float32),
    jnp.ones((batch, config.text_length), jnp.int32),
  )
