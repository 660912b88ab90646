"""The discriminator of StyleGAN2, which tells pictures from reconstructions (arXiv 1912.04958)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.core import errors
from parti_jax.models import config_checks

# What the residual blocks end at: feature maps of 4×4 positions.
_LAST_SIZE = 4


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """Sizes of a discriminator; the pictures' size follows from its input.

  Attributes:
    channels: feature maps times height; a block at height h has channels / h of them (32,768 in
      StyleGAN2's configuration F: 64 at 512 pixels, 128 at 256).
    max_channels: no block has more feature maps than this.
    minibatch_group: pictures over which the standard deviation that the last block sees is taken;
      1 for none. Where it does not divide the pictures that are there, their greatest common
      divisor counts.
    dtype: name of the dtype that convolutions compute in.

  Raises:
    UserError: if a value is out of its range.
  """

  channels: int = 32768
  max_channels: int = 512
  minibatch_group: int = 4
  dtype: str = 'float32'

  def __post_init__(self):
    config_checks.check(self)

  def width(self, size: int) -> int:
    """Feature maps of a block that takes pictures of this height."""
    return max(1, min(self.channels // size, self.max_channels))

  def sizes(self, image_size: int) -> list[int]:
    """Heights that the blocks take, the largest first.

    Raises:
      UserError: if the pictures' size is not a power of two from 8.
    """
    if image_size < 2 * _LAST_SIZE or image_size & (image_size - 1):
      raise errors.UserError(
        f'a discriminator halves its pictures down to {_LAST_SIZE}×{_LAST_SIZE}: their size of '
        f'{image_size} is not a power of two from {2 * _LAST_SIZE}; choose another '
        'ViTVQGANConfig.image_size, or set TokenizerObjective.adversarial_weight to 0'
      )
    return [image_size >> i for i in range(int(math.log2(image_size // _LAST_SIZE)))]


class Convolution(nn.Module):
  """A convolution with an equalised learning rate, and leaky ReLU with a gain of √2.

  Kernels are drawn with a standard deviation of 1 and scaled by 1/√fan-in where they are used, so
  that Adam's steps are as large, in proportion, in every layer (arXiv 1710.10196, section 4.1).

  Attributes:
    features: of the output.
    size: height and width of the kernel.
    downsample: whether the output has half the height and width: blurred, then every second place.
    activate: whether there are a bias and the activation.
    dtype: of the computation.
  """

  features: int
  size: int = 3
  downsample: bool = False
  activate: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """x: [batch, height, width, channels]. Returns dtype [batch, height', width', features]."""
    # The bias stands after the scaled kernel, so that scaling the input scales the kernel alone.
    x = x.astype(self.dtype) * (self.size**2 * x.shape[-1]) ** -0.5
    padding, strides = self.size // 2, 1
    if self.downsample:
      # One more on each side where the kernel then takes its own margin from.
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
  """Two convolutions, the second downsampling, beside a downsampling skip (StyleGAN2, figure 7).

  Attributes:
    features: of the output.
    dtype: of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[batch, height, width, channels] to [batch, height / 2, width / 2, features]."""
    skip = Convolution(
      self.features, 1, downsample=True, activate=False, dtype=self.dtype, name='skip'
    )(x)
    x = Convolution(x.shape[-1], dtype=self.dtype, name='first')(x)
    x = Convolution(self.features, downsample=True, dtype=self.dtype, name='second')(x)
    x = (x + skip) * math.sqrt(0.5)  # Keeps the variance.
    return nn.with_logical_constraint(x, ('activation_batch', None, None, None))


class Discriminator(nn.Module):
  """Pictures to logits: high where a picture looks real (StyleGAN2, residual discriminator).

  Attributes:
    config: sizes.
  """

  config: DiscriminatorConfig

  @nn.compact
  def __call__(self, images):
    """Logits of pictures.

    Args:
      images: float32 [batch, size, size, 3] in [0, 1], `size` a power of two from 8.

    Returns:
      float32 [batch].
    """
    config, dtype = self.config, jnp.dtype(self.config.dtype)
    sizes = config.sizes(images.shape[1])
    x = Convolution(config.width(sizes[0]), 1, dtype=dtype, name='from_pixels')(images * 2.0 - 1.0)
    for size in sizes:
      x = Block(config.width(size // 2), dtype, name=f'block_{size}')(x)
    if config.minibatch_group > 1:
      x = minibatch_deviation(x, config.minibatch_group)
    x = Convolution(config.width(_LAST_SIZE), dtype=dtype, name='last')(x)
    x = x.reshape(x.shape[0], 1, 1, -1)
    x = Convolution(config.width(_LAST_SIZE), 1, dtype=dtype, name='dense')(x)
    # A logit has no activation, and one number can not be split along `embed`.
    x = x.astype(jnp.float32).reshape(x.shape[0], -1)
    logits = nn.Dense(
      1,
      name='logits',
      kernel_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ('embed', None)),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    )(x * x.shape[-1] ** -0.5)
    return logits[:, 0]


def leaky_relu(x):
  """Leaky ReLU of slope 0.2 with a gain of √2, which keeps the second moment about as it was."""
  return nn.leaky_relu(x, 0.2) * math.sqrt(2.0)


def blur(x, padding: int):
  """Convolves with [1, 3, 3, 1] / 8 along height and width, after padding both with zeros.

  Args:
    x: [batch, height, width, channels].
    padding: zeros on each side; the output's sides are longer by 2 · padding − 3.

  Returns:
    [batch, height', width', channels]. As sums of shifted copies, which compilers fuse and whose
    second derivatives are sums as well; a convolution of each channel alone is slow on a CPU.
  """
  for axis in (1, 2):
    widths = [(padding, padding) if i == axis else (0, 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths)
    length = x.shape[axis] - 3
    taps = [jax.lax.slice_in_dim(x, start, start + length, axis=axis) for start in range(4)]
    x = (taps[0] + taps[3]) * 0.125 + (taps[1] + taps[2]) * 0.375
  return x


def minibatch_deviation(x, group: int):
  """Adds a feature map that holds how much the pictures of a group differ.

  The standard deviation over the group of each value, averaged over values (arXiv 1710.10196,
  section 3). A group is of pictures that follow each other, so that devices with whole groups need
  nothing of others.

  Args:
    x: [batch, height, width, channels].
    group: pictures of a group; their greatest common divisor with `batch` counts.

  Returns:
    [batch, height, width, channels + 1].
  """
  batch, height, width, channels = x.shape
  group = math.gcd(batch, group)
  groups = x.astype(jnp.float32).reshape(batch // group, group, height, width, channels)
  deviation = jnp.sqrt(jnp.var(groups, axis=1) + 1e-8)
  mean = jnp.mean(deviation, axis=(1, 2, 3)).astype(x.dtype)
  mean = jnp.repeat(mean, group)[:, None, None, None]
  return jnp.concatenate([x, jnp.broadcast_to(mean, x.shape[:3] + (1,))], axis=-1)
