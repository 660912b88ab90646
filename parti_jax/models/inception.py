"""Inception v3 of 2015-12-05, over whose features the FID, sFID and inception score are defined.

The network of "Rethinking the Inception Architecture" (arXiv 1512.00567) in the version that
TensorFlow published on 2015-12-05, with 1,008 classes. It differs from later versions in its pools:
averages leave the padding out, and the last block has a maximum instead. It resizes pictures itself,
as TensorFlow 1 did: bilinearly, with corners of pixels at whole numbers and without antialiasing.
Module names are those of the published torch file, in lower case
(`parti_jax.importers.inception_file`).
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import PyTree
from jaxtyping import UInt8

# Height and width to which pictures are resized.
SIZE = 299
CLASSES = 1008
# Feature maps of `mixed_6d` that sFID compares: the first ones of its first branch (ADM, arXiv
# 2105.05233; Nash et al. 2021, arXiv 2103.03841).
SPATIAL = 7
_EPSILON = 1e-3


class Outputs(NamedTuple):
  """What the network computes of pictures.

  Attributes:
    pool: the last feature maps, averaged over positions; for the FID.
    spatial: SPATIAL feature maps of mixed_6d in the order row, column, map; for sFID.
    logits: logits without biases, as the inception score is defined.
  """

  pool: Float[Array, 'batch dim']
  spatial: Float[Array, 'batch spatial']
  logits: Float[Array, 'batch classes']


class _Convolution(nn.Module):
  """A convolution without biases, batch normalization by fixed statistics, and a ReLU.

  Attributes:
    features: number of feature maps.
    kernel: height and width of the kernel.
    stride: step in pixels.
    padded: whether there is padding, so that a stride of 1 keeps the size.
  """

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padded: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width maps']) -> Float[Array, 'batch _ _ _']:
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape, jnp.float32)

    def vector(name: str, initializer: nn.initializers.Initializer) -> Float[Array, 'features']:
      return self.param(name, initializer, (self.features,), jnp.float32)

    variance = vector('variance', nn.initializers.ones)
    scale = vector('scale', nn.initializers.ones) * jax.lax.rsqrt(variance + _EPSILON)
    shift = vector('bias', nn.initializers.zeros) - vector('mean', nn.initializers.zeros) * scale
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      'SAME' if self.padded else 'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )
    return nn.relu(x * scale + shift)


class _Layer(NamedTuple):
  """A convolution of a branch: its name, its feature maps, and height and width of its kernel."""

  name: str
  width: int
  kernel: tuple[int, int]


# The layers of a branch. Two of them in a tuple follow the same one, and their results are
# concatenated.
_Branch = tuple[_Layer | tuple[_Layer, _Layer], ...]

_1x1, _1x3, _3x1, _3x3, _5x5, _1x7, _7x1 = (1, 1), (1, 3), (3, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_35(pool: int) -> tuple[_Branch, ...]:
  return (
    (_Layer('branch1x1', 64, _1x1),),
    (_Layer('branch5x5_1', 48, _1x1), _Layer('branch5x5_2', 64, _5x5)),
    (
      _Layer('branch3x3dbl_1', 64, _1x1),
      _Layer('branch3x3dbl_2', 96, _3x3),
      _Layer('branch3x3dbl_3', 96, _3x3),
    ),
    (_Layer('branch_pool', pool, _1x1),),
  )


def _block_17(width: int) -> tuple[_Branch, ...]:
  return (
    (_Layer('branch1x1', 192, _1x1),),
    (
      _Layer('branch7x7_1', width, _1x1),
      _Layer('branch7x7_2', width, _1x7),
      _Layer('branch7x7_3', 192, _7x1),
    ),
    (
      _Layer('branch7x7dbl_1', width, _1x1),
      _Layer('branch7x7dbl_2', width, _7x1),
      _Layer('branch7x7dbl_3', width, _1x7),
      _Layer('branch7x7dbl_4', width, _7x1),
      _Layer('branch7x7dbl_5', 192, _1x7),
    ),
    (_Layer('branch_pool', 192, _1x1),),
  )


_BLOCK_8: tuple[_Branch, ...] = (
  (_Layer('branch1x1', 320, _1x1),),
  (
    _Layer('branch3x3_1', 384, _1x1),
    (_Layer('branch3x3_2a', 384, _1x3), _Layer('branch3x3_2b', 384, _3x1)),
  ),
  (
    _Layer('branch3x3dbl_1', 448, _1x1),
    _Layer('branch3x3dbl_2', 384, _3x3),
    (_Layer('branch3x3dbl_3a', 384, _1x3), _Layer('branch3x3dbl_3b', 384, _3x1)),
  ),
  (_Layer('branch_pool', 192, _1x1),),
)
# Blocks that halve the size: the last layer of each branch has a stride of 2, and one more branch is
# a pool without a convolution.
_HALVES_35: tuple[_Branch, ...] = (
  (_Layer('branch3x3', 384, _3x3),),
  (
    _Layer('branch3x3dbl_1', 64, _1x1),
    _Layer('branch3x3dbl_2', 96, _3x3),
    _Layer('branch3x3dbl_3', 96, _3x3),
  ),
)
_HALVES_17: tuple[_Branch, ...] = (
  (_Layer('branch3x3_1', 192, _1x1), _Layer('branch3x3_2', 320, _3x3)),
  (
    _Layer('branch7x7x3_1', 192, _1x1),
    _Layer('branch7x7x3_2', 192, _1x7),
    _Layer('branch7x7x3_3', 192, _7x1),
    _Layer('branch7x7x3_4', 192, _3x3),
  ),
)


class _Block(nn.Module):
  """Branches, whose results are concatenated.

  Attributes:
    branches: layers of the branches. Before the last one is a pool of 3 × 3.
    pool: 'average', 'maximum' or, for a block that halves the size, 'halving'.
    divisor: as in `Inception`.
  """

  branches: tuple[_Branch, ...]
  pool: str = 'average'
  divisor: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, 'batch height width maps']) -> Float[Array, 'batch _ _ _']:
    halving = self.pool == 'halving'
    found = []
    for number, branch in enumerate(self.branches, 1):
      part = x if halving or number < len(self.branches) else _pooled(x, self.pool)
      for place, layer in enumerate(branch, 1):
        stride = 2 if halving and place == len(branch) else 1
        parts = [
          _Convolution(
            convolution.width // self.divisor,
            convolution.kernel,
            stride,
            stride == 1,
            name=convolution.name,
          )(part)
          for convolution in ((layer,) if isinstance(layer, _Layer) else layer)
        ]
        part = jnp.concatenate(parts, axis=-1)
      found.append(part)
    if halving:
      found.append(_halved(x))
    return jnp.concatenate(found, axis=-1)


def _pooled(x: Float[Array, 'batch height width maps'], pool: str) -> Array:
  if pool == 'maximum':
    return nn.max_pool(x, (3, 3), (1, 1), 'SAME')
  return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _halved(x: Float[Array, 'batch height width maps']) -> Array:
  return nn.max_pool(x, (3, 3), (2, 2))


class Inception(nn.Module):
  """Inception v3 of 2015-12-05, in float32 with products of full precision.

  Attributes:
    size: height and width to which pictures are resized; at least 75.
    divisor: divides the numbers of feature maps, for small networks in tests.
  """

  size: int = SIZE
  divisor: int = 1

  @nn.compact
  def __call__(
    self, images: UInt8[Array, 'batch height width 3'] | Float32[Array, 'batch height width 3']
  ) -> Outputs:
    """Returns the features of pictures of any size, with values from 0 to 255."""

    def convolution(name: str, width: int, kernel: int, stride: int = 1, padded: bool = False):
      return _Convolution(
        width // self.divisor, (kernel, kernel), stride, padded, name=f'conv2d_{name}'
      )

    def block(name: str, branches: tuple[_Branch, ...], pool: str = 'average') -> _Block:
      return _Block(branches, pool, self.divisor, name=f'mixed_{name}')

    x = (resized(images.astype(jnp.float32), self.size) - 128.0) / 128.0
    x = convolution('1a_3x3', 32, 3, stride=2)(x)
    x = convolution('2a_3x3', 32, 3)(x)
    x = convolution('2b_3x3', 64, 3, padded=True)(x)
    x = _halved(x)
    x = convolution('3b_1x1', 80, 1)(x)
    x = convolution('4a_3x3', 192, 3)(x)
    x = _halved(x)
    x = block('5b', _block_35(pool=32))(x)
    x = block('5c', _block_35(pool=64))(x)
    x = block('5d', _block_35(pool=64))(x)
    x = block('6a', _HALVES_35, 'halving')(x)
    x = block('6b', _block_17(width=128))(x)
    x = block('6c', _block_17(width=160))(x)
    x = block('6d', _block_17(width=160))(x)
    # The first branch of mixed_6d comes first.
    spatial = x[..., :SPATIAL].reshape(len(x), -1)
    x = block('6e', _block_17(width=192))(x)
    x = block('7a', _HALVES_17, 'halving')(x)
    x = block('7b', _BLOCK_8)(x)
    x = block('7c', _BLOCK_8, 'maximum')(x)
    pool = jnp.mean(x, axis=(1, 2))
    kernel = self.param(
      'classes', nn.initializers.lecun_normal(), (pool.shape[-1], CLASSES), jnp.float32
    )
    return Outputs(pool, spatial, jnp.dot(pool, kernel, precision=jax.lax.Precision.HIGHEST))


def resized(
  images: Float[Array, 'batch height width 3'], size: int
) -> Float[Array, 'batch {size} {size} 3']:
  """Resizes as TensorFlow 1's `resize_bilinear` with align_corners=False.

  The pixel at i takes its values from around i · (old size / new size), without the half pixels by
  which later libraries shift both grids, and without antialiasing. Pictures that already have the
  size stay as they are.
  """
  rows, columns = (_neighbors(old, size) for old in images.shape[1:3])
  lower, upper, weight = rows
  above, below = images[:, lower], images[:, upper]
  left_of, right_of, across = columns
  across, down = across[:, None], weight[:, None, None]

  def mixed(line):
    left = line[:, :, left_of]
    return left + (line[:, :, right_of] - left) * across

  top = mixed(above)
  return top + (mixed(below) - top) * down


def _neighbors(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the indices of both neighbors of each new position, and the weight of the second."""
  positions = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
  lower = np.floor(positions).astype(np.int32)
  return lower, np.minimum(lower + 1, old - 1), positions - lower


# The network whose weights are published.
PUBLISHED = Inception()


def abstract_params(module: Inception = PUBLISHED) -> PyTree:
  """Returns shapes and dtypes of the parameters."""
  images = jax.ShapeDtypeStruct((1, module.size, module.size, 3), jnp.uint8)
  return jax.eval_shape(module.init, jax.random.key(0), images)['params']
