"""The kinds of generator that the system can use, and what they have in common.

A generator predicts image tokens from a text. A kind is a config and two linen modules: the whole
network, for training and for encoding texts, and its image-token decoder, for sampling. `Config`,
`Generator` and `Decoder` are what all other code relies on. A new kind is one entry of `KINDS`, or a
call of `register` in a module of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import flax.linen as nn
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import dalle_mini
from parti_jax.models import flops
from parti_jax.models import kinds
from parti_jax.models import llamagen
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer

Tokens = Int[Array, 'batch text_length']


@runtime_checkable
class Config(Protocol):
  """The config of a generator: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""

  @property
  def image_length(self) -> int:
    """Number of an image's tokens."""

  @property
  def codebook_size(self) -> int:
    """Number of different image tokens, which is the number of logits."""

  @property
  def text_vocabulary(self) -> int:
    """Number of text token ids."""

  @property
  def text_length(self) -> int:
    """Number of text tokens, padding included."""

  @property
  def text_encoder(self) -> parti_config.TextEncoderConfig | None:
    """Config of a text encoder from elsewhere; None if the text encoder is the kind's own."""

  @property
  def text_width(self) -> int:
    """Number of features of an encoded text token."""

  @property
  def decoder_layers(self) -> int:
    """Number of layers of the image-token decoder."""

  @property
  def patterns(self) -> tuple[attention_patterns.AttentionPattern, ...]:
    """Attention patterns of the first decoder layers; the other layers repeat them."""

  @property
  def width(self) -> int:
    """Number of features of a position between two decoder layers."""

  @property
  def heads(self) -> int:
    """Number of attention heads of the decoder."""

  @property
  def cached_heads(self) -> int:
    """Number of heads of the decoder's keys and values."""

  @property
  def head_dim(self) -> int:
    """Number of features of a head."""

  @property
  def dtype(self) -> str:
    """Name of the dtype to compute in."""

  @property
  def compute_dtype(self) -> Any:
    """The same as a dtype."""

  @property
  def remat(self) -> str:
    """Name of the rematerialization policy."""


