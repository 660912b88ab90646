"""The kinds of image tokenizer that the system can use, and what they have in common.

A kind is a config and a linen module. `Config` and `Tokenizer` are what all other code relies on.
A new kind is one entry of `KINDS`, or a call of `register` in a module of your own. Training one
with `TokenizerObjective` takes the members of `TrainableConfig` and a `Training` as well.
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
from parti_jax.models import config_checks
from parti_jax.models import enhancing_vit_vqgan
from parti_jax.models import flops
from parti_jax.models import kinds
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan


class Config(Protocol):
  """The config of an image tokenizer: a frozen dataclass whose fields are JSON."""

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __hash__(self) -> int: ...

  @property
  def image_size(self) -> image_sizes.ImageSize:
    """Height and width of an image, in pixels; one number for squares."""

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


class TrainableConfig(Config, Protocol):
  """The config of an image tokenizer that `TokenizerObjective` can train."""

  @property
  def remat(self) -> str:
    """Name of the rematerialization policy."""

  @property
  def compute_dtype(self) -> Any:
    """Dtype of activations."""

  @property
  def predicts_scale(self) -> bool:
    """Whether the network predicts distributions of pixels, rather than pixels themselves."""

  @property
  def code_distance(self) -> str | None:
    """Distance by which a table of codes is searched: 'cosine', 'euclidean' or None.

    With a distance, dead codes can be revived. The table is then the parameter
    `quantizer/codebook/table`.
    """

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    """Descriptions of what the quantizer's loss computes over several examples."""


class Tokenizer(Protocol):
  """An image tokenizer's linen module; the methods are called by `nn.Module.apply`.

  Its parameters are {'encoder', 'quantizer', 'decoder'}, of which some may be missing. `tokenize`
  only needs the first two. Their parameters and `token_settings` identify the tokenizer
  (`fingerprints.of_tokenizer`), so everything that determines tokens has to be among them. There are
  no other collections of variables, such as batch statistics.
  """

  @property
  def config(self) -> Any:
    """The config that it was made from."""

  def tokenize(self, images: Float[Array, 'batch height width 3']) -> Int[Array, 'batch tokens']:
    """Returns the tokens of images in [0, 1]."""

  def detokenize(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch height width 3']:
    """Returns images in [0, 1]."""


class Training(NamedTuple):
  """What training a kind takes.

  The module's `__call__(images, quantize)` returns a dict: 'tokens', 'latents', 'quantizer_loss',
  and either 'mean' and 'log_scale' of logit-laplace distributions or 'pixels'.

  Attributes:
    forward_flops: FLOPs of one image through the network, from a config.
    decoder_fields: names of the config's fields that concern the decoder alone. A second phase may
      change them.
    last_kernel_gradient: the gradient of the decoder's last kernel, from a config, the input of
      that layer and the gradients of the reconstruction. The decoder sows the input as
      'last_hidden'. None if the adversarial loss can't have an adaptive weight.
  """

  forward_flops: Callable[[Any], int]
  decoder_fields: tuple[str, ...] = ()
  last_kernel_gradient: Callable[[Any, Array, dict[str, Array]], Array] | None = None


class Kind(NamedTuple):
  """A kind of image tokenizer.

  Attributes:
    config: its config class.
    module: makes the linen module from a config.
    example_inputs: makes images from a config, for initialization.
    training: what training it takes; None if `TokenizerObjective` can't train it.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  training: Training | None = None


# By their names in config.json and in checkpoints. Files that name no kind are of the first one.
KINDS = kinds.Kinds.of_part(
  'an image tokenizer',
  'image_tokenizers',
  Config,
  {
    'vit_vqgan': Kind(
      vit_vqgan.ViTVQGANConfig,
      vit_vqgan.ViTVQGAN,
      vit_vqgan.example_inputs,
      Training(
        flops.vit_vqgan_forward,
        ('decoder_layers', 'decoder_width', 'decoder_mlp_width', 'decoder_heads'),
        vit_vqgan.last_kernel_gradient,
      ),
    ),
    'vqgan': Kind(
      vqgan.VQGANConfig,
      vqgan.VQGAN,
      vqgan.example_inputs,
      Training(
        lambda config: flops.vqgan_forward(config, *image_sizes.sides(config.image_size)),
        ('decoder_res_blocks', 'output'),
        vqgan.last_kernel_gradient,
      ),
    ),
    'enhancing_vit_vqgan': Kind(
      enhancing_vit_vqgan.EnhancingViTVQGANConfig,
      enhancing_vit_vqgan.EnhancingViTVQGAN,
      enhancing_vit_vqgan.example_inputs,
    ),
  },
)
# Their config classes.
CONFIGS = KINDS.configs


def register(name: str, kind: Kind) -> None:
  """Makes a kind known, for all code that reads or writes tokenizers.

  Args:
    name: its name in config.json and in checkpoints.
    kind: the kind. A class of the same module and name replaces an earlier one, as when a notebook
      runs a cell again.

  Raises:
    UserError: if the name is invalid or taken, or the config isn't a frozen dataclass with the
      members of `Config`, or of `TrainableConfig` if it can be trained.
  """
  KINDS.register(name, kind, TrainableConfig if kind.training else None)


def of(config: Config) -> Kind:
  """Returns the kind of a config; raises UserError if it is of none."""
  return KINDS.of(config)


def module(config: Config) -> nn.Module:
  """Returns the linen module of a tokenizer, with the methods of `Tokenizer`."""
  return of(config).module(config)


def example_inputs(config: Config) -> tuple:
  """Returns images of the shape that the module takes, for initialization."""
  return of(config).example_inputs(config)


def training(config: Config) -> Training:
  """Returns what training a tokenizer takes.

  Raises:
    UserError: if its kind can't be trained.
  """
  found = of(config).training
  if found is None:
    trainable = ', '.join(kind.config.__name__ for kind in KINDS.values() if kind.training)
    raise errors.UserError(
      f'{type(config).__name__} is of a kind that cannot be trained; choose from {trainable}'
    )
  return found


def token_settings(config: Config) -> dict[str, Any]:
  """Returns the settings that determine tokens together with the parameters, for fingerprints.

  Networks with the same parameters may differ in them, such as in the range of pixels. ViT-VQGAN has
  none.
  """
  kind = of(config)
  if kind.config is vit_vqgan.ViTVQGANConfig:
    return {}
  decoder_fields = kind.training.decoder_fields if kind.training else ()
  free = {*config_checks.FREE_SETTINGS, *decoder_fields}
  fields = dataclasses.asdict(config)
  return {'kind': CONFIGS.name_of(config)} | {
    field: value for field, value in fields.items() if field not in free
  }
