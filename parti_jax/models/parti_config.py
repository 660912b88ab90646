"""Sizes of a Parti model (Parti, table 1), configured with gin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import ClassVar
from typing import Protocol

import jax.numpy as jnp

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.models import clip
from parti_jax.models import config_checks
from parti_jax.models import kinds
from parti_jax.models import t5_encoder
from parti_jax.models.nn import attention_patterns as attention_patterns_lib
from parti_jax.models.nn import block_options

# The behavior of older versions, for configuration files that lack these fields.
LEGACY_DEFAULTS = {
  'attention_patterns': ('global',),
  'conv_kernel': 11,
  'text_encoder': None,
  'norm': 'layer',
  'mlp': 'gelu',
  'qk_norm': False,
  'positions': 'learned',
  'kv_heads': None,
}
# Values of fields that are names.
_CHOICES = {
  'norm': ('layer', 'rms'),
  'mlp': ('gelu', 'swiglu'),
  'positions': block_options.POSITIONS,
}
# Fields of a text encoder that follow those of the generator, where it has them.
_SHARED = ('dtype', 'remat', 'unroll')


class TextEncoderConfig(Protocol):
  """The config of a text encoder from elsewhere: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def layers(self) -> int:
    """Number of layers."""

  @property
  def width(self) -> int:
    """Number of features of an encoded text token."""

  @property
  def text_vocabulary(self) -> int:
    """Number of text token ids."""

  @property
  def text_length(self) -> int:
    """Number of text tokens, padding included."""

  @property
  def dtype(self) -> str:
    """Name of the dtype to compute in."""


# The config classes of text encoders from elsewhere, by the names of their kinds in config.json.
# Their networks are in `text_encoders`, which needs this module.
TEXT_ENCODERS = kinds.Configs(
  'a text encoder',
  'text_encoders',
  TextEncoderConfig,
  {'t5': t5_encoder.T5EncoderConfig, 'clip': clip.CLIPTextConfig},
)


def upgrade_config(sizes: dict[str, Any]) -> dict[str, Any]:
  """Converts the sizes in a file of an older version to the fields of this version.

  Raises:
    UserError: if the file has both the old and the new field, or the old field has the wrong type.
  """
  sizes = dict(sizes)
  if 'attention_pattern' in sizes:  # One pattern for all layers, and 'causal' was 'global'.
    if 'attention_patterns' in sizes:
      raise errors.UserError(
        "it has both 'attention_patterns' and its older name 'attention_pattern'; remove one"
      )
    older = checks.text('attention_pattern', sizes.pop('attention_pattern'))
    sizes['attention_patterns'] = ('global' if older == 'causal' else older,)
  return LEGACY_DEFAULTS | sizes


def text_encoder_config(values: Mapping[str, Any], owner: str = 'PartiConfig') -> TextEncoderConfig:
  """Returns the config of a text encoder from its fields and its 'kind'; the inverse of `as_dict`.

  Args:
    values: the fields.
    owner: name of the generator's config class, for messages.

  Raises:
    UserError: if the kind or a field is unknown or missing, or a value is invalid.
  """
  name = values.get('kind')
  if not isinstance(name, str) or name not in TEXT_ENCODERS:
    raise errors.UserError(
      f'{owner}.text_encoder.kind={checks.shown(name)} is not one of '
      f'{", ".join(TEXT_ENCODERS)}; {kinds.REMEDY}'
    )
  fields = {field: value for field, value in values.items() if field != 'kind'}
  kind = TEXT_ENCODERS[name]
  if different := fields.keys() ^ checks.field_types(kind).keys():
    raise errors.UserError(
      f'{owner}.text_encoder has other fields than {kind.__name__}: '
      f'{", ".join(map(checks.shown, sorted(different)))}'
    )
  return kind(**fields)


