"""The kinds of text encoder that a generator can have.

| `PartiConfig.text_encoder` | text encoder |
|---|---|
| None | Parti's own, `parti_jax.models.text_encoder.TextEncoder` |
| `T5EncoderConfig` | of T5, Flan-T5, mT5 or UL2, `parti_jax.models.t5_encoder.T5Encoder` |
| `CLIPTextConfig` | of CLIP, `parti_jax.models.clip.CLIPTextEncoder` |

They differ in their networks and in their text tokens. The functions here hide these differences from
the generator. A new kind is one entry of `KINDS` and of `parti_config.TEXT_ENCODERS`, or a call of
`register` in a module of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from typing import NamedTuple
from typing import Protocol

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
from parti_jax.models import flops
from parti_jax.models import kinds
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import text_encoder
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layers

Tokens = Int[Array, 'batch text_length']
Mask = Bool[Array, 'batch 1 1 text_length']


class TextEncoder(Protocol):
  """A text encoder's linen module."""

  def __call__(
    self, text_tokens: Tokens, dropout_keys: layers.DropoutKeys | None = None
  ) -> Float[Array, 'batch text_length width']:
    """Encodes texts, without dropout if `dropout_keys` is None."""


def padding_mask(config: Any, text_tokens: Tokens) -> Mask:
  """The mask of kinds whose padding is the id 0."""
  del config
  return dot_product_attention.text_mask(text_tokens)


def only_end(config: Any, first: Any) -> tuple[Any, ...]:
  """The empty text of kinds whose texts have no first token and end with the id 1."""
  del config, first
  return (text_ids.EOS_ID,)


class Kind(NamedTuple):
  """A kind of text encoder.

  Attributes:
    config: its config class, with the members of `parti_config.TextEncoderConfig`.
    module: makes the linen module, a `TextEncoder`, from a config.
    example_inputs: makes text tokens from a config, for initialization.
    forward_flops: returns the FLOPs of one text, from a config.
    text_mask: makes the attention mask that hides padding, from a config and text tokens.
    empty_text: makes the first tokens of the empty text, which padding (id 0) follows, from a config
      and the first token of any text, or those of several texts.
    any_length: whether the parameters fit texts of any length, so that `text_length` may change.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  forward_flops: Callable[[Any], int]
  text_mask: Callable[[Any, Tokens], Mask] = padding_mask
  empty_text: Callable[[Any, Any], tuple[Any, ...]] = only_end
  any_length: bool = False


# Its functions take the config of the generator.
_OWN = Kind(
  parti_config.PartiConfig,
  text_encoder.TextEncoder,
  text_encoder.example_inputs,
  flops.text_encoder_forward,
)
# By their names in config.json.
KINDS = kinds.Kinds(
  parti_config.TEXT_ENCODERS,
  {
    't5': Kind(
      t5_encoder.T5EncoderConfig,
      t5_encoder.T5Encoder,
      t5_encoder.example_inputs,
      flops.t5_encoder_forward,
      any_length=True,  # Positions are relative.
    ),
    'clip': Kind(
      clip.CLIPTextConfig,
      clip.CLIPTextEncoder,
      clip.example_text,
      flops.clip_text_forward,
      lambda config, text_tokens: clip.text_mask(text_tokens, config.end_id),
      lambda config, first: (first, config.end_id),  # All texts have the same first token.
    ),
  },
)


def register(name: str, kind: Kind) -> None:
  """Makes a kind known, for all code that reads or writes text encoders.

  Args:
    name: its name in config.json.
    kind: the kind. A class of the same module and name replaces an earlier one.

  Raises:
    UserError: if the name is invalid or taken, or the config isn't a frozen dataclass with the
      members of `parti_config.TextEncoderConfig`.
  """
  KINDS.register(name, kind)


def _of(config: Any) -> tuple[Kind, Any]:
  """Returns the kind of a generator's text encoder, and the config that its functions take."""
  if config.text_encoder is None:
    return _OWN, config
  return KINDS.of(config.text_encoder), config.text_encoder


def module(config: Any) -> nn.Module:
  """Returns the linen module of a generator's text encoder."""
  kind, own = _of(config)
  return kind.module(own)


def text_mask(
  config: Any, text_tokens: Int[Array, 'batch text_length']
) -> Bool[Array, 'batch 1 1 text_length']:
  """Returns an attention mask that hides padding."""
  kind, own = _of(config)
  return kind.text_mask(own, text_tokens)


def empty_text(
  config: Any, text_tokens: Int[Array, 'batch text_length']
) -> Int[Array, 'batch text_length']:
  """Returns the empty text in each row, the condition of classifier-free guidance without text.

  Args:
    config: sizes of the generator.
    text_tokens: any texts, of which the shape is taken and, with CLIP, the first token.
  """
  kind, own = _of(config)
  empty = jnp.full_like(text_tokens, text_ids.PAD_ID)
  for place, token in enumerate(kind.empty_text(own, text_tokens[:, 0])):
    empty = empty.at[:, place].set(token)
  return empty


def check_empty_text(
  config: parti_config.TextEncoderConfig | None, ids: Any, tokenizer: str
) -> None:
  """Checks that a text tokenizer ends texts and pads them as a text encoder expects.

  Args:
    config: the text encoder; None for Parti's own, which the networks of other objectives follow.
    ids: the ids of the empty text, int32 [at least 3].
    tokenizer: the tokenizer, for messages.

  Raises:
    UserError: if it makes another empty text than the one of classifier-free guidance.
  """
  found = np.asarray(ids, np.int32)
  kind = _OWN if config is None else KINDS.of(config)
  wanted = np.full_like(found, text_ids.PAD_ID)
  start = kind.empty_text(config, found[0])
  wanted[: len(start)] = start
  if not np.array_equal(found, wanted):
    raise errors.UserError(
      f'{tokenizer} encodes the empty text as {found[:3].tolist()} and so on, but the text encoder '
      f'expects {wanted[:3].tolist()}: the end of a text, then padding; it belongs to another network'
    )


def forward_flops(config: Any) -> int:
  """Returns the FLOPs of one text through a generator's text encoder."""
  kind, own = _of(config)
  return kind.forward_flops(own)
