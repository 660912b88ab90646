"""The StyleGAN2 discriminator, which classifies pictures as real or not (arXiv 1912.04958)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.models import config_checks

# Shorter side of the feature maps after the last residual block.
_LAST_SIZE = 4


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """Sizes of a discriminator. The size of the pictures follows from the input.

  Attributes:
    channels: feature maps times height: a block at height h has channels / h feature maps (32,768
      in configuration F of StyleGAN2: 64 at 512 pixels, 128 at 256). Of pictures that are not square,
      the shorter side counts as the height.
    max_channels: maximum number of feature maps of a block.
    minibatch_group: number of pictures in a group for the standard deviation that the last block
      sees; 1 for no standard deviation. If it does not divide the batch, the greatest common
      divisor of both is used.
    dtype: name of the dtype of convolutions.

  Raises:
    UserError: if a value is out of range.
  """

  channels: int = 32768
  max_channels: int = 512
  minibatch_group: int = 4
  dtype: str = 'float32'

  def __post_init__(self):
    config_checks.check(self)

  def width(self, size: int) -> int:
    """Returns the number of feature maps of a block with an input of this height."""
    return max(1, min(self.channels // size, self.max_channels))

  def sizes(self, image_size: image_sizes.ImageSize) -> list[int]:
    """Returns the heights, or shorter sides, of the blocks' inputs, the largest first.

    Raises:
      UserError: if the shorter side of the pictures is not a power of two, or less than 8, or if the
        other side can't be halved as often.
    """
    shorter, longer = sorted(image_sizes.sides(image_size))
    if shorter < 2 * _LAST_SIZE or shorter & (shorter - 1):
      raise errors.UserError(
        f'a discriminator halves its pictures down to {_LAST_SIZE}×{_LAST_SIZE}: their size of '
        f'{shorter} is not a power of two from {2 * _LAST_SIZE}; choose another '
        'image_size, or set adversarial_weight to 0'
      )
    if longer % (shorter // _LAST_SIZE):
      raise errors.UserError(
        f'a discriminator halves its pictures until the shorter side of {shorter} is {_LAST_SIZE}: '
        f'the other side of {longer} is not a multiple of {shorter // _LAST_SIZE}; choose another '
        'image_size, or set adversarial_weight to 0'
      )
    return [shorter >> i for i in range(int(math.log2(shorter // _LAST_SIZE)))]


class Convolution(nn.Module):
  """A convolution with an equalized learning rate, and leaky ReLU with a gain of √2.

  Kernels are initialized with a standard deviation of 1 and multiplied by 1/√fan-in in the forward
  pass, which makes the relative size of Adam's updates equal in all layers (arXiv 1710.10196,
  section 4.1).

  Attributes:
    features: number of output channels.
    size: height and width of the kernel.
    downsample: whether to blur the input and to use a stride of 2.
    activate: whether to add a bias and to apply the activation.
    dtype: dtype of the computation.
  """

  features: int
  size: int = 3
  downsample: bool = False
  activate: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch out_height out_width features']:
    # Scaling the input is the same as scaling the kernel. The bias is not scaled.
    x = x.astype(self.dtype) * (self.size**2 * x.shape[-1]) ** -0.5
    padding, strides = self.size // 2, 1
    if self.downsample:
      # The blur pads for the convolution too.
      x, padding, strides = blur(x, 1 + padding), 0, 2
    axes = (None, None, 'channels', 'embed')
    x = nn.Conv(
      self.features,
      (self.size, self.size),
      strides,
      padding,
      use_bias=self.activate,
      dtype=self.dtype,
      name='convolution',
      kernel_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), axes),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    )(x)
    return leaky_relu(x) if self.activate else x


class Block(nn.Module):
  """Two convolutions and a skip connection that halve height and width (StyleGAN2, figure 7).

  Attributes:
    features: number of output channels.
    dtype: dtype of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height//2 width//2 features']:
    skip = Convolution(
      self.features, 1, downsample=True, activate=False, dtype=self.dtype, name='skip'
    )(x)
    x = Convolution(x.shape[-1], dtype=self.dtype, name='first')(x)
    x = Convolution(self.features, downsample=True, dtype=self.dtype, name='second')(x)
    x = (x + skip) * math.sqrt(0.5)  # Preserves the variance.
    return nn.with_logical_constraint(x, ('activation_batch', None, None, None))


