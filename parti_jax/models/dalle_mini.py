"""DALL·E mini and DALL·E mega: an encoder-decoder with NormFormer's norms (arXiv 2110.09456).

It has the roles of Parti's parts, a text encoder and an image-token decoder. It differs in its blocks
(`block_options.BlockOptions.norm_after_attention`, the norms with biases, the MLP 'normed_geglu'), in
a norm of the embeddings, and in one learned vector for each position of both sequences. It has no
paper; the networks are those of the published models dalle-mini/dalle-mini and dalle-mini/dalle-mega.

| | layers of each tower | width | mlp_width | heads | text_vocabulary |
|---|---|---|---|---|---|
| mini | 12 | 1,024 | 2,730 | 16 | 50,264 |
| mega | 24 | 2,048 | 4,096 | 32 | 50,272 |
"""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import errors
from parti_jax.core import text_ids
from parti_jax.models import clip
from parti_jax.models import config_checks
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import block_options
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer

# The first token of each text, and the one at its end.
START_ID, END_ID = 0, 2
EPSILON = 1e-5
# Of both towers.
_OPTIONS = block_options.BlockOptions(
  norm='layer_bias', mlp='normed_geglu', norm_after_attention='layer_scale_bias'
)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class DalleMiniConfig(parti_config.OfImageTokens):
  """Sizes of DALL·E mini; the defaults are those of the published mini.

  Attributes:
    encoder_layers: number of blocks of the text encoder.
    decoder_layers: number of blocks of the image-token decoder.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: number of attention heads; must divide `width`.
    text_vocabulary: number of text token ids; 0 begins a text, 2 ends it.
    text_length: maximum number of text tokens, including both of these.
    codebook_size: number of different image tokens.
    grid: rows and columns of image tokens; their product is `image_length`.
    dropout: dropout rate in training; the published models had none.
    dtype: name of the dtype of projections; norms and logits are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if `heads` does not divide `width`, or a value is out of range.
  """

  encoder_layers: int = 12
  decoder_layers: int = 12
  width: int = 1024
  mlp_width: int = 2730
  heads: int = 16
  text_vocabulary: int = 50264
  text_length: int = 64
  codebook_size: int = 16384
  grid: tuple[int, int] = (16, 16)
  dropout: float = 0.0
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS: ClassVar[dict[str, tuple[float, float | None]]] = {
    'dropout': (0, 1),  # 1 is excluded by `config_checks.check_dropout`.
    'text_length': (2, config_checks.MAX_SIZE),
    'text_vocabulary': (END_ID + 1, config_checks.MAX_SIZE),
  }
  # What `token_decoder.TokenDecoder` and `flops` ask a config for.
  positions: ClassVar[str] = 'one_table'
  mlp_kernels: ClassVar[int] = 3
  text_encoder: ClassVar[None] = None

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_image_length(self, 'grid')
    config_checks.check_dropout(self)

  @property
  def patterns(self) -> tuple[attention_patterns.AttentionPattern, ...]:
    """The attention pattern of all decoder layers."""
    return (attention_patterns.AttentionPattern('global', self.grid),)

  @property
  def decoder_options(self) -> block_options.BlockOptions:
    """What the blocks of the image-token decoder consist of."""
    return _OPTIONS

  @property
  def text_width(self) -> int:
    """Number of features of an encoded text token."""
    return self.width


def _embedding_norm(config: DalleMiniConfig) -> layers.LayerNorm:
  return layers.LayerNorm(config.compute_dtype, EPSILON, use_bias=True)


