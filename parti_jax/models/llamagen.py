"""LlamaGen: image tokens from a class or a text by a decoder alone (arXiv 2406.06525).

The condition comes before the image tokens in the same sequence, so there is no cross-attention. It is
one vector, of the class, or a vector for each text token. Queries and keys are rotated by the row
and the column of a position's input. The condition has no place in the grid, so its queries and
keys are 0: image tokens attend to it with equal weights.

| | layers | width | heads | mlp_width | condition of the published models |
|---|---|---|---|---|---|
| B | 12 | 768 | 12 | 2,048 | class |
| L | 24 | 1,024 | 16 | 2,816 | class |
| XL | 36 | 1,280 | 20 | 3,584 | class, text |
| XXL | 48 | 1,536 | 24 | 4,096 | class |
| 3B | 24 | 3,200 | 32 | 8,704 | class |
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

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import text_ids
from parti_jax.models import config_checks
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import block_options
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer

# How many vectors of the condition without text guidance's other side sees.
SLOTS = ('all', 'text')
# A text token of the condition without text, in each of the places that it takes.
NO_TEXT_ID = -1
# mlp_width is a multiple of this.
_MULTIPLE = 256

TextTokens = Int[Array, 'batch text_length']
Features = Float[Array, 'batch text_length features']


def mlp_width(width: int) -> int:
  """Returns the hidden dimension of the published models' MLPs: 8/3 of the width, rounded up."""
  return -(-(8 * width // 3) // _MULTIPLE) * _MULTIPLE


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class LlamaGenConfig(parti_config.OfImageTokens):
  """Sizes of LlamaGen; the defaults are those of L for classes and pictures of 256×256 pixels.

  Attributes:
    decoder_layers: number of blocks.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: number of attention heads; must divide `width`.
    classes: number of classes of a class-conditional model; None for texts. The prompt is then one
      text token, the number of the class; `classes` itself means no class.
    text_encoder: the config of the text encoder, a class in `parti_config.TEXT_ENCODERS`, or a dict
      with the class' fields and its 'kind'; None for classes. It takes over `dtype` and, if it has
      these fields, `remat` and `unroll`.
    codebook_size: number of different image tokens.
    grid: rows and columns of image tokens; their product is `image_length`.
    guidance_slots: how many vectors of the learned condition without text guidance's other side
      sees: 'all', or 'text' for as many as the text has tokens, as LlamaGen samples. Texts dropped in
      training see all.
    dropout: dropout rate in training.
    dtype: name of the dtype of projections; norms and logits are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if `heads` does not divide `width`, a value is out of range, or there is not exactly
      one of `classes` and `text_encoder`.
  """

  decoder_layers: int = 24
  width: int = 1024
  mlp_width: int = 2816
  heads: int = 16
  classes: int | None = 1000
  text_encoder: parti_config.TextEncoderConfig | None = None
  codebook_size: int = 16384
  grid: tuple[int, int] = (16, 16)
  guidance_slots: str = 'all'
  dropout: float = 0.1
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS: ClassVar[dict[str, tuple[float, float | None]]] = {
    'dropout': (0, 1)  # 1 is excluded by `config_checks.check_dropout`.
  }
  # What `flops` asks a config for.
  mlp_kernels: ClassVar[int] = 3

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_image_length(self, 'grid')
    config_checks.check_dropout(self)
    if self.head_dim % 4:
      raise errors.UserError(
        'LlamaGenConfig rotates pairs of features by rows and by columns, so width / heads must be a '
        f'multiple of 4; it is {self.head_dim}'
      )
    if self.guidance_slots not in SLOTS:
      raise errors.UserError(
        f'LlamaGenConfig.guidance_slots={checks.shown(self.guidance_slots)} is not one of '
        f'{", ".join(SLOTS)}'
      )
    if (self.classes is None) == (self.text_encoder is None):
      raise errors.UserError(
        f'LlamaGenConfig.classes={self.classes} and .text_encoder='
        f'{checks.shown(self.text_encoder)}: one of them must be None, and the other one set'
      )
    if self.text_encoder is not None:
      parti_config.set_text_encoder(self)

  @property
  def patterns(self) -> tuple[attention_patterns.AttentionPattern, ...]:
    """The attention pattern of all layers."""
    return (attention_patterns.AttentionPattern('global', self.grid),)

  @property
  def decoder_options(self) -> block_options.BlockOptions:
    """What the blocks consist of."""
    return block_options.BlockOptions(
      'rms', 'swiglu', rotary_grid=self.grid, rotary_inputs=True, cross_attention=False
    )

  @property
  def text_length(self) -> int:
    return 1 if self.text_encoder is None else self.text_encoder.text_length

  @property
  def text_vocabulary(self) -> int:
    if self.text_encoder is None:
      assert self.classes is not None
      return self.classes + 1
    return self.text_encoder.text_vocabulary

  @property
  def text_width(self) -> int:
    """Number of features of an encoded text token, or of a class."""
    return self.width if self.text_encoder is None else self.text_encoder.width

  @property
  def encoder_layers(self) -> int:
    return 0 if self.text_encoder is None else self.text_encoder.layers


class ClassEncoder(nn.Module):
  """A vector for each class, and one for none.

  Attributes:
    config: sizes.
  """

  config: LlamaGenConfig

  def setup(self):
    # The number of rows is odd, so they are not split.
    self.embedding = layers.Embedding(
      self.config.text_vocabulary, self.config.width, ('position', 'embed')
    )

  def __call__(self, text_tokens: TextTokens) -> Features:
    """Returns the vectors of classes, int32 in [0, classes]."""
    return self.embedding(text_tokens)


class ImageDecoder(token_decoder.CausalDecoder):
  """A causal Transformer over a condition and image tokens in raster order.

  Attributes:
    config: sizes.
  """

  config: LlamaGenConfig

  def setup(self):
    super().setup()
    config = self.config
    if config.text_encoder is not None:
      self.project_text = layers.MLP(config.width, config.width, config.compute_dtype)
      self.no_text = layers.parameter(
        self,
        'no_text',
        nn.initializers.normal(config.text_width**-0.5),
        ('position', 'embed'),
        (config.text_length, config.text_width),
      )

  def __call__(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> tuple[Float[Array, 'batch length codebook'], transformer.DecoderState]:
    """Computes the logits of the next positions; as `generators.Decoder` describes it."""
    x, after = self.decoder(self.next_inputs(previous, state), state=state)
    assert after is not None
    return self.logits_from(x), after

  def next_inputs(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> Float[Array, 'batch length embed']:
    """Returns the first layer's input; as `generators.Decoder` describes it."""
    assert state.start is not None
    positions = state.position[..., None] + jnp.arange(previous.shape[1])
    is_first = jnp.broadcast_to(positions == 0, previous.shape)[..., None]
    x = jnp.where(is_first, state.start[:, None], self.token_embedding(previous))
    return x.astype(self.config.compute_dtype)

  def condition(
    self,
    features: Features,
    mask: Bool[Array, 'batch 1 1 text_length'],
    dropped: Bool[Array, 'batch'],
  ) -> Float[Array, 'batch text_length embed']:
    """Returns the vectors of texts, of which the last one is that of the last token.

    Args:
      features: the output of the text encoder, of which `mask` says what is a text.
      mask: True for the last places of each row.
      dropped: whether a row has no text.
    """
    length = features.shape[1]
    counts = jnp.sum(mask[:, 0, 0], axis=1)
    # The texts begin at the first place, and their vectors end at the last.
    places = (jnp.arange(length) + counts[:, None]) % length
    features = jnp.take_along_axis(features, places[..., None], axis=1)
    features = jnp.where(dropped[:, None, None], self.no_text, features)
    return self.project_text(features)

  def whole(
    self,
    condition: Float[Array, 'batch text_length embed'],
    mask: Bool[Array, 'batch 1 1 text_length'],
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None,
    all_layers: bool = False,
  ) -> Float[Array, '*layers batch image_length embed']:
    """Returns the last layer's output at each image token, or with `all_layers` that of all.

    Args:
      condition: the vectors of a class or a text.
      mask: True where they may be attended to; the last one always is.
      image_tokens: image tokens. The last one is not an input.
      dropout_keys: keys of the decoder; None if dropout is off.
      all_layers: whether to return the outputs of all layers.
    """
    tokens = self.token_embedding(image_tokens[:, :-1])
    x = jnp.concatenate([condition.astype(tokens.dtype), tokens], axis=1)
    x = self.drop(x.astype(self.config.compute_dtype), layers.fold(dropout_keys, 0))
    keys = layers.fold(dropout_keys, 1)
    before = mask[..., :-1]  # The last one is the input at the first image token.
    x = self.decoder(x, None, before, dropout_keys=keys, all_layers=all_layers)[0]
    return x[..., before.shape[-1] :, :]

  def init_state(
    self,
    condition: Float[Array, 'batch text_length embed'],
    mask: Bool[Array, 'batch 1 1 text_length'],
    length: int,
    int8_cache: bool,
  ) -> transformer.DecoderState:
    """Returns the state before the first image token; the arguments are as `whole`'s."""
    condition = condition.astype(self.config.compute_dtype)
    state = self.decoder.init_state(condition[:, :-1], mask[..., :-1], length, int8_cache)
    return state.replace(start=condition[:, -1])


class LlamaGen(nn.Module):
  """Predicts image tokens from a class or a text, and earlier image tokens.

  The methods are those of `generators.Generator`.

  Attributes:
    config: sizes.
  """

  config: LlamaGenConfig

  def setup(self):
    config = self.config
    of_classes = config.text_encoder is None
    self.text_encoder = ClassEncoder(config) if of_classes else text_encoders.module(config)
    self.image_decoder = ImageDecoder(config)

  def __call__(
    self,
    text_tokens: TextTokens,
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Features | None = None,
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits of every image token.

    Args:
      text_tokens: text tokens, or the number of the class.
      image_tokens: image tokens in [0, codebook_size). The last one is not an input.
      dropout_keys: keys of this batch; None if dropout is off.
      text_features: the text encoder's output, if it was computed before; None to run it.
    """
    condition = self._condition(text_tokens, layers.fold(dropout_keys, 0), text_features)
    keys = layers.fold(dropout_keys, 1)
    return self.logits_from(self.image_decoder.whole(*condition, image_tokens, keys))

  def all_layer_outputs(
    self,
    text_tokens: TextTokens,
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Features | None = None,
  ) -> Float[Array, 'layers batch image_length embed']:
    """Returns the outputs of all layers; the arguments are those of `__call__`."""
    condition = self._condition(text_tokens, layers.fold(dropout_keys, 0), text_features)
    keys = layers.fold(dropout_keys, 1)
    return self.image_decoder.whole(*condition, image_tokens, keys, all_layers=True)

  def logits_from(
    self, outputs: Float[Array, 'batch image_length embed']
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits for the outputs of one layer."""
    return self.image_decoder.logits_from(outputs)

  def encode_text(
    self, text_tokens: TextTokens, length: int | None = None, int8_cache: bool = False
  ) -> transformer.DecoderState:
    """Encodes texts or classes for sampling; as `generators.Generator` describes it."""
    condition = self._condition(text_tokens, None, None)
    length = self.config.image_length if length is None else length
    return self.image_decoder.init_state(*condition, length, int8_cache)

  def _condition(
    self,
    text_tokens: TextTokens,
    dropout_keys: layers.DropoutKeys | None,
    text_features: Features | None,
  ) -> tuple[Float[Array, 'batch text_length embed'], Bool[Array, 'batch 1 1 text_length']]:
    """Returns the vectors of the condition, and True where they may be attended to."""
    config = self.config
    if config.text_encoder is None:
      return self.text_encoder(text_tokens), jnp.ones(text_tokens.shape, bool)[:, None, None]
    without = text_tokens[:, 0] == NO_TEXT_ID
    tokens = jnp.where(without[:, None], text_encoders.empty_text(config, text_tokens), text_tokens)
    if text_features is None:
      text_features = self.text_encoder(tokens, dropout_keys)
    counts = jnp.sum(text_encoders.text_mask(config, tokens), axis=(1, 2, 3))
    is_empty = jnp.all(tokens == text_encoders.empty_text(config, tokens), axis=1)
    counts = jnp.where(is_empty, tokens.shape[1], counts)  # Dropped in training.
    counts = jnp.where(without, jnp.sum(text_tokens == NO_TEXT_ID, axis=1), counts)
    places = jnp.arange(tokens.shape[1])
    mask = places >= tokens.shape[1] - counts[:, None]
    features = text_features.astype(config.compute_dtype)
    mask = mask[:, None, None]
    return self.image_decoder.condition(features, mask, is_empty | without), mask


def empty_text(config: LlamaGenConfig, text_tokens: TextTokens) -> TextTokens:
  """Returns the condition of guidance's other side in each row: no class, or no text.

  Args:
    config: sizes of the network.
    text_tokens: the texts that it goes with. With `guidance_slots` 'text' it has as many tokens.
  """
  if config.text_encoder is None:  # The number after the last class.
    return jnp.full_like(text_tokens, config.text_vocabulary - 1)
  if config.guidance_slots == 'all':
    return jnp.full_like(text_tokens, NO_TEXT_ID)
  mask = text_encoders.text_mask(config, text_tokens)[:, 0, 0]
  return jnp.where(mask, NO_TEXT_ID, text_ids.PAD_ID).astype(text_tokens.dtype)


def check_empty_text(config: LlamaGenConfig, ids: Any, tokenizer: str) -> None:
  """Checks that a text tokenizer makes the number of no class of the empty text.

  Args:
    config: sizes of the network. With a text encoder, that decides what the empty text is.
    ids: the ids of the empty text, int32 [at least 3].
    tokenizer: the tokenizer, for messages.

  Raises:
    UserError: if it makes another one.
  """
  if config.text_encoder is not None:
    text_encoders.check_empty_text(config.text_encoder, ids, tokenizer)
  elif (found := np.asarray(ids).tolist()[0]) != config.classes:
    raise errors.UserError(
      f'{tokenizer} encodes the empty text as {found}, but the model has {config.classes} classes, '
      'and that number stands for none; give the names of its classes'
    )


def example_inputs(
  config: LlamaGenConfig, batch: int = 1
) -> tuple[TextTokens, Int[Array, 'batch image_length']]:
  """Returns arrays with the shapes and dtypes of the arguments of `LlamaGen`, for initialization."""
  return (
    jnp.ones((batch, config.text_length), jnp.int32),
    jnp.zeros((batch, config.image_length), jnp.int32),
  )


def _layer_weights(config: LlamaGenConfig) -> int:
  return 4 * config.width**2 + config.mlp_kernels * config.width * config.mlp_width


def decoder_flops(config: LlamaGenConfig) -> int:
  """FLOPs of one condition and its image tokens through the image-token decoder."""
  before, image, width = config.text_length - 1, config.image_length, config.width
  projections = 2 * (before + image) * _layer_weights(config)
  attention = 4 * width * (image * (before + image) + before**2)
  of_text = 0
  if config.text_encoder is not None:
    of_text = 2 * config.text_length * (config.text_width + width) * width
  logits = 2 * image * width * config.codebook_size
  return config.decoder_layers * (projections + attention) + of_text + logits


def step_flops(config: LlamaGenConfig) -> int:
  """FLOPs of sampling the last image token of one sequence, with a cache of what is before it."""
  width = config.width
  attention = 4 * width * (config.text_length - 1 + config.image_length)
  layer = 2 * _layer_weights(config) + attention
  return config.decoder_layers * layer + 2 * width * config.codebook_size


def text_flops(config: LlamaGenConfig) -> int:
  """FLOPs of encoding one text; those of a class are none."""
  return 0 if config.text_encoder is None else text_encoders.forward_flops(config)
