"""The networks of ESRGAN (arXiv 1809.00219) and Real-ESRGAN (arXiv 2107.10833), which enlarge pictures.

`RRDBNet` is ESRGAN's generator: residual blocks of densely connected convolutions at the resolution
of the input, then nearest-neighbor upsampling with a convolution after each doubling. Real-ESRGAN
enlarges by 2 with the same network, after a pixel unshuffle. `SRVGGNetCompact` is the small network
of its later models: a chain of convolutions with PReLU, a pixel shuffle at the end, and the enlarged
input added to the result. Both take RGB in [0, 1]. `parti_jax.importers.real_esrgan` reads their
published weights.
"""

from __future__ import annotations

import dataclasses
import functools
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

# Number of dense blocks in a block, and of convolutions in a dense block (ESRGAN, figure 4).
DENSE_BLOCKS = 3
CONVOLUTIONS = 5
# Distance, in positions of the blocks, from which on nothing changes a pixel visibly: with the
# published weights of RealESRGAN_x4plus, cutting pictures off there moved no pixel by 0.05 / 255.
# At 64 positions it moved a few by 7 / 255.
_FAR = 96
# Factor of a residual branch (ESRGAN, section 3.1), and the slope of leaky ReLUs.
_RESIDUAL = 0.2
_SLOPE = 0.2
_ACTIVATION = ('activation_batch', 'activation_rows', 'activation_columns', 'activation_embed')


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class RRDBNetConfig:
  """Sizes of an RRDBNet; the defaults are those of RealESRGAN_x4plus.

  Attributes:
    factor: factor by which height and width increase.
    blocks: number of residual blocks, each of three dense blocks.
    width: number of features between blocks, `embed`.
    growth: number of features that each convolution of a dense block adds to its input.
    unshuffle: side, in pixels, of the squares that the blocks treat as one position (pixel
      unshuffle). Must divide height and width; `factor` times it must be a power of 2.
    dtype: name of the dtype of convolutions.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.

  Raises:
    UserError: if a value is out of range.
  """

  factor: int = 4
  blocks: int = 23
  width: int = 64
  growth: int = 32
  unshuffle: int = 1
  dtype: str = 'bfloat16'
  remat: str = 'everything'

  BOUNDS = {'factor': (1, 16), 'unshuffle': (1, 16)}

  def __post_init__(self):
    config_checks.check(self)
    enlarged = self.factor * self.unshuffle
    if enlarged & (enlarged - 1):
      raise errors.UserError(
        f'RRDBNetConfig.factor={self.factor} times unshuffle={self.unshuffle} must be a power of 2, '
        'because the network doubles height and width'
      )

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def doublings(self) -> int:
    """Number of times that the network doubles height and width after the blocks."""
    return (self.factor * self.unshuffle).bit_length() - 1

  @property
  def multiple(self) -> int:
    """Number of pixels that must divide the height and width of an input."""
    return self.unshuffle

  @property
  def features_per_pixel(self) -> int:
    """Size of the widest activations for each pixel of the input: after the last doubling."""
    dense = self.width + (CONVOLUTIONS - 1) * self.growth
    return max(self.width * self.factor**2, dense // self.unshuffle**2)

  @property
  def reach(self) -> int:
    """Radius of what changes a result visibly, in pixels of the input.

    The receptive field of more than six blocks is larger, but its edge hardly counts.
    """
    # The convolutions before the doublings, and less than two positions for those after them.
    positions = min(2 + DENSE_BLOCKS * CONVOLUTIONS * self.blocks + 2, _FAR)
    return self.unshuffle * positions + self.unshuffle - 1


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SRVGGNetCompactConfig:
  """Sizes of an SRVGGNetCompact; the defaults are those of realesr-general-x4v3.

  Attributes:
    factor: factor by which height and width increase.
    layers: number of convolutions between the first and the last one.
    width: number of features, `embed`.
    dtype: name of the dtype of convolutions.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.

  Raises:
    UserError: if a value is out of range.
  """

  factor: int = 4
  layers: int = 32
  width: int = 64
  dtype: str = 'bfloat16'
  remat: str = 'everything'

  BOUNDS = {'factor': (1, 16)}

  def __post_init__(self):
    config_checks.check(self)

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)

  @property
  def multiple(self) -> int:
    """Number of pixels that must divide the height and width of an input."""
    return 1

  @property
  def features_per_pixel(self) -> int:
    """Size of the widest activations for each pixel of the input."""
    return max(self.width, 3 * self.factor**2)

  @property
  def reach(self) -> int:
    """Radius of the receptive field, in pixels of the input."""
    return self.layers + 2


class Convolution(nn.Module):
  """A 3×3 convolution with bias that keeps height and width.

  Attributes:
    features: number of output channels.
    dtype: dtype of the computation; parameters are float32.
    axes: logical names of the kernel's input and output channels.
    scale: the initial standard deviation of the kernel is sqrt(scale / fan-in).
  """

  features: int
  dtype: jnp.dtype
  axes: tuple[str, str] = ('channels', 'embed')
  scale: float = 1.0

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    kernel = layers.parameter(
      self,
      'kernel',
      nn.initializers.variance_scaling(self.scale, 'fan_in', 'normal'),
      ('kernel_rows', 'kernel_columns') + self.axes,
      (3, 3, x.shape[-1], self.features),
    )
    bias = layers.parameter(self, 'bias', nn.initializers.zeros, self.axes[1:], (self.features,))
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y + bias.astype(self.dtype)


