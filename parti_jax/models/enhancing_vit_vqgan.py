"""The ViT-VQGAN of enhancing-transformers, whose weights are public.

It differs from the paper's (arXiv 2110.04627), which `vit_vqgan` implements: projections have biases,
MLPs have tanh, codes are projected without a hidden layer, pixels come out directly instead of a
logit-laplace distribution, and go in without being scaled to [-1, 1].
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import clip_layers
from parti_jax.models import config_checks
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers

_EPSILON = 1e-5


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class EnhancingViTVQGANConfig(vit_vqgan.OfPatches):
  """Sizes of the tokenizer; the defaults are those of the published small one.

  Attributes:
    image_size: height and width of the images, which are squares, in pixels.
    patch_size: height and width of a patch, in pixels; must divide `image_size`.
    layers: number of blocks of the encoder, and of the decoder.
    width: model dimension `embed` of both.
    mlp_width: hidden dimension of their MLPs.
    heads: number of their attention heads; must divide `width`.
    codebook_size: number of codes.
    code_dim: length of a code.
    dtype: name of the dtype of projections.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes.

  Raises:
    UserError: if `patch_size` does not divide `image_size`, `heads` does not divide `width`, or a
      value is out of range.
  """

  image_size: int = 256
  patch_size: int = 8
  layers: int = 8
  width: int = 512
  mlp_width: int = 2048
  heads: int = 8
  codebook_size: int = 8192
  code_dim: int = 32
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_divides(self, 'patch_size', 'image_size')
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_image_length(self, 'image_size')


class _Stack(nn.Module):
  """Positions, a Transformer and a final layer norm.

  Attributes:
    config: sizes.
  """

  config: EnhancingViTVQGANConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'batch tokens embed']) -> Float[Array, 'batch tokens embed']:
    config, dtype = self.config, self.config.compute_dtype
    positions = layers.Embedding(
      config.image_length, config.width, ('position', 'embed'), name='position_embedding'
    )
    x = (x + positions(jnp.arange(config.image_length))).astype(dtype)
    x = clip_layers.Transformer(
      config.layers,
      config.width,
      config.mlp_width,
      config.heads,
      'tanh',
      _EPSILON,
      dtype=dtype,
      qkv_bias=False,
      remat=config.remat,
      unroll=config.unroll,
      name='transformer',
    )(x)
    return clip_layers.layer_norm(_EPSILON, dtype, 'norm')(x)


class PixelEncoder(nn.Module):
  """Encodes pixels: patch projection, Transformer, projection to code_dim.

  Attributes:
    config: sizes.
  """

  config: EnhancingViTVQGANConfig

  def setup(self):
    config = self.config
    self.project_patches = clip_layers.Linear(
      (config.width,), 1, ('patch', 'embed'), config.compute_dtype
    )
    self.stack = _Stack(config)
    self.project_codes = clip_layers.Linear((config.code_dim,), 1, ('embed', 'code'))

  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns latents of images in [0, 1]."""
    config = self.config
    patches = clip_layers.whole_patches(images, config.image_size, config.patch_size)
    return self.project_codes(self.stack(self.project_patches(patches)))


class PixelDecoder(nn.Module):
  """Decodes codes to pixels: projection from code_dim, Transformer, patch projection.

  Attributes:
    config: sizes.
  """

  config: EnhancingViTVQGANConfig

  def setup(self):
    config = self.config
    self.project_codes = clip_layers.Linear(
      (config.width,), 1, ('code', 'embed'), config.compute_dtype
    )
    self.stack = _Stack(config)
    self.project_patches = clip_layers.Linear((3 * config.patch_size**2,), 1, ('embed', 'patch'))

  def __call__(
    self, codes: Float[Array, 'batch tokens code_dim']
  ) -> Float[Array, 'batch height width 3']:
    """Returns pixels of unit vectors; they may lie outside of [0, 1]."""
    patches = self.project_patches(self.stack(self.project_codes(codes)))
    return vit_vqgan.from_patches(patches, self.config.patch_size, self.config.grid)


class EnhancingViTVQGAN(nn.Module):
  """An image tokenizer: encoder, quantizer and decoder.

  Attributes:
    config: sizes.
  """

  config: EnhancingViTVQGANConfig

  def setup(self):
    config = self.config
    self.encoder = PixelEncoder(config)
    self.quantizer = quantizer.VectorQuantizer(config.codebook_size, config.code_dim, 0.25)
    self.decoder = PixelDecoder(config)

  def __call__(
    self, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch height width 3']:
    """Returns the reconstructions of images in [0, 1]."""
    codes, _, _ = self.quantizer(self.encoder(images))
    return self.decoder(codes)

  def tokenize(self, images: Float[Array, 'batch height width 3']) -> Int[Array, 'batch tokens']:
    """Returns the tokens of images in [0, 1]."""
    return self.quantizer.nearest(self.encoder(images))

  def detokenize(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch height width 3']:
    """Returns images in [0, 1]."""
    return jnp.clip(self.decoder(self.quantizer.lookup(tokens)), 0.0, 1.0)


def example_inputs(
  config: EnhancingViTVQGANConfig, batch: int = 1
) -> tuple[Float[Array, 'batch height width 3']]:
  """Returns images of the size that the tokenizer takes, for initialization."""
  return (jnp.zeros((batch, config.image_size, config.image_size, 3), jnp.float32),)
