"""Conversion between the bytes of pictures and the pixels of networks, float32 in [0, 1]."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import UInt8


def from_bytes(images: UInt8[Array, '*places']) -> Float32[Array, '*places']:
  """Converts bytes to pixels."""
  return images.astype(jnp.float32) / 255.0


def to_bytes(pixels: Float[Array, '*places']) -> UInt8[Array, '*places']:
  """Rounds pixels, which must be in [0, 1], to bytes."""
  return jnp.round(pixels * 255.0).astype(jnp.uint8)
