"""LPIPS, a perceptual distance of VGG16 features (arXiv 1801.03924, version 0.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PyTree

from parti_jax.models.nn import layers

# Feature maps of the convolutions of VGG16 (arXiv 1409.1556, configuration D), in stages that end
# with the outputs that LPIPS compares: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Minimum height and width of a picture, which is halved before each stage but the first.
LEAST_SIZE = 2 ** (len(VGG16) - 1)

# The scaling layer of LPIPS, for pixels in [−1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
  """The convolutions of VGG16.

  Attributes:
    widths: feature maps of the convolutions of each stage.
    dtype: dtype of the computation.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width 3']) -> list[Float[Array, 'batch _ _ _']]:
    """Returns the output of each stage's last convolution; x is the output of the scaling layer."""
    features = []
    for stage, widths in enumerate(self.widths):
      if stage:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for place, width in enumerate(widths):
        axes = (None, None, 'channels', 'embed')
        x = nn.relu(
          nn.Conv(
            width,
            (3, 3),
            padding=1,
            dtype=self.dtype,
            name=f'stage_{stage}_{place}',
            kernel_init=nn.with_logical_partitioning(nn.initializers.he_normal(), axes),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
          )(x)
        )
      features.append(x)
    return features


class LPIPS(nn.Module):
  """The distance of pictures: the distance of their normalized features, weighted by channel.

  Attributes:
    widths: feature maps of the convolutions of each stage.
    dtype: dtype of the convolutions.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    images: Float[Array, 'batch height width 3'],
    others: Float[Array, 'batch height width 3'],
  ) -> Float[Array, 'batch']:
    """Returns how different each pair of pictures looks, in float32; 0 for equal pictures.

    Args:
      images: pictures with values in [0, 1], at least 16 pixels high and wide.
      others: the pictures to compare them with.
    """
    vgg16 = VGG16Features(self.widths, self.dtype, name='vgg16')
    # Two passes instead of one over both: the gradient of one side needs no backward pass of the
    # other, and devices with different parts of the batch exchange nothing.
    total = jnp.float32(0.0)
    for stage, pair in enumerate(zip(vgg16(_scaled(images)), vgg16(_scaled(others)))):
      ours, theirs = (_unit(features.astype(jnp.float32)) for features in pair)
      head = layers.parameter(
        self, f'head_{stage}', nn.initializers.ones, ('norm',), (ours.shape[-1],)
      )
      total = total + jnp.mean(jnp.square(ours - theirs) @ head, axis=(1, 2))
    return total


def example_inputs() -> tuple[Float[Array, '1 height width 3'], Float[Array, '1 height width 3']]:
  """Returns pictures of the smallest size that `LPIPS` takes, for initialization."""
  image = jnp.zeros((1, LEAST_SIZE, LEAST_SIZE, 3), jnp.float32)
  return image, image


def abstract_params() -> PyTree:
  """Returns shapes and dtypes of the parameters of `LPIPS`."""
  boxed = jax.eval_shape(LPIPS().init, jax.random.key(0), *example_inputs())
  return nn.meta.unbox(boxed['params'])


def _scaled(images: Float[Array, 'batch height width 3']) -> Float[Array, 'batch height width 3']:
  return (images * 2.0 - 1.0 - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)


def _unit(
  features: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch height width channels']:
  """Normalizes along the channels. Where all channels are 0, results and gradients are 0."""
  square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  return features * jax.lax.rsqrt(jnp.maximum(square, 1e-20))
