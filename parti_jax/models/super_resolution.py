"""Super-resolution of the tokenizer's pictures (Parti, section 2.1), with a network like WDSR.

WDSR (Yu et al., "Wide Activation for Efficient and Accurate Image Super-Resolution", arXiv
1808.08718) has residual blocks with many features before the ReLU and few features between blocks.
It uses weight normalization, no batch norm, and computes at the low resolution up to a pixel
shuffle at the end. WDSR adds a convolution of the input to its output. Here the bicubic enlargement
of the input is added, so the network learns the difference to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers

# Distance of the farthest pixel that bicubic interpolation uses.
_BICUBIC_REACH = 2


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig:
  """Sizes of a super-resolution network.

  Attributes:
    factor: factor by which height and width increase.
    blocks: number of residual blocks.
    width: number of features between blocks, `embed`.
    expansion: number of features before the ReLU of a block, `mlp`, as a multiple of `width`.
    low_rank: 0 for blocks with two 3×3 convolutions (WDSR-A). Otherwise blocks are those of WDSR-B:
      a 1×1 convolution before the ReLU, and after it a 1×1 convolution to low_rank · width features
      and a 3×3 convolution.
    unshuffle: side, in pixels, of the squares that the blocks treat as one position (pixel
      unshuffle). Larger squares see farther and cost less. Must divide height and width.
    dilations: dilations of the 3×3 convolutions in successive blocks; the blocks repeat them.
    dtype: name of the dtype of convolutions.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.

  Raises:
    UserError: if a value is out of range.
  """

  factor: int = 2
  blocks: int = 12
  width: int = 128
  expansion: int = 4
  low_rank: float = 0.0
  unshuffle: int = 1
  dilations: tuple[int, ...] = (1,)
  dtype: str = 'bfloat16'
  remat: str = 'everything'

  BOUNDS = {'low_rank': (0, 1)}

  def __post_init__(self):
    config_checks.check(self)
    if not self.dilations:
      raise errors.UserError(
        'SuperResolutionConfig.dilations=() must contain at least one positive integer'
      )

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def multiple(self) -> int:
    """Number of pixels that must divide the height and width of an input."""
    return self.unshuffle

  @property
  def features_per_pixel(self) -> int:
    """Size of the widest activations for each pixel of the input: of the blocks, or the output."""
    return max(self.expansion * self.width // self.unshuffle**2, 3 * self.factor**2)

  @property
  def reach(self) -> int:
    """Radius of the receptive field, in pixels of the input."""
    convolutions = 1 if self.low_rank else 2
    blocks = convolutions * sum(
      self.dilations[block % len(self.dilations)] for block in range(self.blocks)
    )
    # The blocks, the 3×3 convolutions at both ends, and the place of a pixel within its square.
    return max(_BICUBIC_REACH, self.unshuffle * (1 + blocks + 1) + self.unshuffle - 1)


class Convolution(nn.Module):
  """A convolution with bias and weight normalization: kernel = gain · v / ‖v‖ for each feature.

  Attributes:
    features: number of output channels.
    side: height and width of the kernel.
    axes: logical names of the kernel's input and output channels.
    dtype: dtype of the computation; parameters are float32.
    gain: initial gain; 1 preserves the variance of inputs with mean 0.
    dilation: dilation of the kernel.
  """

  features: int
  side: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  gain: float = 1.0
  dilation: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    direction = layers.parameter(
      self,
      'direction',
      nn.initializers.normal(1.0),
      ('kernel_rows', 'kernel_columns') + self.axes,
      (self.side, self.side, x.shape[-1], self.features),
    )
    gain = layers.parameter(
      self, 'gain', nn.initializers.constant(self.gain), self.axes[1:], (self.features,)
    )
    bias = layers.parameter(self, 'bias', nn.initializers.zeros, self.axes[1:], (self.features,))
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2)))
    kernel = (direction * (gain / jnp.maximum(norm, 1e-12))).astype(self.dtype)
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel,
      (1, 1),
      'SAME',
      rhs_dilation=(self.dilation,) * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y + bias.astype(self.dtype)


class Block(nn.Module):
  """A residual block with wide activation (WDSR, section 3; figure 2).

  Attributes:
    config: sizes of the network.
    dilation: dilation of the 3×3 convolutions.
  """

  config: SuperResolutionConfig
  dilation: int

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch rows columns embed']
  ) -> Float[Array, 'batch rows columns embed']:
    config = self.config
    # Each of n blocks adds 1/n of the variance. The factor 2 compensates for the ReLU.
    gain = (2.0 / config.blocks) ** 0.5
    convolve = lambda features, side, axes, name, gain=1.0: Convolution(
      features, side, axes, config.compute_dtype, gain, self.dilation if side > 1 else 1, name=name
    )
    hidden = convolve(
      config.expansion * config.width, 1 if config.low_rank else 3, ('embed', 'mlp'), 'expand'
    )(x)
    hidden = nn.relu(
      nn.with_logical_constraint(
        hidden, ('activation_batch', 'activation_rows', 'activation_columns', 'activation_mlp')
      )
    )
    if not config.low_rank:
      return x + convolve(config.width, 3, ('mlp', 'embed'), 'project', gain)(hidden)
    low = convolve(
      max(1, round(config.low_rank * config.width)), 1, ('mlp', 'rank'), 'reduce', 2.0**0.5
    )(hidden)
    return x + convolve(config.width, 3, ('rank', 'embed'), 'project', config.blocks**-0.5)(low)


class SuperResolution(nn.Module):
  """Enlarges pictures.

  Attributes:
    config: sizes.
  """

  config: SuperResolutionConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch large_height large_width 3']:
    """Enlarges pictures by `factor`.

    Args:
      images: pictures with values in [0, 1].

    Returns:
      Float32 pictures that are not clipped to [0, 1]. Before training they are the bicubic
      enlargement, because the initial gain of the last convolution is 0.
    """
    config = self.config
    batch, height, width, channels = images.shape
    grid = (height // config.unshuffle, width // config.unshuffle)
    x = vit_vqgan.to_patches(2.0 * images - 1.0, config.unshuffle)
    x = x.reshape((batch,) + grid + (-1,))
    x = Convolution(config.width, 3, ('channels', 'embed'), config.compute_dtype, name='head')(x)
    block = Block
    if config.remat != 'everything':
      block = nn.remat(Block, policy=layer_stack.REMAT_POLICIES[config.remat])
    for index in range(config.blocks):
      x = block(config, config.dilations[index % len(config.dilations)], name=f'block_{index}')(x)
      x = nn.with_logical_constraint(
        x, ('activation_batch', 'activation_rows', 'activation_columns', 'activation_embed')
      )
    side = config.factor * config.unshuffle
    x = Convolution(
      channels * side * side, 3, ('embed', 'channels'), config.compute_dtype, gain=0.0, name='tail'
    )(x)
    x = vit_vqgan.from_patches(x.reshape(batch, grid[0] * grid[1], -1), side, grid)
    return enlarge(images, config.factor) + x.astype(jnp.float32)


def enlarge(
  images: Float[Array, 'batch height width channels'], factor: int
) -> Float[Array, 'batch {factor}*height {factor}*width channels']:
  """Enlarges pictures by bicubic interpolation."""
  batch, height, width, channels = images.shape
  return jax.image.resize(images, (batch, factor * height, factor * width, channels), 'cubic')


def example_inputs(config: Any, batch: int = 1) -> tuple[Float[Array, 'batch height width 3']]:
  """Returns pictures of a size that the network of any upscaler's config takes, for initialization."""
  side = 4 * config.multiple
  return (jnp.zeros((batch, side, side, 3), jnp.float32),)
