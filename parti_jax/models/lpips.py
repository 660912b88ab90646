"""LPIPS, the perceptual distance from VGG16's features (arXiv 1801.03924, version 0.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# Feature maps of VGG16's convolutions (arXiv 1409.1556, configuration D), by the stages that end
# where LPIPS looks: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Halvings before the last stage: smaller pictures have no features there.
LEAST_SIZE = 2 ** (len(VGG16) - 1)

# LPIPS' scaling layer, for pixels in [−1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
  """The convolutions of VGG16, with the outputs of the last one of each stage.

  Attributes:
    widths: feature maps of the convolutions of each stage.
    dtype: of the computation.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """x: [batch, height, width, 3], scaled. Returns a list of [batch, height', width', maps]."""
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
  """The distance of pictures: of their features, as unit vectors, weighted by a linear head each.

  Attributes:
    widths: as of VGG16Features; VGG16's own but for tests.
    dtype: of the convolutions.
  """

  widths: tuple[tuple[int, ...], ...] = VGG16
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, others):
    """How different pictures look.

    Args:
      images: float32 [batch, height, width, 3] in [0, 1], at least 16 high and wide.
      others: likewise.

    Returns:
      float32 [batch], 0 for equal pictures.
    """
    vgg16 = VGG16Features(self.widths, self.dtype, name='vgg16')
    # Not in one batch: a gradient by one side takes no backward pass of the other, and devices that
    # have a part of the batch each exchange nothing.
    total = 0.0
    for stage, pair in enumerate(zip(vgg16(_scaled(images)), vgg16(_scaled(others)))):
      ours, theirs = (_unit(features.astype(jnp.float32)) for features in pair)
      head = self.param(
        f'head_{stage}',
        nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
        (ours.shape[-1],),
      )
      total = total + jnp.mean(jnp.square(ours - theirs) @ head, axis=(1, 2))
    return total


def example_inputs():
  """Pictures of a shape that `LPIPS.__call__` takes, for initialisation."""
  image = jnp.zeros((1, LEAST_SIZE, LEAST_SIZE, 3), jnp.float32)
  return image, image


def abstract_params():
  """Shapes and dtypes of the parameters of `LPIPS`, without any files."""
  boxed = jax.eval_shape(LPIPS().init, jax.random.key(0), *example_inputs())
  return nn.meta.unbox(boxed['params'])


def _scaled(images):
  return (images * 2.0 - 1.0 - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)


def _unit(features):
  """Unit vectors along the channels; where all channels are 0 they stay 0, and so do gradients."""
  square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  return features * jax.lax.rsqrt(jnp.maximum(square, 1e-20))
