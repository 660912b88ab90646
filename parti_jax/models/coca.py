"""The contrastive captioner, which ranks pictures for a text (CoCa, arXiv 2205.01917; Parti,
section 2: 16 pictures a prompt, ranked by CoCa).

An image encoder and a text decoder whose first half sees no picture: its class token makes the
text's contrastive vector. The second half looks at the picture as well and predicts the caption.
Two attentional poolers make of the image encoder's output what each half needs (CoCa, section 3.2
and figure 2).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

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
  """Sizes of a contrastive captioner; the defaults are CoCa-Base (CoCa, table 1).

  Attributes:
    image_size: height and width of the pictures, in pixels.
    patch_size: height and width of a patch; must divide `image_size`.
    image_layers: blocks of the image encoder.
    unimodal_layers: blocks of the text decoder's first half.
    multimodal_layers: blocks of its second half.
    width: model dimension of all three, `embed`.
    mlp_width: hidden dimension of their MLPs.
    heads: their attention heads; must divide `width`.
    caption_queries: vectors that the second half sees of a picture.
    feature_dim: length of the contrastive vectors.
    text_vocabulary: SentencePiece pieces.
    text_length: most text tokens.
    dropout: rate of dropout in training.
    dtype: name of the dtype that projections compute in; norms, logits and features are float32.
    remat: what the backward pass keeps, a name in `layer_stack.REMAT_POLICIES`.
    unroll: layers laid out in one turn of the scan.

  Raises:
    UserError: if `patch_size` does not divide `image_size`, or `heads` the width, or a value is
      out of its range.
  """

  image_size: int = 288
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

  BOUNDS = {'dropout': (0, 1)}  # Below 1, see `config_checks.check_dropout`.

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'patch_size', 'image_size')
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_dropout(self)

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def sizes(self):
    """What all blocks have in common, in the order that `transformer.Encoder` takes it."""
    return self.width, self.mlp_width, self.heads, self.dropout, self.compute_dtype


class ImageEncoder(nn.Module):
  """A Transformer over patches (ViT, arXiv 2010.11929)."""

  config: CoCaConfig

  @nn.compact
  def __call__(self, images, dropout_keys=None):
    """images: float32 [batch, height, width, 3] in [0, 1]. Returns [batch, patches, embed]."""
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
  """Learned queries that attend to a picture's patches, and a layer norm (CoCa, section 3.2).

  Attributes:
    queries: how many vectors to make.
    width: model dimension.
    heads: attention heads.
    dtype: of the computation.
  """

  queries: int
  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, encoded):
    """[batch, patches, embed] to [batch, queries, embed]."""
    table = layers.Embedding(self.queries, self.width, ('query', 'embed'), name='queries')
    query = table(jnp.arange(self.queries), self.dtype)
    query = jnp.broadcast_to(query, (encoded.shape[0],) + query.shape)
    attend = attention.CrossAttention(self.width, self.heads, self.dtype, name='attention')
    return layers.LayerNorm(self.dtype, name='norm')(attend(query, encoded))


class MultimodalBlock(nn.Module):
  """Causal self-attention over the text, cross-attention to the picture, MLP.

  Attributes: as transformer.EncoderBlock.
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

  def __call__(self, x, pooled, mask, dropout_keys=None):
    """x: [batch, length, embed]; pooled: [batch, queries, embed]; mask: of the text. As x."""
    attended = self.cross_attention(self.cross_norm(x), pooled)
    x = x + self.drop(attended, layers.fold(dropout_keys, 0))
    return self.text_block(x, mask, layers.fold(dropout_keys, 1))


