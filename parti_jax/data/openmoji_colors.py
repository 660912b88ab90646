"""The main color of an OpenMoji picture, as people call it.

This module doesn't import TensorFlow.
"""

import functools

import numpy as np

from parti_jax.data import openmoji

# Name -> colors of OpenMoji's palette, in RGB. Black and white are left out: outlines and grounds.
_PALETTE = {
  'red': ((234, 90, 71), (210, 47, 39)),
  'orange': ((226, 112, 34),),
  'yellow': ((252, 234, 43), (241, 179, 28)),
  'green': ((177, 204, 51), (92, 158, 49)),
  'blue': ((146, 211, 245), (97, 178, 228)),
  'violet': ((179, 153, 200), (137, 103, 170)),
  'pink': ((255, 167, 192), (230, 122, 148)),
  'brown': ((165, 121, 57), (106, 70, 47)),
  'gray': ((208, 207, 206), (155, 155, 154), (63, 63, 63)),
}
COLORS = tuple(_PALETTE)
_SIZE = 64
# How far a channel of a pixel may be from the palette; edges of outlines are further.
_MOST_DISTANCE = 4
# A main color covers this share of what is painted, and this share of the picture.
_LEAST_OF_PAINTED = 0.6
_LEAST_OF_ALL = 0.05


@functools.cache
def main_color(code: str) -> str:
  """Returns the color that most of a picture has.

  Args:
    code: the picture's code.

  Returns:
    One of `COLORS`; '' where no color covers most of what is painted.

  Raises:
    UserError: as `openmoji.render`.
  """
  pixels = openmoji.render(code, _SIZE).reshape(-1, 1, 3).astype(np.int32)
  counts = {
    name: int((np.abs(pixels - np.array(colors)).max(-1) <= _MOST_DISTANCE).any(-1).sum())
    for name, colors in _PALETTE.items()
  }
  best = max(counts, key=counts.__getitem__)
  least = max(_LEAST_OF_PAINTED * sum(counts.values()), _LEAST_OF_ALL * _SIZE**2)
  return best if counts[best] >= least else ''