class DenseBlock(nn.Module):
  """Five convolutions, each of the input and of all earlier results (ESRGAN, figure 4).

  Attributes:
    config: sizes of the network.
  """

  config: RRDBNetConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch rows columns embed']
  ) -> Float[Array, 'batch rows columns embed']:
    config, known = self.config, x
    # ESRGAN starts with small kernels in the residual branches (section 3.1).
    convolve = functools.partial(Convolution, dtype=config.compute_dtype, scale=0.02)
    for index in range(1, CONVOLUTIONS):
      grown = nn.leaky_relu(convolve(config.growth, name=f'conv_{index}')(known), _SLOPE)
      known = jnp.concatenate([known, grown], axis=-1)
    return x + _RESIDUAL * convolve(config.width, name=f'conv_{CONVOLUTIONS}')(known)


class Block(nn.Module):
  """A residual block of dense blocks, RRDB (ESRGAN, figure 4).

  Attributes:
    config: sizes of the network.
  """

  config: RRDBNetConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch rows columns embed']
  ) -> Float[Array, 'batch rows columns embed']:
    y = x
    for index in range(1, DENSE_BLOCKS + 1):
      y = DenseBlock(self.config, name=f'dense_{index}')(y)
    return nn.with_logical_constraint(x + _RESIDUAL * y, _ACTIVATION)


class PReLU(nn.Module):
  """A ReLU whose slope below 0 is a parameter of each channel (arXiv 1502.01852).

  Attributes:
    dtype: dtype of the computation; the parameter is float32.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    slope = layers.parameter(
      self, 'slope', nn.initializers.constant(0.25), ('embed',), (x.shape[-1],)
    )
    return jnp.where(x >= 0, x, slope.astype(self.dtype) * x)


class CompactLayer(nn.Module):
  """A convolution and its PReLU.

  Attributes:
    config: sizes of the network.
  """

  config: SRVGGNetCompactConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width embed']:
    dtype = self.config.compute_dtype
    x = PReLU(dtype, name='activation')(
      Convolution(self.config.width, dtype, scale=2.0, name='conv')(x)
    )
    return nn.with_logical_constraint(x, _ACTIVATION)


class RRDBNet(nn.Module):
  """Enlarges pictures.

  Attributes:
    config: sizes.
  """

  config: RRDBNetConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch large_height large_width 3']:
    """Enlarges pictures by `factor`.

    Args:
      images: pictures with values in [0, 1], whose height and width `unshuffle` divides.

    Returns:
      Float32 pictures that are not clipped to [0, 1].
    """
    config = self.config
    batch, height, width, _ = images.shape
    convolve = functools.partial(Convolution, dtype=config.compute_dtype)
    activated = functools.partial(convolve, config.width, scale=2.0)
    x = vit_vqgan.to_patches(images, config.unshuffle)
    x = x.reshape(batch, height // config.unshuffle, width // config.unshuffle, -1)
    x = convolve(config.width, name='head')(x)
    x = x + convolve(config.width, name='trunk')(_chain(self, Block, config.blocks, x))
    for index in range(1, config.doublings + 1):
      x = nn.leaky_relu(activated(name=f'doubling_{index}')(_repeated(x, 2)), _SLOPE)
    x = nn.leaky_relu(activated(name='hidden')(x), _SLOPE)
    x = convolve(3, axes=('embed', 'channels'), name='tail')(x)
    return x.astype(jnp.float32)


class SRVGGNetCompact(nn.Module):
  """Enlarges pictures; no convolution is at the resolution of the result.

  Attributes:
    config: sizes.
  """

  config: SRVGGNetCompactConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch large_height large_width 3']:
    """Enlarges pictures by `factor`.

    Args:
      images: pictures with values in [0, 1].

    Returns:
      Float32 pictures that are not clipped to [0, 1].
    """
    config = self.config
    batch, height, width, channels = images.shape
    x = CompactLayer(config, name='head')(images)
    x = _chain(self, CompactLayer, config.layers, x)
    features = channels * config.factor**2
    x = Convolution(features, config.compute_dtype, ('embed', 'channels'), name='tail')(x)
    x = vit_vqgan.from_patches(
      x.reshape(batch, height * width, features), config.factor, (height, width)
    )
    return x.astype(jnp.float32) + _repeated(images, config.factor)


def _chain(
  module: nn.Module,
  block: Any,
  length: int,
  x: Float[Array, 'batch rows columns embed'],
) -> Float[Array, 'batch rows columns embed']:
  """Runs blocks of one config in sequence; `layers` has their parameters, stacked."""
  single = block(module.config, parent=None)
  stacked = layer_stack.parameters(module, single, length, x[:1])
  if module.is_initializing():
    return x
  run = lambda x, params: single.apply({'params': params}, x)
  if module.config.remat != 'everything':
    run = layer_stack.remat(run, module.config.remat)
  return jax.lax.scan(lambda x, params: (run(x, params), None), x, stacked)[0]


def _repeated(
  images: Float[Array, 'batch height width channels'], factor: int
) -> Float[Array, 'batch {factor}*height {factor}*width channels']:
  """Enlarges by repeating pixels."""
  return jnp.repeat(jnp.repeat(images, factor, axis=1), factor, axis=2)