def set_text_encoder(config: Any) -> None:
  """Makes a config of the dict of a generator's text encoder, which takes over shared fields.

  Args:
    config: the config of a generator, whose field `text_encoder` isn't None; called while it is made.

  Raises:
    UserError: if that is neither a config nor such a dict.
  """
  found: Any = config.text_encoder
  if isinstance(found, Mapping):
    found = text_encoder_config(found, type(config).__name__)
  elif type(found) not in TEXT_ENCODERS.values():
    known = ' or '.join(f'@{kind.__name__}()' for kind in TEXT_ENCODERS.values())
    raise errors.UserError(
      f'{type(config).__name__}.text_encoder={checks.shown(found)} must be None, or in gin {known}; '
      f'{kinds.REMEDY}'
    )
  shared = {field.name for field in dataclasses.fields(found)} & set(_SHARED)
  found = dataclasses.replace(found, **{name: getattr(config, name) for name in shared})
  object.__setattr__(config, 'text_encoder', found)


def as_dict(config: Any) -> dict[str, Any]:
  """Returns the fields of a network's config, of any class; a text encoder's with its 'kind'."""
  values = dataclasses.asdict(config)
  encoder = getattr(config, 'text_encoder', None)
  if type(encoder) in TEXT_ENCODERS.values():
    kind = TEXT_ENCODERS.name_of(encoder)
    values['text_encoder'] = {'kind': kind} | values['text_encoder']
  return values


