"""Decodes image tokens to pictures with only the image tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array
from jaxtyping import Int32
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.models import image_tokenizers
from parti_jax.models import pixels
from parti_jax.sampling import placement

# Maximum number of pictures to decode at once.
_BATCH = 64


class Detokenizer:
  """An image tokenizer that decodes tokens to pictures, in float32 on any device.

  Attributes:
    config: sizes of the tokenizer.
  """

  def __init__(
    self, config: image_tokenizers.Config, params: PyTree, device: jax.Device | None = None
  ):
    """Puts a tokenizer on a device.

    Args:
      config: sizes of the tokenizer.
      params: its parameters.
      device: the device to compute on; None for JAX's default.
    """
    self.config = dataclasses.replace(config, dtype='float32')
    self._module = image_tokenizers.module(self.config)
    self._device = device
    self._params = jax.device_put(jax.tree.map(np.asarray, params), device)

  @numerics.fixed()
  def __call__(
    self, tokens: Int32[np.ndarray, 'images image_length']
  ) -> UInt8[np.ndarray, 'images height width 3']:
    """Decodes the tokens of pictures; `checked` makes sure that the codebook has each token."""
    shape = len(tokens), *image_sizes.sides(self.config.image_size), 3
    images = np.empty(shape, np.uint8)
    for start, chosen in placement.pieces(len(tokens), min(_BATCH, max(len(tokens), 1))):
      part = jax.device_put(tokens[chosen], self._device)
      decoded = np.asarray(_pictures(self._params, part, tokenizer=self._module))
      images[start : start + _BATCH] = decoded[: len(tokens) - start]
    return images

  def checked(self, ids: Sequence[Any]) -> Int32[np.ndarray, 'image_length']:
    """Returns the tokens of one picture as an array.

    Raises:
      UserError: if the number of tokens is wrong, one is not a whole number, or the codebook does
        not have it.
    """
    length, codes = self.config.image_length, self.config.codebook_size
    if len(ids) != length:
      raise UserError(f'{len(ids)} tokens, but a picture of this tokenizer has {length}')
    for place, token in enumerate(ids):
      if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise UserError(f'token {place} is {token!r}, which is not a whole number')
      if not 0 <= token < codes:
        raise UserError(
          f'token {place} is {token}, but the codebook of this tokenizer has {codes} '
          f'codes, 0 to {codes - 1}; the tokens come from another tokenizer'
        )
    return np.asarray(ids, np.int32)


@functools.partial(jax.jit, static_argnames='tokenizer')
def _pictures(
  params: PyTree, tokens: Int32[Array, 'batch image_length'], *, tokenizer: nn.Module
) -> UInt8[Array, 'batch height width 3']:
  apply: Callable[..., Any] = tokenizer.apply
  return pixels.to_bytes(apply({'params': params}, tokens, method='detokenize'))
