"""LPIPS, a perceptual distance of features of VGG16 or AlexNet (arXiv 1801.03924, version 0.1)."""

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

# The convolutions of AlexNet in torchvision (arXiv 1404.5997): feature maps, side of the kernel,
# stride and padding. LPIPS compares the outputs of all.
ALEXNET = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
# The convolutions after a maximum over 3 × 3 with a stride of 2.
_AFTER_POOL = (1, 2)
# Minimum height and width of a picture, from which both pools leave a pixel.
ALEXNET_LEAST_SIZE = 31
# Networks whose features LPIPS compares; the names of their parameters.
NETWORKS = ('vgg16', 'alexnet')

# The scaling layer of LPIPS, for pixels in [−1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
  """The convolutions of VGG16.

  Attributes:
    widths: feature maps of the convolutions of each stage.
    dtype: dtype of the computation.
    precision: precision of products; None for the default of the device.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width 3']) -> list[Float[Array, 'batch _ _ _']]:
    """Returns the output of each stage's last convolution; x is the output of the scaling layer."""
    features = []
    for stage, widths in enumerate(self.widths):
      if stage:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for place, width in enumerate(widths):
        name = f'stage_{stage}_{place}'
        x = nn.relu(_convolution(width, 3, 1, 1, self.dtype, self.precision, name)(x))
      features.append(x)
    return features


class AlexNetFeatures(nn.Module):
  """The convolutions of AlexNet.

  Attributes:
    dtype: dtype of the computation.
    precision: precision of products; None for the default of the device.
  """

  dtype: jnp.dtype = jnp.float32
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width 3']) -> list[Float[Array, 'batch _ _ _']]:
    """Returns the output of each convolution; x is the output of the scaling layer."""
    features = []
    for place, sizes in enumerate(ALEXNET):
      if place in _AFTER_POOL:
        x = nn.max_pool(x, (3, 3), (2, 2))
      x = nn.relu(_convolution(*sizes, self.dtype, self.precision, f'convolution_{place}')(x))
      features.append(x)
    return features


def _convolution(
  width: int,
  kernel: int,
  stride: int,
  padding: int,
  dtype: jnp.dtype,
  precision: jax.lax.Precision | None,
  name: str,
) -> nn.Conv:
  axes = (None, None, 'channels', 'embed')
  return nn.Conv(
    width,
    (kernel, kernel),
    strides=stride,
    padding=padding,
    dtype=dtype,
    precision=precision,
    name=name,
    kernel_init=nn.with_logical_partitioning(nn.initializers.he_normal(), axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
  )


class LPIPS(nn.Module):
  """The distance of pictures: the distance of their normalized features, weighted by channel.

  Attributes:
    widths: feature maps of the convolutions of each stage of VGG16.
    dtype: dtype of the convolutions.
    network: whose features are compared, one of NETWORKS.
    precision: precision of the convolutions; None for the default of the device.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32
  network: str = 'vgg16'
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(
    self,
    images: Float[Array, 'batch height width 3'],
    others: Float[Array, 'batch height width 3'],
  ) -> Float[Array, 'batch']:
    """Returns how different each pair of pictures looks, in float32; 0 for equal pictures.

    Args:
      images: pictures with values in [0, 1], at least 16 pixels high and wide, or 31 for AlexNet.
      others: the pictures to compare them with.
    """
    features: nn.Module
    if self.network == 'alexnet':
      features = AlexNetFeatures(self.dtype, self.precision, name='alexnet')
    else:
      features = VGG16Features(self.widths, self.dtype, self.precision, name='vgg16')
    # Two passes instead of one over both: the gradient of one side needs no backward pass of the
    # other, and devices with different parts of the batch exchange nothing.
    total = jnp.float32(0.0)
    for stage, pair in enumerate(zip(features(_scaled(images)), features(_scaled(others)))):
      ours, theirs = (_unit(maps.astype(jnp.float32)) for maps in pair)
      head = layers.parameter(
        self, f'head_{stage}', nn.initializers.ones, ('norm',), (ours.shape[-1],)
      )
      weighted = jnp.matmul(jnp.square(ours - theirs), head, precision=self.precision)
      total = total + jnp.mean(weighted, axis=(1, 2))
    return total


def least_size(network: str) -> int:
  """Returns the minimum height and width of a picture for one of NETWORKS."""
  return ALEXNET_LEAST_SIZE if network == 'alexnet' else LEAST_SIZE


def example_inputs(
  network: str = 'vgg16',
) -> tuple[Float[Array, '1 height width 3'], Float[Array, '1 height width 3']]:
  """Returns pictures of the smallest size that `LPIPS` takes, for initialization."""
  image = jnp.zeros((1, least_size(network), least_size(network), 3), jnp.float32)
  return image, image


def abstract_params(network: str = 'vgg16') -> PyTree:
  """Returns shapes and dtypes of the parameters of `LPIPS`."""
  init = LPIPS(network=network).init
  boxed = jax.eval_shape(init, jax.random.key(0), *example_inputs(network))
  return nn.meta.unbox(boxed['params'])


def _scaled(images: Float[Array, 'batch height width 3']) -> Float[Array, 'batch height width 3']:
  return (images * 2.0 - 1.0 - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)


def _unit(
  features: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch height width channels']:
  """Normalizes along the channels. Where all channels are 0, results and gradients are 0."""
  square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  return features * jax.lax.rsqrt(jnp.maximum(square, 1e-20))