class OfImageTokens:
  """What the sizes of a decoder of image tokens imply; a base of generators' configs."""

  width: int
  heads: int
  grid: tuple[int, int]
  dtype: str

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def cached_heads(self) -> int:
    """Number of heads of the decoder's keys and values."""
    return self.heads

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class PartiConfig(OfImageTokens):
  """Sizes of the text encoder and of the image-token decoder.

  Attributes:
    encoder_layers: number of blocks of the text encoder.
    decoder_layers: number of blocks of the image-token decoder.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: number of attention heads; must divide `width`.
    text_vocabulary: number of SentencePiece pieces, including the ids 0 (padding), 1 (end) and 2
      (unknown).
    text_length: maximum number of text tokens.
    codebook_size: number of different image tokens.
    grid: rows and columns of image tokens; their product is `image_length`.
    dropout: dropout rate in training.
    dtype: name of the dtype of projections; norms and logits are float32.
    attention_patterns: the patterns of self-attention in the decoder, a schedule that the layers
      repeat; each is a name in `nn.attention_patterns.PATTERNS`. A schedule that consists of
      repetitions is shortened to a single one.
    conv_kernel: side of the square of the pattern 'conv'; odd.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.
    text_encoder: the config of a text encoder from elsewhere, a class in TEXT_ENCODERS; None for
      Parti's own. It replaces `text_vocabulary`, `text_length` and `encoder_layers`, and takes over
      `dtype` and, if it has these fields, `remat` and `unroll`. A dict with the class' fields and
      its 'kind' works too.
    norm: the norm of the decoder and of Parti's own text encoder: 'layer', or 'rms' for RMSNorm.
    mlp: their MLP: 'gelu', or 'swiglu', which has a third projection, a gate.
    qk_norm: whether an RMSNorm over head_dim, with a learned scale, follows the projections of
      queries and keys in all their attention.
    positions: how the decoder knows rows and columns: 'learned' embeddings of both, or 'rotary_2d',
      which rotates queries and keys of its self-attention (`nn.rotary.rotate`).
    kv_heads: number of heads of the decoder's keys and values, each of which equally many heads of
      queries share; must divide `heads`. None for one for each of them; `heads` becomes None.

  Raises:
    UserError: if `heads` does not divide `width`, or a value is out of range.
  """

  encoder_layers: int = 12
  decoder_layers: int = 12
  width: int = 1024
  mlp_width: int = 4096
  heads: int = 16
  text_vocabulary: int = 16000
  text_length: int = 128
  codebook_size: int = 8192
  grid: tuple[int, int] = (32, 32)
  dropout: float = 0.1
  dtype: str = 'bfloat16'
  attention_patterns: tuple[str, ...] = ('global',)
  conv_kernel: int = 11
  remat: str = 'everything'
  unroll: int = 1
  text_encoder: TextEncoderConfig | None = None
  norm: str = 'layer'
  mlp: str = 'gelu'
  qk_norm: bool = False
  positions: str = 'learned'
  kv_heads: int | None = None

  BOUNDS = {'dropout': (0, 1)}  # 1 is excluded by `config_checks.check_dropout`.

  def __post_init__(self):
    patterns = self.attention_patterns
    if not isinstance(patterns, (tuple, list)) or not patterns:
      raise errors.UserError(
        f'PartiConfig.attention_patterns={checks.shown(patterns)} must be a tuple of patterns, '
        "such as ('conv', 'global')"
      )
    config_checks.check(self)
    self._set_text_encoder()
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_image_length(self, 'grid')
    self._check_patterns()
    object.__setattr__(
      self, 'attention_patterns', attention_patterns_lib.shortest_period(self.attention_patterns)
    )
    if self.conv_kernel % 2 == 0:
      raise errors.UserError(f'PartiConfig.conv_kernel={self.conv_kernel} must be odd')
    config_checks.check_dropout(self)
    self._check_options()

  def _set_text_encoder(self) -> None:
    """Makes a config of the text encoder's dict, and unites the fields that it shares with this one.

    Raises:
      UserError: if it is neither a config nor such a dict.
    """
    if self.text_encoder is None:
      return
    set_text_encoder(self)
    found: Any = self.text_encoder
    object.__setattr__(self, 'encoder_layers', found.layers)
    object.__setattr__(self, 'text_vocabulary', found.text_vocabulary)
    object.__setattr__(self, 'text_length', found.text_length)

  def _check_options(self) -> None:
    """Raises UserError unless the options of blocks are known and fit the sizes.

    Sets `kv_heads` to None if it is `heads`, so that one network has one config.
    """
    for name, known in _CHOICES.items():
      value = getattr(self, name)
      if value not in known:
        raise errors.UserError(
          f'PartiConfig.{name}={checks.shown(value)} is not one of {", ".join(known)}'
        )
    if self.kv_heads is not None:
      config_checks.check_divides(self, 'kv_heads', 'heads')
    if self.kv_heads == self.heads:
      object.__setattr__(self, 'kv_heads', None)
    if self.positions == 'rotary_2d' and self.head_dim % 4:
      raise errors.UserError(
        f"PartiConfig.positions='rotary_2d' rotates pairs by rows and by columns, so width / heads "
        f'must be a multiple of 4; it is {self.head_dim}'
      )

  def _check_patterns(self) -> None:
    """Raises UserError unless all patterns are known and the schedule divides the layers."""
    names = self.attention_patterns
    key = f'PartiConfig.attention_patterns={checks.shown(names)}'
    for name in names:
      if name not in attention_patterns_lib.PATTERNS:
        raise errors.UserError(
          f'{key}: {checks.shown(name)} is not one of {", ".join(attention_patterns_lib.PATTERNS)}'
        )
    if self.decoder_layers % len(names):
      raise errors.UserError(
        f'{key}: a schedule of {len(names)} does not divide '
        f'PartiConfig.decoder_layers={self.decoder_layers}; it is repeated over the layers'
      )

  @property
  def patterns(self) -> tuple[attention_patterns_lib.AttentionPattern, ...]:
    """The attention patterns of the first decoder layers; the other layers repeat them."""
    return tuple(
      attention_patterns_lib.AttentionPattern(name, self.grid, self.conv_kernel)
      for name in self.attention_patterns
    )

  def layer_pattern(self, layer: int) -> attention_patterns_lib.AttentionPattern:
    """Returns the attention pattern of a decoder layer."""
    return self.patterns[layer % len(self.attention_patterns)]

  @property
  def encoder_options(self) -> block_options.BlockOptions:
    """What the blocks of Parti's own text encoder consist of."""
    return block_options.BlockOptions(self.norm, self.mlp, self.qk_norm)

  @property
  def decoder_options(self) -> block_options.BlockOptions:
    """What the blocks of the image-token decoder consist of."""
    rotary_grid = self.grid if self.positions == 'rotary_2d' else None
    return dataclasses.replace(
      self.encoder_options, rotary_grid=rotary_grid, kv_heads=self.kv_heads
    )

  @property
  def cached_heads(self) -> int:
    """Number of heads of the decoder's keys and values."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def mlp_kernels(self) -> int:
    """Number of projections of an MLP, all between `width` and `mlp_width`."""
    return 3 if self.mlp == 'swiglu' else 2

  @property
  def text_width(self) -> int:
    """Number of features of an encoded text token."""
    return self.width if self.text_encoder is None else self.text_encoder.width
