"""The kinds of ranker that the system can use, and what they have in common.

A kind is a config and a linen module. `Config` and `Ranker` are what all other code relies on, so
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

from parti_jax.models import clip
from parti_jax.models import coca
from parti_jax.models import config_checks
from parti_jax.models import siglip


class Config(Protocol):
  """The config of a ranker: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def image_size(self) -> int:
    """Height and width of an image, in pixels."""

  @property
  def text_length(self) -> int:
    """Number of text tokens, padding included."""

  @property
  def text_vocabulary(self) -> int:
    """Number of text token ids."""

  @property
  def feature_dim(self) -> int:
    """Length of the vectors."""

  @property
  def dtype(self) -> str:
    """Name of the dtype to compute in."""


class Ranker(Protocol):
  """The methods of a ranker's linen module, for `nn.Module.apply`."""

  def image_features(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of images in [0, 1]."""

  def text_features(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of texts."""


class Kind(NamedTuple):
  """A kind of ranker.

  Attributes:
    config: its config class.
    module: makes the linen module from a config.
    example_inputs: makes images and texts from a config, for initialisation.
    end_id: makes the token id that a text must end with, from a config; None for any.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  end_id: Callable[[Any], int | None] = lambda config: None


# By their names in config.json. Files that name no kind are of the first one.
KINDS: Mapping[str, Kind] = {
  'coca': Kind(coca.CoCaConfig, coca.CoCa, coca.example_inputs),
  'clip': Kind(
    clip.CLIPConfig, clip.CLIP, clip.example_inputs, end_id=lambda config: config.end_id
  ),
  'siglip': Kind(
    siglip.SigLIPConfig,
    siglip.SigLIP,
    siglip.example_inputs,
    end_id=lambda config: siglip.END_ID,
  ),
}


def kind(config: Config) -> str:
  """Returns the name in KINDS of a config's kind."""
  name = config_checks.kind_name({name: found.config for name, found in KINDS.items()}, config)
  assert name is not None
  return name


def module(config: Config) -> nn.Module:
  """Returns the linen module of a ranker, with the methods of `Ranker`."""
  return KINDS[kind(config)].module(config)


def example_inputs(config: Config) -> tuple:
  """Returns images and texts of the shapes that the module takes, for initialisation."""
  return KINDS[kind(config)].example_inputs(config)


def end_id(config: Config) -> int | None:
  """Returns the token id that every text must end with, before padding; None for any."""
  return KINDS[kind(config)].end_id(config)
