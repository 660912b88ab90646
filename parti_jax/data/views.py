"""Views of a picture, so that an example can have several sequences of image tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core import image_sizes
from parti_jax.data import captions
from parti_jax.data import examples
from parti_jax.data import image_decoding

# 1: the central square, or the central area of the size's shape. 2: also mirrored. 10: also LlamaGen's
# corner crops of an enlarged picture (arXiv 2406.06525), each of the five also mirrored.
COUNTS = (1, 2, 10)
# Sides of the enlarged picture, relative to those of a view.
_LARGER = 1.1


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Makes views of an example's picture, and cleans its caption.

  Attributes:
    image_size: height and width of a view in pixels; one number for squares.
    count: one of `COUNTS`; the views of a smaller count are the first views of a larger one.
    decode: decodes pictures.
  """

  image_size: image_sizes.ImageSize
  count: int = 1
  decode: examples.Decode = image_decoding.decode_and_note

  def __call__(self, example: Mapping[str, Any], draw: float) -> tuple[dict[str, Any], list[str]]:
    """Prepares an example, for use as `share.Reading.prepare`.

    Args:
      example: an example from a source of pictures.
      draw: ignored, since the views aren't random.

    Returns:
      'caption', a str that can hold several (see `captions.several`), and 'views', uint8 [count, height,
      width, 3]; and a short note for each loss.

    Raises:
      damage.Unusable: the example can't be used.
    """
    del draw
    picture, notes = self.decode(example['picture'], self.image_size)
    caption, changes = _clean(example['caption'])
    found = [picture]
    if self.count == 10:
      height, width = image_sizes.sides(self.image_size)
      size = image_sizes.of_sides(round(_LARGER * height), round(_LARGER * width))
      larger = self.decode(example['picture'], size)[0]
      found += [
        larger[top : top + height, left : left + width]
        for top in (0, larger.shape[0] - height)
        for left in (0, larger.shape[1] - width)
      ]
    if self.count > 1:
      found = [view for plain in found for view in (plain, plain[:, ::-1])]
    return {'caption': caption, 'views': np.stack(found)}, notes + changes


def _clean(data: bytes) -> tuple[str, list[str]]:
  """Cleans the caption, or each of several, which stay together."""
  found = captions.alternatives(data)
  if len(found) == 1:
    return captions.clean(found[0])
  texts, changes = zip(*map(captions.clean, found))
  return captions.several(texts).decode(), [change for some in changes for change in some]
