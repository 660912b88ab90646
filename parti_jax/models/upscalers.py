"""The kinds of super-resolution network that the system can use, and what they have in common.

A kind is a config and a linen module. `Config` and `Upscaler` are what all other code relies on. A new
kind is one entry of `KINDS`, or a call of `register` in a module of your own. Training one with
`SuperResolutionObjective` takes the members of `TrainableConfig` and `Kind.forward_flops` as well.
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

from parti_jax.core import errors
from parti_jax.models import flops
from parti_jax.models import kinds
from parti_jax.models import real_esrgan
from parti_jax.models import super_resolution


@runtime_checkable
class Config(Protocol):
  """The config of a super-resolution network: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def factor(self) -> int:
    """Factor by which height and width increase."""

  @property
  def multiple(self) -> int:
    """Number of pixels that must divide the height and width of an input.

    Sampling extends other pictures by reflection, and cuts the result.
    """

  @property
  def reach(self) -> int | None:
    """Radius of the receptive field, in pixels of the input; None for the whole input.

    Where only a part of the field changes a result visibly, it is the radius of that part. Large
    pictures are cut into windows that overlap by it. With None they are enlarged whole.
    """

  @property
  def features_per_pixel(self) -> int:
    """Size of the widest activations for each pixel of the input, which bounds the batch."""

  @property
  def dtype(self) -> str:
    """Name of the dtype to compute in."""


class TrainableConfig(Config, Protocol):
  """The config of a network that `SuperResolutionObjective` can train."""

  @property
  def remat(self) -> str:
    """Name of the rematerialization policy."""

  @property
  def compute_dtype(self) -> Any:
    """Dtype of activations."""


class Upscaler(Protocol):
  """A super-resolution network's linen module.

  None of its parameters are at the top level under the names 'tokenizer', 'perceptual' and
  'discriminator', which `SuperResolutionObjective` uses.
  """

  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch large_height large_width 3']:
    """Enlarges images in [0, 1] by `Config.factor`; the result may exceed [0, 1]."""


class Kind(NamedTuple):
  """A kind of super-resolution network.

  Attributes:
    config: its config class.
    module: makes the linen module, an `Upscaler`, from a config.
    example_inputs: makes images from a config, for initialization.
    forward_flops: returns the FLOPs of one image, from a config and the height and width of the input
      in pixels; None if `SuperResolutionObjective` can't train it.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  forward_flops: Callable[[Any, int, int], int] | None = None


# By their names in config.json and in checkpoints. Files that name no kind are of the first one.
KINDS = kinds.Kinds.of_part(
  'a super-resolution network',
  'upscalers',
  Config,
  {
    'wdsr': Kind(
      super_resolution.SuperResolutionConfig,
      super_resolution.SuperResolution,
      super_resolution.example_inputs,
      flops.super_resolution_forward,
    ),
    'rrdb_net': Kind(
      real_esrgan.RRDBNetConfig,
      real_esrgan.RRDBNet,
      super_resolution.example_inputs,
      flops.rrdb_net_forward,
    ),
    'srvgg_net_compact': Kind(
      real_esrgan.SRVGGNetCompactConfig,
      real_esrgan.SRVGGNetCompact,
      super_resolution.example_inputs,
      flops.srvgg_net_compact_forward,
    ),
  },
)
# Their config classes.
CONFIGS = KINDS.configs


def register(name: str, kind: Kind) -> None:
  """Makes a kind known, for all code that reads or writes super-resolution networks.

  Args:
    name: its name in config.json and in checkpoints.
    kind: the kind. A class of the same module and name replaces an earlier one.

  Raises:
    UserError: if the name is invalid or taken, or the config isn't a frozen dataclass with the
      members of `Config`, or of `TrainableConfig` if it can be trained.
  """
  KINDS.register(name, kind, TrainableConfig if kind.forward_flops else None)


def module(config: Config) -> nn.Module:
  """Returns the linen module of a network, an `Upscaler`."""
  return KINDS.of(config).module(config)


def example_inputs(config: Config) -> tuple:
  """Returns images of a shape that the module takes, for initialization."""
  return KINDS.of(config).example_inputs(config)


def forward_flops(config: Config) -> Callable[[Any, int, int], int]:
  """Returns `Kind.forward_flops` of a network.

  Raises:
    UserError: if its kind can't be trained.
  """
  found = KINDS.of(config).forward_flops
  if found is None:
    trainable = ', '.join(kind.config.__name__ for kind in KINDS.values() if kind.forward_flops)
    raise errors.UserError(
      f'{type(config).__name__} is of a kind that cannot be trained; choose from {trainable}'
    )
  return found
