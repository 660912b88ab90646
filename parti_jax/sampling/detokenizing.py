"""Image tokens to pictures, with the tokenizer alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.models import vit_vqgan
from parti_jax.sampling import placement

# Pictures that go through the tokenizer at once.
_BATCH = 64


class Detokenizer:
  """A tokenizer that turns image tokens into pictures, in float32 on every device.

  Attributes:
    config: ViTVQGANConfig, its sizes.
  """

  def __init__(self, config: vit_vqgan.ViTVQGANConfig, params, device: jax.Device | None = None):
    """Puts a tokenizer on a device.

    Args:
      config: its sizes.
      params: its parameters, a tree of arrays.
      device: where to compute; None for JAX's default.
    """
    self.config = dataclasses.replace(config, dtype='float32')
    self._module = vit_vqgan.ViTVQGAN(self.config)
    self._device = device
    self._params = jax.device_put(params, device)

  @numerics.fixed()
  def __call__(self, tokens: np.ndarray) -> np.ndarray:
    """Returns the pictures, uint8 [n, height, width, 3], of tokens, int32 [n, image_length].

    Each token must be in the codebook; see `checked`.
    """
    size = self.config.image_size
    images = np.empty([len(tokens), size, size, 3], np.uint8)
    for start, chosen in placement.pieces(len(tokens), min(_BATCH, max(len(tokens), 1))):
      part = jax.device_put(tokens[chosen], self._device)
      part = np.asarray(_pictures(self._params, part, tokenizer=self._module))
      images[start : start + _BATCH] = part[: len(tokens) - start]
    return images

  def checked(self, ids: Sequence[int]) -> np.ndarray:
    """Returns the tokens of one picture as int32 [image_length].

    Raises:
      UserError: they are not as many as this tokenizer's pictures have, not whole numbers, or not
        all in its codebook.
    """
    length, codes = self.config.image_length, self.config.codebook_size
    if len(ids) != length:
      raise UserError(f'{len(ids)} tokens, but a picture of this tokenizer has {length}')
    for place, token in enumerate(ids):
      if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise UserError(f'token {place} is {token!r} and no whole number')
      if not 0 <= token < codes:
        raise UserError(
          f'token {place} is {token}, but the codebook of this tokenizer has {codes} '
          f'codes, 0 to {codes - 1}; the tokens are of another tokenizer'
        )
    return np.asarray(ids, np.int32)


def to_bytes(pixels):
  """float [...] in [0, 1] to uint8 [...]."""
  return jnp.round(pixels * 255.0).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames='tokenizer')
def _pictures(params, tokens, *, tokenizer: nn.Module):
  return to_bytes(tokenizer.apply({'params': params}, tokens, method='detokenize'))