class Discriminator(nn.Module):
  """Predicts a logit for each picture; a high logit means that it looks real.

  Attributes:
    config: sizes.
  """

  config: DiscriminatorConfig

  @nn.compact
  def __call__(self, images: Float[Array, 'batch height width 3']) -> Float[Array, 'batch']:
    """Returns float32 logits of pictures with values in [0, 1], of a size for `config.sizes`."""
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    sizes = config.sizes((images.shape[1], images.shape[2]))
    x = Convolution(config.width(sizes[0]), 1, dtype=dtype, name='from_pixels')(images * 2.0 - 1.0)
    for size in sizes:
      x = Block(config.width(size // 2), dtype, name=f'block_{size}')(x)
    if config.minibatch_group > 1:
      x = minibatch_deviation(x, config.minibatch_group)
    x = Convolution(config.width(_LAST_SIZE), dtype=dtype, name='last')(x)
    x = x.reshape(x.shape[0], 1, 1, -1)
    x = Convolution(config.width(_LAST_SIZE), 1, dtype=dtype, name='dense')(x)
    # Not a Convolution: there is no activation, and one output can't be split along `embed`.
    x = x.astype(jnp.float32).reshape(x.shape[0], -1)
    logits = nn.Dense(
      1,
      name='logits',
      kernel_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ('embed', None)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    )(x * x.shape[-1] ** -0.5)
    return logits[:, 0]


def leaky_relu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Leaky ReLU with slope 0.2 and a gain of √2, which roughly preserves the second moment."""
  return nn.leaky_relu(x, 0.2) * math.sqrt(2.0)


def blur(
  x: Float[Array, 'batch height width channels'], padding: int
) -> Float[Array, 'batch height+2*{padding}-3 width+2*{padding}-3 channels']:
  """Convolves with [1, 3, 3, 1] / 8 along height and width, after padding with zeros.

  It is computed as a sum of shifted copies, which compilers fuse and whose second derivative is a
  sum too. A depthwise convolution is slow on a CPU.

  Args:
    x: feature maps.
    padding: number of zeros on each side.
  """
  for axis in (1, 2):
    widths = [(padding, padding) if i == axis else (0, 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths)
    length = x.shape[axis] - 3
    taps = [jax.lax.slice_in_dim(x, start, start + length, axis=axis) for start in range(4)]
    x = (taps[0] + taps[3]) * 0.125 + (taps[1] + taps[2]) * 0.375
  return x


def minibatch_deviation(
  x: Float[Array, 'batch height width channels'], group: int
) -> Float[Array, 'batch height width channels+1']:
  """Appends a feature map that measures how much the pictures of each group differ.

  It is the standard deviation of each value over the group, averaged over all values (arXiv
  1710.10196, section 3). A group consists of consecutive pictures, so a device that holds whole
  groups needs no data from other devices.

  Args:
    x: feature maps.
    group: number of pictures in a group; its greatest common divisor with the batch is used.
  """
  batch, height, width, channels = x.shape
  group = math.gcd(batch, group)
  groups = x.astype(jnp.float32).reshape(batch // group, group, height, width, channels)
  deviation = jnp.sqrt(jnp.var(groups, axis=1) + 1e-8)
  mean = jnp.mean(deviation, axis=(1, 2, 3)).astype(x.dtype)
  mean = jnp.repeat(mean, group)[:, None, None, None]
  return jnp.concatenate([x, jnp.broadcast_to(mean, x.shape[:3] + (1,))], axis=-1)