class MultimodalDecoder(nn.Module):
  """The text decoder's second half and a last layer norm."""

  config: CoCaConfig

  def setup(self):
    self.block = MultimodalBlock(*self.config.sizes, parent=None)
    self.norm = layers.LayerNorm(self.config.compute_dtype)

  @nn.compact
  def __call__(self, x, pooled, mask, dropout_keys=None):
    """Arguments and result as MultimodalBlock; mask: bool [batch, 1, length, length]."""
    config = self.config
    stacked = self.param(
      'layers',
      layer_stack.initializer(self.block, config.multimodal_layers, x[:1], pooled[:1], mask[:1]),
    )

    def layer(params, place, x, beside, keys):
      del place  # All layers are alike.
      return self.block.apply({'params': params}, x, *beside, keys)

    if not self.is_initializing():
      x = layer_stack.run(
        layer, stacked, x, (pooled, mask), dropout_keys, config.remat, config.unroll
      )
    return self.norm(x)


def text_mask(text_tokens):
  """What each input of the text decoder sees: earlier ones, and of those only text.

  Args:
    text_tokens: int32 [batch, text_length], padded with 0.

  Returns:
    bool [batch, 1, text_length + 1, text_length + 1]. Input 0 is the beginning, input i the text
    token i - 1, the last one the class token, which sees all inputs that are no padding.
  """
  batch, length = text_tokens.shape
  causal = jnp.tril(jnp.ones((length + 1, length + 1), bool))
  ones = jnp.ones((batch, 1), bool)
  is_text = jnp.concatenate([ones, text_tokens[:, :-1] > 0, ones], axis=1)
  return (causal & is_text[:, None, :] | jnp.eye(length + 1, dtype=bool))[:, None]


class UnimodalDecoder(nn.Module):
  """The text decoder's first half: causal, without a picture, a class token at the end.

  Its layer norm stands before both the class token and the second half (CoCa norms the former).
  """

  config: CoCaConfig

  @nn.compact
  def __call__(self, text_tokens, dropout_keys=None):
    """Encodes texts.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0. Its last token is only predicted and
        not looked at.
      dropout_keys: layers.DropoutKeys, or None where dropout is off.

    Returns:
      [batch, text_length + 1, embed]: output i < text_length has seen the tokens before i, the
      last one is the class token's.
    """
    config = self.config
    batch, length = text_tokens.shape
    tokens = layers.Embedding(config.text_vocabulary, config.width, name='token_embedding')
    positions = layers.Embedding(
      length + 1, config.width, ('position', 'embed'), name='position_embedding'
    )
    class_token = self.param(
      'class_token',
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ('norm',)),
      (config.width,),
    )
    # Padding's id 0 has no other use as an input: it stands for the beginning.
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

  def __call__(self, images, text_tokens, dropout_keys=None):
    """What both losses need.

    Args:
      images: float32 [batch, height, width, 3] in [0, 1].
      text_tokens: int32 [batch, text_length], padded with 0.
      dropout_keys: layers.DropoutKeys of this batch, or None where dropout is off.

    Returns:
      A dict: 'image_features' and 'text_features' float32 [batch, feature_dim], unit vectors;
      'logit_scale' float32 [], of their products; 'logits' float32 [batch, text_length,
      text_vocabulary], of which entry i predicts text_tokens[:, i].
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

  def image_features(self, images):
    """float32 [batch, height, width, 3] in [0, 1] to unit vectors float32 [batch, feature_dim]."""
    return self._image_features(self.image_encoder(images))

  def text_features(self, text_tokens):
    """int32 [batch, text_length] to unit vectors float32 [batch, feature_dim]."""
    return self._text_features(self.unimodal(text_tokens))

  def _image_features(self, encoded):
    return quantizer.normalize(self.image_feature(self.contrastive_pooler(encoded)[:, 0]))

  def _text_features(self, texts):
    return quantizer.normalize(self.text_feature(texts[:, -1]))


def example_inputs(config: CoCaConfig, batch: int = 1):
  """Arrays of the shapes and dtypes that `CoCa.__call__` takes, for initialisation."""
  return (
    jnp.zeros((batch, config.image_size, config.image_size, 3), jnp.float32),
    jnp.ones((batch, config.text_length), jnp.int32),
  )
