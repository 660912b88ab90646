"""Convolutional image tokenizers of the VQGAN family (arXiv 2012.09841).

One network with the options in which its descendants differ: LlamaGen's tokenizers, IBQ,
MaskGIT-VQGAN, and the model that dalle-mini uses. It is fully convolutional, so it takes images of
any height and width that its downsampling factor divides.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.models import config_checks
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layer_stack

QUANTIZERS = ('cosine', 'euclidean', 'dot', 'fsq', 'lfq')
_CHOICES = {
  'quantizer': QUANTIZERS,
  'downsampling': ('convolution', 'average'),
  'shortcut': ('input', 'output'),
  'output': ('pixels', 'logit_laplace'),
}
_ACTIVATION = ('activation_batch', 'activation_rows', 'activation_columns', 'activation_embed')
# Quantizers that find the nearest vector of a table -> their distance.
_DISTANCES = {'cosine': 'cosine', 'euclidean': 'euclidean'}


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class VQGANConfig:
  """Sizes of a convolutional image tokenizer.

  Attributes:
    image_size: height and width of the images, in pixels; one number for squares. Methods that take
      images accept other sizes too.
    channels: base number of channels.
    multipliers: factor of the base number at each level. The first level has the full resolution,
      and each following level half the height and width of the one before.
    res_blocks: number of residual blocks in each level of the encoder.
    decoder_res_blocks: number of residual blocks in each level of the decoder.
    middle_blocks: number of residual blocks between the levels of the encoder and its end, and
      between the start of the decoder and its levels.
    attention: whether self-attention follows each residual block of the last level.
    middle_attention: whether there is self-attention between the middle blocks.
    z_channels: number of channels of the encoder's output and of the decoder's input; 1×1
      convolutions map between them and codes. None for an encoder that ends in a single 1×1
      convolution to codes, and a decoder that starts from codes.
    code_dim: length of a code.
    codebook_size: number of codes.
    quantizer: how a latent is mapped to a code. 'cosine', 'euclidean' and 'dot' find the nearest
      code in a table by angle, distance and dot product. 'fsq' rounds each dimension, and 'lfq'
      takes its sign. The module `quantizer` describes them.
    fsq_levels: number of levels of each dimension with the quantizer 'fsq'.
    commitment: weight β in the quantizer's loss.
    entropy_weight: weight of the entropy penalty in the loss of 'dot' and 'lfq'.
    pixel_range: values of black and white inside the network. Its methods always take and return
      images in [0, 1].
    downsampling: 'convolution' with stride 2, or 'average' of squares of 2×2.
    bias: whether the convolutions of residual blocks and the encoder's first one have biases.
    shortcut: what a residual block that changes the number of channels adds to its result: a 1×1
      convolution of its 'input', or of its 'output', which then does not bypass it.
    norm_groups: number of groups of the group norms.
    output: what the decoder computes: the 'pixels' themselves, or the mean and scale of a
      'logit_laplace' distribution, as in ViT-VQGAN.
    dtype: name of the dtype of convolutions.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.

  Raises:
    UserError: if a value is out of range, or does not fit the others.
  """

  image_size: image_sizes.ImageSize = 256
  channels: int = 128
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  res_blocks: int = 2
  decoder_res_blocks: int = 3
  middle_blocks: int = 2
  attention: bool = True
  middle_attention: bool = True
  z_channels: int | None = 256
  code_dim: int = 8
  codebook_size: int = 16384
  quantizer: str = 'cosine'
  fsq_levels: tuple[int, ...] = ()
  commitment: float = 0.25
  entropy_weight: float = 0.05
  pixel_range: tuple[float, float] = (-1.0, 1.0)
  downsampling: str = 'convolution'
  bias: bool = True
  shortcut: str = 'input'
  norm_groups: int = 32
  output: str = 'logit_laplace'
  dtype: str = 'bfloat16'
  remat: str = 'everything'

  BOUNDS = {'commitment': (0, None), 'entropy_weight': (0, None), 'fsq_levels': (2, 256)}

  def __post_init__(self):
    config_checks.check(self)
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise errors.UserError(
          f'VQGANConfig.{name}={getattr(self, name)!r} is not one of {", ".join(known)}'
        )
    if not self.multipliers:
      raise errors.UserError('VQGANConfig.multipliers=() must have at least one number')
    config_checks.check_divides(self, 'norm_groups', 'channels')
    if any(side % self.factor for side in image_sizes.sides(self.image_size)):
      raise errors.UserError(
        f'VQGANConfig.image_size={self.image_size} is not a multiple of {self.factor}, by which '
        f'the {len(self.multipliers)} levels of multipliers={self.multipliers} downsample'
      )
    config_checks.check_image_length(self, 'image_size')
    if self.pixel_range[0] >= self.pixel_range[1]:
      raise errors.UserError(f'VQGANConfig.pixel_range={self.pixel_range} must ascend')
    self._check_codes()

  def _check_codes(self):
    """Raises UserError unless the number and length of codes are those of the quantizer."""
    if self.quantizer == 'fsq':
      levels = checks.shown(self.fsq_levels)
      codes, length = math.prod(self.fsq_levels), len(self.fsq_levels)
      found = f'fsq_levels={levels}: codebook_size is the product of the levels'
    elif self.quantizer == 'lfq':
      codes, length = 2**self.code_dim, self.code_dim
      found = "quantizer='lfq': codebook_size is 2 to the power of code_dim"
    else:
      return
    if (codes, length) != (self.codebook_size, self.code_dim):
      raise errors.UserError(
        f'VQGANConfig.{found}, here {checks.shown(codes)}, and code_dim is the number of '
        f'dimensions, here {length}; codebook_size={self.codebook_size} and '
        f'code_dim={self.code_dim} are given'
      )

  @property
  def factor(self) -> int:
    """Height and width, in pixels, of the square that one token represents."""
    return 2 ** (len(self.multipliers) - 1)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of the tokens of an image of `image_size`."""
    return self.grid_for(*image_sizes.sides(self.image_size))

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def predicts_scale(self) -> bool:
    return self.output == 'logit_laplace'

  @property
  def code_distance(self) -> str | None:
    return _DISTANCES.get(self.quantizer)

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    if self.quantizer in ('dot', 'lfq') and self.entropy_weight:
      return ("entropy of the codes' use",)
    return ()

  def grid_for(self, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns of the tokens of an image of this size.

    Raises:
      UserError: if the downsampling factor does not divide the height and width.
    """
    if height < 1 or width < 1 or height % self.factor or width % self.factor:
      raise errors.UserError(
        f'images of {height}×{width} pixels do not fit this tokenizer: it needs a height and '
        f'width that are multiples of {self.factor}'
      )
    return height // self.factor, width // self.factor


def _convolution(
  name: str,
  features: int,
  size: int = 3,
  axes: tuple[str, str] = ('channels', 'embed'),
  stride: int = 1,
  bias: bool = True,
  dtype: jnp.dtype = jnp.float32,
) -> nn.Conv:
  """Returns a convolution that keeps height and width, or halves them.

  Args:
    name: name of the module.
    features: number of channels of the output.
    size: height and width of the kernel: 1 or 3.
    axes: logical names of the kernel's axes of input and output channels.
    stride: 1, or 2, which pads only the right and the bottom.
    bias: whether there is a bias.
    dtype: dtype of the computation; parameters are float32.
  """
  margin = size // 2
  padding = (0, margin) if stride == 2 else (margin, margin)
  kernel_axes = ('kernel_rows', 'kernel_columns') + axes
  return nn.Conv(
    features,
    (size, size),
    stride,
    (padding, padding),
    use_bias=bias,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), kernel_axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    name=name,
  )


def _norm(config: VQGANConfig, name: str) -> nn.GroupNorm:
  """Returns a group norm with statistics in float32."""
  return nn.GroupNorm(
    config.norm_groups,
    epsilon=1e-6,
    dtype=config.compute_dtype,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    name=name,
  )


class ResBlock(nn.Module):
  """Group norm, swish and a convolution, twice, with a residual connection.

  Attributes:
    config: sizes of the tokenizer.
    features: number of channels of the output.
  """

  config: VQGANConfig
  features: int

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    config = self.config
    y = x
    for place in (1, 2):
      y = nn.swish(_norm(config, f'norm_{place}')(y))
      y = _convolution(
        f'conv_{place}', self.features, bias=config.bias, dtype=config.compute_dtype
      )(y)
    if x.shape[-1] != self.features:
      x = _convolution('shortcut', self.features, 1, bias=config.bias, dtype=config.compute_dtype)(
        x if config.shortcut == 'input' else y
      )
    return nn.with_logical_constraint(x + y, _ACTIVATION)


class Attention(nn.Module):
  """Group norm and single-head self-attention over all positions, with a residual connection."""

  config: VQGANConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width channels']:
    channels, dtype = x.shape[-1], self.config.compute_dtype
    project = lambda name: _convolution(name, channels, 1, dtype=dtype)
    normed = _norm(self.config, 'norm')(x)
    query, key, value = (
      project(name)(normed).reshape(x.shape[0], -1, channels) for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('bqc,bkc->bqk', query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(dtype)
    mixed = jnp.einsum('bqk,bkc->bqc', weights, value).reshape(x.shape)
    return nn.with_logical_constraint(x + project('out')(mixed), _ACTIVATION)


class Blocks(nn.Module):
  """Residual blocks of one resolution, with attention after or between them.

  Attributes:
    config: sizes of the tokenizer.
    count: number of residual blocks.
    features: number of channels of their outputs.
    attentions: number of blocks, from the first one on, that self-attention follows.
  """

  config: VQGANConfig
  count: int
  features: int
  attentions: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch height width channels']
  ) -> Float[Array, 'batch height width features']:
    block, attention = ResBlock, Attention
    if self.config.remat != 'everything':
      policy = layer_stack.REMAT_POLICIES[self.config.remat]
      block, attention = nn.remat(block, policy=policy), nn.remat(attention, policy=policy)
    for place in range(self.count):
      x = block(self.config, self.features, name=f'block_{place}')(x)
      if place < self.attentions:
        x = attention(self.config, name=f'attention_{place}')(x)
    return x


def _middle(config: VQGANConfig) -> Blocks:
  return Blocks(
    config,
    config.middle_blocks,
    config.channels * config.multipliers[-1],
    config.middle_blocks - 1 if config.middle_attention else 0,
    name='middle',
  )


def _level(config: VQGANConfig, level: int, blocks: int) -> Blocks:
  last = level == len(config.multipliers) - 1
  return Blocks(
    config,
    blocks,
    config.channels * config.multipliers[level],
    blocks if config.attention and last else 0,
    name=f'level_{level}',
  )


class Encoder(nn.Module):
  """Converts pixels to latents."""

  config: VQGANConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch tokens code']:
    config, dtype = self.config, self.config.compute_dtype
    config.grid_for(*images.shape[1:3])
    low, high = config.pixel_range
    x = images * (high - low) + low
    x = _convolution('conv_in', config.channels, bias=config.bias, dtype=dtype)(x)
    for level in range(len(config.multipliers)):
      if level:
        x = self._halved(x, level - 1)
      x = _level(config, level, config.res_blocks)(x)
    x = _middle(config)(x)
    x = nn.swish(_norm(config, 'norm_out')(x))
    if config.z_channels is None:
      x = _convolution('conv_out', config.code_dim, 1, ('embed', 'code'))(x)
    else:
      axes = ('embed', 'channels')
      x = _convolution('conv_out', config.z_channels, axes=axes, dtype=dtype)(x)
      x = _convolution('project_codes', config.code_dim, 1, ('channels', 'code'))(x)
    return x.reshape(x.shape[0], -1, config.code_dim)

  def _halved(self, x, level: int):
    """[batch, height, width, channels] to [batch, height / 2, width / 2, channels]."""
    if self.config.downsampling == 'average':
      return nn.avg_pool(x, (2, 2), (2, 2))
    dtype = self.config.compute_dtype
    return _convolution(f'downsample_{level}', x.shape[-1], stride=2, dtype=dtype)(x)


class Decoder(nn.Module):
  """Converts codes to the output that `VQGANConfig.output` names."""

  config: VQGANConfig

  @nn.compact
  def __call__(
    self, codes: Float[Array, 'batch tokens code'], grid: tuple[int, int]
  ) -> Float[Array, 'batch height width outputs']:
    """Decodes codes.

    Args:
      codes: codes of all tokens, row by row.
      grid: rows and columns of tokens.
    """
    config, dtype = self.config, self.config.compute_dtype
    x = codes.reshape(codes.shape[0], *grid, config.code_dim)
    if config.z_channels is not None:
      axes = ('code', 'channels')
      x = _convolution('project_codes', config.z_channels, 1, axes, dtype=dtype)(x)
    x = _convolution('conv_in', config.channels * config.multipliers[-1], dtype=dtype)(x)
    x = _middle(config)(x)
    for level in reversed(range(len(config.multipliers))):
      x = _level(config, level, config.decoder_res_blocks)(x)
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = _convolution(f'upsample_{level}', x.shape[-1], dtype=dtype)(x)
    x = nn.swish(_norm(config, 'norm_out')(x))
    self.sow('intermediates', 'last_hidden', x)
    outputs = 3 if config.output == 'pixels' else 6
    return _convolution('conv_out', outputs, axes=('embed', 'channels'))(x)


class VQGAN(nn.Module):
  """The image tokenizer: encoder, quantizer and decoder.

  Attributes:
    config: sizes.
  """

  config: VQGANConfig

  def setup(self):
    self.encoder = Encoder(self.config)
    self.quantizer = _quantizer(self.config)
    self.decoder = Decoder(self.config)

  def __call__(
    self, images: Float[Array, 'batch height width 3'], quantize: bool | Bool[Array, ''] = True
  ) -> dict[str, Array]:
    """Encodes, quantizes and decodes.

    Args:
      images: pixels in [0, 1].
      quantize: whether the decoder gets codes instead of the latents themselves.

    Returns:
      A dict: 'tokens' int32 [batch, tokens], 'latents' float32 [batch, tokens, code_dim] and
      'quantizer_loss' float32 []. With the output 'logit_laplace', 'mean' and 'log_scale', float32
      [batch, height, width, 3]: each pixel's distribution. With the output 'pixels', 'pixels',
      float32 [batch, height, width, 3], which may lie outside of [0, 1].

    Raises:
      UserError: if the downsampling factor does not divide the height and width.
    """
    grid = self.config.grid_for(*images.shape[1:3])
    latents = self.encoder(images)
    codes, tokens, loss = self.quantizer(latents)
    codes = jnp.where(quantize, codes, self.quantizer.continuous(latents))
    out = self.decoder(codes, grid)
    if self.config.output == 'pixels':
      outputs = {'pixels': self._unit_pixels(out)}
    else:
      outputs = {'mean': out[..., :3], 'log_scale': out[..., 3:]}
    return outputs | {'tokens': tokens, 'latents': latents, 'quantizer_loss': loss}

  def tokenize(self, images: Float[Array, 'batch height width 3']) -> Int[Array, 'batch tokens']:
    """Returns the tokens of images with pixels in [0, 1], row by row.

    Raises:
      UserError: if the downsampling factor does not divide the height and width.
    """
    return self.quantizer.nearest(self.encoder(images))

  def detokenize(
    self, tokens: Int[Array, 'batch tokens'], grid: tuple[int, int] | None = None
  ) -> Float[Array, 'batch height width 3']:
    """Returns the images, with pixels in [0, 1], of tokens.

    Args:
      tokens: tokens of each image, row by row.
      grid: rows and columns; None for those of an image of `config.image_size`.

    Raises:
      UserError: if the grid has another number of tokens.
    """
    rows, columns = grid or self.config.grid
    if min(rows, columns) < 1 or rows * columns != tokens.shape[1]:
      raise errors.UserError(
        f'{tokens.shape[1]} tokens do not fill {rows} rows of {columns}; give the grid of the image'
      )
    out = self.decoder(self.quantizer.lookup(tokens), (rows, columns))
    if self.config.output == 'pixels':
      pixels = self._unit_pixels(out)
    else:
      pixels = vit_vqgan.to_pixels(out[..., :3])
    return jnp.clip(pixels, 0.0, 1.0)

  def _unit_pixels(self, pixels):
    """Maps pixels from the network's range to [0, 1]; they may lie outside."""
    low, high = self.config.pixel_range
    return (pixels - low) / (high - low)


def _quantizer(config: VQGANConfig):
  """Returns the quantizer of a config."""
  if config.quantizer == 'fsq':
    return quantizer.FiniteScalarQuantizer(config.fsq_levels)
  if config.quantizer == 'lfq':
    return quantizer.LookupFreeQuantizer(config.code_dim, config.commitment, config.entropy_weight)
  sizes = (config.codebook_size, config.code_dim, config.commitment, jax.lax.Precision.HIGHEST)
  if config.quantizer == 'dot':
    return quantizer.DotQuantizer(*sizes, config.entropy_weight)
  kinds = {'cosine': quantizer.VectorQuantizer, 'euclidean': quantizer.EuclideanQuantizer}
  return kinds[config.quantizer](*sizes)


def last_kernel_gradient(
  config: VQGANConfig,
  hidden: Float[Array, 'batch height width embed'],
  gradients: dict[str, Array],
) -> Float[Array, 'rows columns embed outputs']:
  """Returns the gradient of the kernel of the decoder's last convolution.

  Args:
    config: sizes.
    hidden: the convolution's input, which the decoder sows as 'last_hidden'.
    gradients: gradients of the results of `VQGAN.__call__`: {'pixels'} or {'mean', 'log_scale'}.
  """
  if config.output == 'pixels':
    low, high = config.pixel_range
    of_output = gradients['pixels'] / (high - low)
  else:
    of_output = jnp.concatenate([gradients['mean'], gradients['log_scale']], axis=-1)

  def convolve(kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
      hidden.astype(jnp.float32),
      kernel,
      (1, 1),
      ((1, 1), (1, 1)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  kernel = jax.ShapeDtypeStruct((3, 3, hidden.shape[-1], of_output.shape[-1]), jnp.float32)
  (gradient,) = jax.linear_transpose(convolve, kernel)(of_output.astype(jnp.float32))
  return gradient


def example_inputs(
  config: VQGANConfig, batch: int = 1
) -> tuple[Float[Array, 'batch height width 3']]:
  """Returns an array with the shape and dtype of the argument of `VQGAN`, for initialization."""
  return (jnp.zeros((batch, *image_sizes.sides(config.image_size), 3), jnp.float32),)