class TextEncoder(nn.Module):
  """A bidirectional Transformer over byte pairs.

  Attributes:
    config: sizes.
  """

  config: DalleMiniConfig

  def setup(self):
    config = self.config
    self.token_embedding = layers.Embedding(config.text_vocabulary, config.width)
    self.position_embedding = layers.Embedding(
      config.text_length, config.width, ('position', 'embed')
    )
    self.embedding_norm = _embedding_norm(config)
    self.encoder = transformer.Encoder(
      config.encoder_layers,
      config.width,
      config.mlp_width,
      config.heads,
      config.dropout,
      config.compute_dtype,
      config.remat,
      config.unroll,
      _OPTIONS,
    )
    self.drop = layers.Dropout(config.dropout)

  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch text_length embed']:
    """Encodes texts.

    Args:
      text_tokens: text tokens. No position attends to what follows the first END_ID, so any ids may
        stand there.
      dropout_keys: keys of the encoder; None if dropout is off.
    """
    positions = self.position_embedding(jnp.arange(text_tokens.shape[1]))
    x = self.embedding_norm(self.token_embedding(text_tokens) + positions)
    x = self.drop(x, layers.fold(dropout_keys, 0))
    return self.encoder(x, clip.text_mask(text_tokens, END_ID), layers.fold(dropout_keys, 1))


class ImageDecoder(token_decoder.TokenDecoder):
  """A causal Transformer over image tokens in raster order, with cross-attention to the text."""

  config: Any  # A DalleMiniConfig.

  def setup(self):
    config = self.config
    self.position_embedding = layers.Embedding(
      config.image_length, config.width, ('position', 'embed')
    )
    self.embedding_norm = _embedding_norm(config)
    super().setup()

  def embed(
    self,
    previous: Int[Array, 'batch length'],
    position: int | Int[Array, ''] | Int[Array, 'batch'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    positions = jnp.asarray(position)[..., None] + jnp.arange(previous.shape[1])
    # As in the super class, beyond the grid too.
    positions = jnp.minimum(positions, self.config.image_length - 1)
    x = jnp.where((positions == 0)[..., None], self.begin, self.token_embedding(previous))
    x = self.embedding_norm(x + self.position_embedding(positions))
    return self.drop(x, dropout_keys)


class DalleMini(parti.Parti):
  """Predicts image tokens from text and earlier image tokens.

  Attributes:
    config: sizes.
  """

  config: Any  # A DalleMiniConfig.

  def setup(self):
    self.text_encoder = TextEncoder(self.config)
    self.image_decoder = ImageDecoder(self.config)

  def text_mask(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Bool[Array, 'batch 1 1 text_length']:
    return clip.text_mask(text_tokens, END_ID)


def empty_text(
  config: DalleMiniConfig, text_tokens: Int[Array | np.ndarray, 'batch text_length']
) -> Int[Array, 'batch text_length']:
  """Returns the empty text in each row; only the shape of the given texts matters."""
  del config
  empty = jnp.full_like(text_tokens, text_ids.PAD_ID)
  return empty.at[:, 0].set(START_ID).at[:, 1].set(END_ID)


def check_empty_text(config: DalleMiniConfig, ids: Any, tokenizer: str) -> None:
  """Checks that a text tokenizer begins texts, ends them and pads them as the network expects.

  Args:
    config: sizes of the network.
    ids: the ids of the empty text, int32 [at least 3].
    tokenizer: the tokenizer, for messages.

  Raises:
    UserError: if it makes another empty text.
  """
  del config
  found = np.asarray(ids, np.int32)
  wanted = np.full_like(found, text_ids.PAD_ID)
  wanted[:2] = START_ID, END_ID
  if not np.array_equal(found, wanted):
    raise errors.UserError(
      f'{tokenizer} encodes the empty text as {found[:3].tolist()} and so on, but DALL·E mini '
      f'expects {[START_ID, END_ID, text_ids.PAD_ID]}: the start and the end of a text, then '
      'padding; it belongs to another network'
    )


def example_inputs(
  config: DalleMiniConfig, batch: int = 1
) -> tuple[Int[Array, 'batch text_length'], Int[Array, 'batch image_length']]:
  """Returns arrays with the shapes and dtypes of the arguments of `DalleMini`, for initialization."""
  text = jnp.zeros((batch, config.text_length), jnp.int32)
  return empty_text(config, text), jnp.zeros((batch, config.image_length), jnp.int32)
