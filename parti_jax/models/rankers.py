"""The kinds of ranker that the system can use, and what they have in common.

A kind is a config and a linen module. `Config` and `Ranker` are what all other code relies on.
A new kind is one entry of `KINDS`, or a call of `register` in a module of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import Protocol

import flax.linen as nn
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.models import clip
from parti_jax.models import coca
from parti_jax.models import kinds
from parti_jax.models import siglip


class Config(Protocol):
  """The config of a ranker: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def image_size(self) -> image_sizes.ImageSize:
    """Height and width of an image, in pixels; one number for squares."""

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
  """A ranker's linen module; the methods are called by `nn.Module.apply`."""

  @property
  def config(self) -> Any:
    """The config that it was made from."""

  def image_features(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of images in [0, 1]."""

  def text_features(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Float[Array, 'batch feature_dim']:
    """Returns float32 unit vectors of texts, which padding (id 0) follows."""


class Kind(NamedTuple):
  """A kind of ranker.

  Attributes:
    config: its config class.
    module: makes the linen module from a config.
    example_inputs: makes images and texts from a config, for initialization.
    end_id: makes the token id that a text must end with, from a config; None for any.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  end_id: Callable[[Any], int | None] = lambda config: None


# By their names in config.json and in checkpoints. Files that name no kind are of the first one.
KINDS = kinds.Kinds.of_part(
  'a ranker',
  'rankers',
  Config,
  {
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
  },
)
# Their config classes.
CONFIGS = KINDS.configs


def register(name: str, kind: Kind) -> None:
  """Makes a kind known, for all code that reads or writes rankers.

  Args:
    name: its name in config.json and in checkpoints.
    kind: the kind. A class of the same module and name replaces an earlier one.

  Raises:
    UserError: if the name is invalid or taken, or the config isn't a frozen dataclass with the
      members of `Config`.
  """
  KINDS.register(name, kind)


def kind(config: Config) -> str:
  """Returns the name in KINDS of a config's kind; raises UserError if it is of none."""
  return CONFIGS.name_of(config)


def module(config: Config) -> nn.Module:
  """Returns the linen module of a ranker, with the methods of `Ranker`."""
  return KINDS.of(config).module(config)


def example_inputs(config: Config) -> tuple:
  """Returns images and texts of the shapes that the module takes, for initialization."""
  return KINDS.of(config).example_inputs(config)


def check_shape(config: Config, size: image_sizes.ImageSize) -> None:
  """Checks that pictures become those of a ranker without preprocessing by resizing alone.

  Args:
    config: the ranker's config.
    size: the size of the pictures.

  Raises:
    UserError: if they would be stretched, unlike the pictures that the ranker was trained on.
  """
  (height, width), (own_height, own_width) = map(image_sizes.sides, (size, config.image_size))
  if height * own_width != width * own_height:
    raise errors.UserError(
      f'the ranker is for pictures of {own_height}×{own_width} pixels and would see those of '
      f'{height}×{width} stretched; train it with {type(config).__name__}.image_size={size}, or use one '
      'that `parti-jax import ranker` wrote'
    )


def end_id(config: Config) -> int | None:
  """Returns the token id that every text must end with, before padding; None for any."""
  return KINDS.of(config).end_id(config)
