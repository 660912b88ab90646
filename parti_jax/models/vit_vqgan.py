"""ViT-VQGAN, the image tokenizer (arXiv 2110.04627; Parti, section 2.1)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import image_sizes
from parti_jax.models import config_checks
from parti_jax.models import quantizer
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer

# Maps pixels to [ε, 1 − ε], because the logits of 0 and 1 are infinite (DALL-E, appendix A.3).
LOGIT_LAPLACE_EPSILON = 0.1


class OfPatches:
  """What the sizes of a network of images and square patches imply; a base of configs."""

  image_size: image_sizes.ImageSize
  patch_size: int
  dtype: str

  @property
  def grid(self) -> tuple[int, int]:
    height, width = image_sizes.sides(self.image_size)
    return height // self.patch_size, width // self.patch_size

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.dtype)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class ViTVQGANConfig(OfPatches):
  """Sizes of an image tokenizer.

  Attributes:
    image_size: height and width of the pictures, in pixels; one number for squares.
    patch_size: height and width of a patch, in pixels; must divide `image_size`.
    encoder_layers: number of blocks of the encoder.
    encoder_width: model dimension of the encoder.
    encoder_mlp_width: hidden dimension of the encoder's MLPs.
    encoder_heads: number of attention heads of the encoder; must divide `encoder_width`.
    decoder_layers: number of blocks of the decoder.
    decoder_width: model dimension of the decoder.
    decoder_mlp_width: hidden dimension of the decoder's MLPs.
    decoder_heads: number of attention heads of the decoder; must divide `decoder_width`.
    codebook_size: number of codes.
    code_dim: length of a code.
    commitment: weight β in the loss of the quantizer.
    dtype: name of the dtype of projections.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes.

  Raises:
    UserError: if `patch_size` does not divide `image_size`, if heads do not divide a width, or if
      a value is out of range.
  """

  image_size: image_sizes.ImageSize = 256
  patch_size: int = 8
  encoder_layers: int = 8
  encoder_width: int = 512
  encoder_mlp_width: int = 2048
  encoder_heads: int = 8
  decoder_layers: int = 8
  decoder_width: int = 512
  decoder_mlp_width: int = 2048
  decoder_heads: int = 8
  codebook_size: int = 8192
  code_dim: int = 32
  commitment: float = 0.25
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS = {'commitment': (0, None)}

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'patch_size', 'image_size')
    config_checks.check_image_length(self, 'image_size')
    for side in ('encoder', 'decoder'):
      config_checks.check_divides(self, f'{side}_heads', f'{side}_width')

  @property
  def predicts_scale(self) -> bool:
    return True

  @property
  def code_distance(self) -> str | None:
    return 'cosine'

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    return ()


def to_patches(
  images: Float[Array, 'batch height width channels'], patch_size: int
) -> Float[Array, 'batch patches {patch_size}**2*channels']:
  """Cuts pictures into patches, row by row, and flattens each patch."""
  batch, height, width, channels = images.shape
  rows, columns = height // patch_size, width // patch_size
  x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * columns, patch_size * patch_size * channels)


def from_patches(
  patches: Float[Array, 'batch patches values'], patch_size: int, grid: tuple[int, int]
) -> Float[Array, 'batch {patch_size*grid[0]} {patch_size*grid[1]} channels']:
  """The inverse of `to_patches`; `grid` is the number of rows and columns of patches."""
  batch = patches.shape[0]
  rows, columns = grid
  x = patches.reshape(batch, rows, columns, patch_size, patch_size, -1)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, rows * patch_size, columns * patch_size, -1)


class PixelEncoder(nn.Module):
  """Encodes pixels: patch projection, Transformer, MLP with tanh to code_dim.

  Attributes:
    config: sizes.
  """

  config: ViTVQGANConfig

  @nn.compact
  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns latents of pictures with values in [0, 1]."""
    config = self.config
    dtype, width = config.compute_dtype, config.encoder_width
    patches = to_patches(images * 2.0 - 1.0, config.patch_size)
    x = layers.Projection((width,), 1, ('patch', 'embed'), dtype, name='project_patches')(patches)
    positions = layers.Embedding(
      config.image_length, width, ('position', 'embed'), name='position_embedding'
    )
    x = x + positions(jnp.arange(config.image_length), dtype)
    x = transformer.Encoder(
      config.encoder_layers,
      width,
      config.encoder_mlp_width,
      config.encoder_heads,
      dtype=dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x)
    x = layers.Projection(
      (config.encoder_mlp_width,), 1, ('embed', 'mlp'), dtype, name='project_hidden'
    )(x)
    return layers.Projection((config.code_dim,), 1, ('mlp', 'code'), name='project_codes')(
      nn.tanh(x)
    )


