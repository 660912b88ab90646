"""Super-resolution of the tokenizer's pictures (Parti, section 2.1), a network as WDSR.

WDSR (Yu et al., "Wide Activation for Efficient and Accurate Image Super-Resolution", arXiv
1808.08718): residual blocks whose features are wide before the ReLU and narrow between blocks,
weight normalisation, no batch norm, and all work at the small resolution, up to one pixel shuffle
at the end. Where WDSR adds a convolution of the input to its result, here the input enlarged by
bicubic interpolation is added, so that what is learned is the difference to that.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layer_stack

# How far bicubic interpolation looks, in pixels.
_BICUBIC_REACH = 2


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig:
  """Sizes of a super-resolution network.

  Attributes:
    factor: how many times higher and wider pictures become.
    blocks: residual blocks.
    width: features between blocks, `embed`.
    expansion: how many times more features there are before a block's ReLU, `mlp`.
    low_rank: 0 for blocks of two 3×3 convolutions (WDSR-A); otherwise those of WDSR-B, a 1×1
      convolution before the ReLU, and after it a 1×1 to low_rank · width features and a 3×3.
    unshuffle: side in pixels of the squares that are one position to the blocks (pixel
      unshuffle); larger ones see farther and cost less. Must divide a picture's height and width.
    dilations: distances of neighbours in the blocks' 3×3 convolutions, from block to block, and
      after the last one the first again.
    dtype: name of the dtype that convolutions compute in.
    remat: what the backward pass keeps, a name in `layer_stack.REMAT_POLICIES`.

  Raises:
    UserError: if a value is out of its range.
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
        'SuperResolutionConfig.dilations=() must be a list of whole numbers '
        'from 1, with one of them at least'
      )

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def reach(self) -> int:
    """How far from a pixel the result there depends on others, in pixels of the input."""
    convolutions = 1 if self.low_rank else 2
    blocks = convolutions * sum(
      self.dilations[block % len(self.dilations)] for block in range(self.blocks)
    )
    # The 3×3 convolutions at both ends, and a pixel's place within its square.
    return max(_BICUBIC_REACH, self.unshuffle * (1 + blocks + 1) + self.unshuffle - 1)


class Convolution(nn.Module):
  """A convolution with bias and weight normalisation: kernel = gain · v / ‖v‖ for each feature.

  Attributes:
    features: of the output.
    side: height and width of the kernel.
    axes: logical names of the kernel's last two axes, input and output.
    dtype: of the computation; parameters are float32.
    gain: initial one; 1 keeps the variance of inputs with mean 0.
    dilation: distance of neighbours.
  """

  features: int
  side: int
  axes: tuple[str, str]
  dtype: jnp.dtype
  gain: float = 1.0
  dilation: int = 1

  @nn.compact
  def __call__(self, x):
    """x: [batch, height, width, channels]. Returns dtype [batch, height, width, features]."""
    boxed = nn.with_logical_partitioning
    axes = ('kernel_rows', 'kernel_columns') + self.axes
    direction = self.param(
      'direction',
      boxed(nn.initializers.normal(1.0), axes),
      (self.side, self.side, x.shape[-1], self.features),
    )
    gain = self.param(
      'gain', boxed(nn.initializers.constant(self.gain), self.axes[1:]), (self.features,)
    )
    bias = self.param('bias', boxed(nn.initializers.zeros, self.axes[1:]), (self.features,))
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
  """A residual block with wide activation (WDSR, section 3; figure 2)."""

  config: SuperResolutionConfig
  dilation: int

  @nn.compact
  def __call__(self, x):
    """x: [batch, rows, columns, embed]. Returns the same shape."""
    config = self.config
    # Each of n blocks adds 1/n of the variance; the ReLU has taken half of it before.
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
  """Pictures to larger ones.

  Attributes:
    config: sizes.
  """

  config: SuperResolutionConfig

  @nn.compact
  def __call__(self, images):
    """Enlarges pictures.

    Args:
      images: float32 [batch, height, width, 3] in [0, 1].

    Returns:
      float32 [batch, factor · height, factor · width, 3]; not clipped to [0, 1]. Before training
      it is the bicubic enlargement, since the last convolution's gain begins at 0.
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


def enlarge(images, factor: int):
  """Bicubic enlargement: float32 [batch, height, width, 3] to [batch, f · height, f · width, 3]."""
  batch, height, width, channels = images.shape
  return jax.image.resize(images, (batch, factor * height, factor * width, channels), 'cubic')


def example_inputs(config: SuperResolutionConfig, batch: int = 1):
  """Pictures of a shape that `SuperResolution.__call__` takes, for initialisation."""
  side = 4 * config.unshuffle
  return (jnp.zeros((batch, side, side, 3), jnp.float32),)
