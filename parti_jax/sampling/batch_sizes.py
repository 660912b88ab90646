"""How many pictures are sampled at once, and how many fit into memory."""

from __future__ import annotations

import math
import os

import jax

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.models import generators
from parti_jax.sampling import placement

# Maximum number of images in a batch. A larger batch isn't faster on a CPU.
_MOST_AT_ONCE = {'cpu': 32}
_MOST_AT_ONCE_ELSEWHERE = 64
# Maximum size of the caches of a batch, in bytes; the tighter bound for large models.
_MOST_CACHE_BYTES = 1 << 30


def batch_size(
  config: generators.Config,
  place: placement.Placement,
  cache: str,
  total: int,
  asked: int | None,
  guided: bool,
) -> int:
  """Returns the number of pictures to sample at once.

  Args:
    config: sizes of the generator.
    place: the devices.
    cache: how sampling holds keys and values, a name in `sampling_settings.CACHES`.
    total: number of pictures to sample.
    asked: the number that the user asks for; None to choose it.
    guided: whether sampling has guidance's pass without text.

  Raises:
    UserError: if `asked` is not a positive number.
  """
  if asked is not None:
    return place.divisible(min(checks.count('batch_size', asked), total))
  cache_bytes = (
    2
    * config.decoder_layers
    * config.image_length
    * config.cached_heads
    * config.head_dim
    * (1 if cache == 'int8' else config.compute_dtype.itemsize)
    * (2 if guided else 1)
  )
  most = _MOST_AT_ONCE.get(jax.default_backend(), _MOST_AT_ONCE_ELSEWHERE)
  most = max(1, min(most, _MOST_CACHE_BYTES // cache_bytes))
  pieces = -(-total // most)
  even = -(-total // pieces)
  # Few different sizes, since each is compiled separately.
  return place.divisible(even if even <= 4 else min(most, -(-even // 4) * 4))


def check_room(config: generators.Config, image_size: image_sizes.ImageSize, total: int) -> None:
  """Raises UserError if so many pictures don't fit into memory.

  Args:
    config: sizes of the generator.
    image_size: height and width of the pictures, in pixels; one number for squares.
    total: number of pictures.
  """
  pixels = math.prod(image_sizes.sides(image_size))
  if total * (4 * config.image_length + 3 * pixels) > _memory():
    raise UserError(
      f'{total:,} pictures do not fit into memory; choose a smaller num_images, or fewer '
      'prompts at once'
    )


def _memory() -> float:
  """Returns the size of the machine's memory in bytes; infinity if it is unknown."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):
    return float('inf')