class Generator(Protocol):
  """A generator's linen module; the methods are called by `nn.Module.apply`.

  Its parameters are {'text_encoder', 'image_decoder'}. Those of the decoder's layers are stacked, as
  `layer_stack.parameters` makes them, at image_decoder/decoder/layers.
  """

  def __call__(
    self,
    text_tokens: Tokens,
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Float[Array, 'batch text_length features'] | None = None,
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits of every image token, given the text and the earlier tokens.

    Args:
      text_tokens: text tokens.
      image_tokens: image tokens in [0, codebook_size). The last one is not an input.
      dropout_keys: keys of this batch; None if dropout is off.
      text_features: the text encoder's output, if it was computed before; None to run it.
    """

  def all_layer_outputs(
    self,
    text_tokens: Tokens,
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Float[Array, 'batch text_length features'] | None = None,
  ) -> Float[Array, 'layers batch image_length embed']:
    """Returns the outputs of all decoder layers, for losses over depth.

    The arguments are those of `__call__`, whose result is `logits_from` of the last layer's output.
    """

  def logits_from(
    self, outputs: Float[Array, 'batch image_length embed']
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits for the outputs of one layer."""

  def encode_text(
    self, text_tokens: Tokens, length: int | None = None, int8_cache: bool = False
  ) -> transformer.DecoderState:
    """Encodes texts for sampling.

    Args:
      text_tokens: text tokens.
      length: number of image tokens that the caches can hold; all by default.
      int8_cache: whether to hold keys and values in int8.

    Returns:
      The state of the decoder before the first image token, at position 0. The cache of a layer has
      the slots of `AttentionPattern.num_slots`. What depends on the text alone is in `texts`,
      `text_mask` and `start`, with the rows of the batch first.
    """


class Decoder(Protocol):
  """The image-token decoder's linen module, applied to ['image_decoder'] of the parameters.

  It is also the generator's submodule of that name, as a rule.
  """

  def __call__(
    self, previous: Int[Array, 'batch length'], *, state: transformer.DecoderState
  ) -> tuple[Float[Array, 'batch length codebook'], transformer.DecoderState]:
    """Returns the float32 logits of the next positions, and the state with them.

    Args:
      previous: the image token before each position. The value for position 0 is not used.
      state: the state after the previous positions.
    """

  def look_ahead(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> tuple[Float[Array, 'batch length codebook'], list[transformer.Entry]]:
    """Returns the logits of the next positions, of which the caller chooses how many to keep.

    Args:
      previous: the token before each position. Rows may reach beyond the last position; what they
        get there has no meaning, but must be finite.
      state: the state before these positions, with a position for each row.

    Returns:
      Float32 logits, and the keys and values of the positions for `DecoderState.advanced`.
    """

  def next_inputs(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> Float[Array, 'batch length embed']:
    """Returns the first layer's input at the next positions; the arguments are as `look_ahead`'s."""

  def layer_logits(
    self, x: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length codebook']:
    """Returns the float32 logits that the output of any layer predicts, before the final norm."""


class Block(Protocol):
  """One layer of the image-token decoder, applied to the parameters of that layer.

  Early exit calls the methods `project`, `decode_from_cache` and `decode_ahead` of
  `transformer.DecoderBlock`, with its arguments.
  """


class Kind(NamedTuple):
  """A kind of generator.

  Attributes:
    config: its config class.
    module: makes the linen module, a `Generator`, from a config.
    decoder: makes the linen module of its image-token decoder, a `Decoder`, from a config.
    block: makes the linen module of one layer of the decoder, a `Block`, from a config; without
      dropout.
    example_inputs: makes text tokens and image tokens from a config, for initialization.
    decoder_flops: returns the FLOPs of one text's features and its image tokens through the decoder,
      from a config.
    step_flops: returns the FLOPs of sampling the last image token of one sequence, from a config.
    text_flops: returns the FLOPs of encoding one text, from a config.
    empty_text: makes the condition without text for guidance, from a config and the text tokens that
      it goes with; of their shape.
    check_empty_text: checks a text tokenizer, given a config, the ids that the tokenizer makes of the
      empty text, and the tokenizer's name; raises UserError if it makes another condition without
      text than training has to have seen.
    upgrade: converts the fields in a file of an older version to those of this version.
  """

  config: type
  module: Callable[[Any], nn.Module]
  decoder: Callable[[Any], nn.Module]
  block: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  decoder_flops: Callable[[Any], int]
  step_flops: Callable[[Any], int]
  text_flops: Callable[[Any], int] = text_encoders.forward_flops
  empty_text: Callable[[Any, Tokens], Tokens] = text_encoders.empty_text
  check_empty_text: Callable[[Any, Any, str], None] = lambda config, ids, tokenizer: (
    text_encoders.check_empty_text(config.text_encoder, ids, tokenizer)
  )
  upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict


# By their names in config.json and in checkpoints. Files that name no kind are of the first one.
KINDS = kinds.Kinds.of_part(
  'a generator',
  'generators',
  Config,
  {
    'parti': Kind(
      parti_config.PartiConfig,
      parti.Parti,
      token_decoder.TokenDecoder,
      token_decoder.block,
      parti.example_inputs,
      flops.token_decoder_forward,
      flops.parti_sampling_step,
      upgrade=parti_config.upgrade_config,
    ),
    'dalle_mini': Kind(
      dalle_mini.DalleMiniConfig,
      dalle_mini.DalleMini,
      dalle_mini.ImageDecoder,
      token_decoder.block,
      dalle_mini.example_inputs,
      flops.token_decoder_forward,
      flops.parti_sampling_step,
      text_flops=flops.text_encoder_forward,
      empty_text=dalle_mini.empty_text,
      check_empty_text=dalle_mini.check_empty_text,
    ),
    'llamagen': Kind(
      llamagen.LlamaGenConfig,
      llamagen.LlamaGen,
      llamagen.ImageDecoder,
      token_decoder.block,
      llamagen.example_inputs,
      llamagen.decoder_flops,
      llamagen.step_flops,
      text_flops=llamagen.text_flops,
      empty_text=llamagen.empty_text,
      check_empty_text=llamagen.check_empty_text,
    ),
  },
)
# Their config classes.
CONFIGS = KINDS.configs


def register(name: str, kind: Kind) -> None:
  """Makes a kind known, for all code that reads or writes generators.

  Args:
    name: its name in config.json and in checkpoints.
    kind: the kind. A class of the same module and name replaces an earlier one.

  Raises:
    UserError: if the name is invalid or taken, or the config isn't a frozen dataclass with the
      members of `Config`.
  """
  KINDS.register(name, kind)


def of(config: Config) -> Kind:
  """Returns the kind of a config; raises UserError if it is of none."""
  return KINDS.of(config)


def module(config: Config) -> nn.Module:
  """Returns the linen module of a generator, a `Generator`."""
  return of(config).module(config)


def decoder(config: Config) -> nn.Module:
  """Returns the linen module of a generator's image-token decoder, a `Decoder`."""
  return of(config).decoder(config)


def block(config: Config) -> nn.Module:
  """Returns the linen module of a layer of the image-token decoder, a `Block`."""
  return of(config).block(config)


def example_inputs(config: Config) -> tuple:
  """Returns text tokens and image tokens of the shapes that the module takes, for initialization."""
  return of(config).example_inputs(config)


def layer_pattern(config: Config, layer: int) -> attention_patterns.AttentionPattern:
  """Returns the attention pattern of a decoder layer."""
  return config.patterns[layer % len(config.patterns)]


def upgrade(config: type, fields: dict[str, Any]) -> dict[str, Any]:
  """Converts the fields in a file of an older version to those of this version.

  Args:
    config: the class of a config, of any network. Those of other networks have no older fields.
    fields: the fields in the file.

  Raises:
    UserError: if older and newer fields contradict each other.
  """
  found = next((kind.upgrade for kind in KINDS.values() if kind.config is config), dict)
  return found(fields)


def text_flops(config: Config) -> int:
  """Returns the FLOPs of encoding one text."""
  return of(config).text_flops(config)


def decoder_flops(config: Config) -> int:
  """Returns the FLOPs of one text's features and its image tokens through the decoder."""
  return of(config).decoder_flops(config)


def step_flops(config: Config) -> int:
  """Returns the FLOPs of sampling the last image token of one sequence."""
  return of(config).step_flops(config)


def empty_text(config: Config, text_tokens: Tokens) -> Tokens:
  """Returns the condition of classifier-free guidance without text, in each row.

  Args:
    config: sizes of the generator.
    text_tokens: the texts that it goes with. Most kinds take no more than their shape.
  """
  return of(config).empty_text(config, text_tokens)


def check_empty_text(config: Config, ids: Any, tokenizer: str) -> None:
  """Checks that a text tokenizer makes the condition without text that a generator expects.

  Args:
    config: sizes of the generator.
    ids: the ids of the empty text, int32 [at least 3].
    tokenizer: the tokenizer, for messages.

  Raises:
    UserError: if it doesn't.
  """
  of(config).check_empty_text(config, ids, tokenizer)
