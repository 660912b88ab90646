"""The kinds of image tokenizer that the system can use, and what they have in common.

A kind is a config and a linen module. `Config` and `Tokenizer` are what all other code relies on, so
that a new kind is one entry of `KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import Protocol

import flax.linen as nn
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan


class Config(Protocol):
  """The config of an image tokenizer: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def image_size(self) -> int:
    """Height and width of an image, in pixels."""

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""

  @property
  def image_length(self) -> int:
    """Number of an image's tokens."""

  @property
  def codebook_size(self) -> int:
    """Number of codes."""

  @property
  def dtype(self) -> str:
    """Name of the dtype to compute in."""


class Tokenizer(Protocol):
  """The methods of an image tokenizer's linen module, for `nn.Module.apply`.

  Its parameters are {'encoder', 'quantizer', 'decoder'}: `tokenize` needs the first two.
  """

  def tokenize(self, images: Float[Array, 'batch height width 3']) -> Int[Array, 'batch tokens']:
    """Returns the tokens of images in [0, 1]."""

  def detokenize(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch height width 3']:
    """Returns images in [0, 1]."""


class Kind(NamedTuple):
  """A kind of image tokenizer.

  Attributes:
    config: its config class.
    module: makes the linen module from a config.
    example_inputs: makes images from a config, for initialisation.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]


# By their names in config.json. Files that name no kind are of the first one.
KINDS: Mapping[str, Kind] = {
  'vit_vqgan': Kind(vit_vqgan.ViTVQGANConfig, vit_vqgan.ViTVQGAN, vit_vqgan.example_inputs),
  'vqgan': Kind(vqgan.VQGANConfig, vqgan.VQGAN, vqgan.example_inputs),
}


def _of(config: Config) -> Kind:
  return next(kind for kind in KINDS.values() if type(config) is kind.config)


def module(config: Config) -> nn.Module:
  """Returns the linen module of a tokenizer, with the methods of `Tokenizer`."""
  return _of(config).module(config)


def example_inputs(config: Config) -> tuple:
  """Returns images of the shape that the module takes, for initialisation."""
  return _of(config).example_inputs(config)