class PixelDecoder(nn.Module):
  """Decodes codes to pixels: MLP with tanh from code_dim, Transformer, patch projection.

  Attributes:
    config: sizes.
  """

  config: ViTVQGANConfig

  @nn.compact
  def __call__(
    self, codes: Float[Array, 'batch tokens code_dim']
  ) -> tuple[Float[Array, 'batch height width 3'], Float[Array, 'batch height width 3']]:
    """Returns the parameters of each pixel's logit-laplace distribution.

    Args:
      codes: float32 unit vectors.

    Returns:
      Float32 mean and log scale of the distribution over logits of pixels.
    """
    config = self.config
    dtype, width = config.compute_dtype, config.decoder_width
    x = layers.Projection(
      (config.decoder_mlp_width,),
      1,
      ('code', 'mlp'),
      dtype,
      scale=float(config.code_dim),
      name='project_codes',
    )(codes)
    x = layers.Projection((width,), 1, ('mlp', 'embed'), dtype, name='project_hidden')(nn.tanh(x))
    positions = layers.Embedding(
      config.image_length, width, ('position', 'embed'), name='position_embedding'
    )
    x = x + positions(jnp.arange(config.image_length), dtype)
    x = transformer.Encoder(
      config.decoder_layers,
      width,
      config.decoder_mlp_width,
      config.decoder_heads,
      dtype=dtype,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x)
    channels = config.patch_size**2 * 6
    self.sow('intermediates', 'last_hidden', x)  # For the adaptive adversarial weight.
    x = layers.Projection((channels,), 1, ('embed', 'patch'), name='project_patches')(x)
    pixels = from_patches(x.astype(jnp.float32), config.patch_size, config.grid)
    return pixels[..., :3], pixels[..., 3:]


class ViTVQGAN(nn.Module):
  """An image tokenizer: encoder, quantizer and decoder.

  Attributes:
    config: sizes.
  """

  config: ViTVQGANConfig

  def setup(self):
    config = self.config
    self.encoder = PixelEncoder(config)
    self.quantizer = quantizer.VectorQuantizer(
      config.codebook_size, config.code_dim, config.commitment
    )
    self.decoder = PixelDecoder(config)

  def __call__(
    self, images: Float[Array, 'batch height width 3'], quantize: bool | Bool[Array, ''] = True
  ) -> dict[str, Array]:
    """Encodes, quantizes and decodes pictures.

    Args:
      images: pictures with values in [0, 1].
      quantize: whether the decoder gets the codes, or else the normalized latents.

    Returns:
      A dict: 'mean' and 'log_scale' (the results of PixelDecoder), 'tokens' int32 [batch, tokens],
      'latents' float32 [batch, tokens, code_dim], 'quantizer_loss' float32 [].
    """
    latents = self.encoder(images)
    codes, tokens, loss = self.quantizer(latents)
    codes = jnp.where(quantize, codes, quantizer.normalize(latents))
    mean, log_scale = self.decoder(codes)
    return {
      'mean': mean,
      'log_scale': log_scale,
      'tokens': tokens,
      'latents': latents,
      'quantizer_loss': loss,
    }

  def tokenize(self, images: Float[Array, 'batch height width 3']) -> Int[Array, 'batch tokens']:
    """Returns the tokens of pictures with values in [0, 1]."""
    return self.quantizer.nearest(self.encoder(images))

  def detokenize(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch height width 3']:
    """Returns the pictures that tokens represent, float32 with values in [0, 1]."""
    mean, _ = self.decoder(self.quantizer.lookup(tokens))
    return jnp.clip(to_pixels(mean), 0.0, 1.0)


def to_pixels(mean: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Returns the pixels at the median of logit-laplace distributions.

  They may lie outside of [0, 1] by up to ε / (1 − 2ε).
  """
  return (nn.sigmoid(mean) - LOGIT_LAPLACE_EPSILON) / (1.0 - 2.0 * LOGIT_LAPLACE_EPSILON)


def last_kernel_gradient(
  config: ViTVQGANConfig,
  hidden: Float[Array, 'batch tokens embed'],
  gradients: dict[str, Array],
) -> Float[Array, 'embed outputs']:
  """Returns the gradient of the decoder's last kernel; that layer is linear.

  Args:
    config: sizes.
    hidden: the layer's input, which the decoder sows as 'last_hidden'.
    gradients: {'mean', 'log_scale'}: gradients of these results of `ViTVQGAN.__call__`.
  """
  of_pixels = jnp.concatenate([gradients['mean'], gradients['log_scale']], axis=-1)
  of_patches = to_patches(of_pixels, config.patch_size)
  return jnp.einsum('bli,blo->io', hidden.astype(jnp.float32), of_patches.astype(jnp.float32))


def example_inputs(
  config: ViTVQGANConfig, batch: int = 1
) -> tuple[Float[Array, 'batch height width 3']]:
  """Returns pictures of the size that `ViTVQGAN` takes, for initialization."""
  return (jnp.zeros((batch, *image_sizes.sides(config.image_size), 3), jnp.float32),)
