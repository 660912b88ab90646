"""Several views of a picture, for more than one sequence of image tokens of an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.data import captions
from parti_jax.data import examples
from parti_jax.data import image_decoding

# 1: the central square. 2: mirrored too. 10: LlamaGen's corners of a larger picture as well
# (arXiv 2406.06525), each of the five also mirrored.
COUNTS = (1, 2, 10)
# The side of the picture whose corners are cut, over that of a view.
_LARGER = 1.1


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Makes views of an example's picture, and cleans its caption.

  Attributes:
    image_size: height and width of a view in pixels.
    count: one of `COUNTS`; the views of a smaller count are the first ones of a larger.
    decode: decodes pictures.
  """

  image_size: int
  count: int = 1
  decode: examples.Decode = image_decoding.decode_and_note

  def __call__(self, example: Mapping[str, Any], draw: float) -> tuple[dict[str, Any], list[str]]:
    """Prepares an example, as `share.Reading.prepare` does.

    Args:
      example: of a source of pictures.
      draw: not used: nothing here is random.

    Returns:
      'caption', a str, and 'views', uint8 [count, image_size, image_size, 3]; and in a few words
      each thing that was lost.

    Raises:
      damage.Unusable: the example can't be used.
    """
    del draw
    size = self.image_size
    picture, notes = self.decode(example['picture'], size)
    caption, changes = captions.clean(example['caption'])
    found = [picture]
    if self.count == 10:
      side = round(_LARGER * size)
      larger = self.decode(example['picture'], side)[0]
      end = side - size
      found += [
        larger[top : top + size, left : left + size] for top in (0, end) for left in (0, end)
      ]
    if self.count > 1:
      found = [view for plain in found for view in (plain, plain[:, ::-1])]
    return {'caption': caption, 'views': np.stack(found)}, notes + changes
