"""The size of pictures: one number for squares, or a pair (height, width)."""

from __future__ import annotations

from parti_jax.core.errors import UserError

# Height and width in pixels. A pair has different numbers, since `checks.typed` turns others into
# one number; so equal sizes compare as equal.
ImageSize = int | tuple[int, int]


def sides(size: ImageSize) -> tuple[int, int]:
  """Returns height and width."""
  return size if isinstance(size, tuple) else (size, size)


def square(size: ImageSize, what: str, way_out: str = '') -> int:
  """Returns height and width of squares.

  Args:
    size: the size of pictures.
    what: begins the message: what is for squares only, and a verb, such as 'the judge takes'.
    way_out: ends the message.

  Raises:
    UserError: if the pictures are not square.
  """
  if isinstance(size, tuple):
    raise UserError(
      f'{what} square pictures only, none of {text(size)} pixels{"; " if way_out else ""}{way_out}'
    )
  return size


def of_sides(height: int, width: int) -> ImageSize:
  """Returns the size of pictures with this height and width."""
  return height if height == width else (height, width)


def text(size: ImageSize) -> str:
  """Returns a size for a message, to precede 'pixels': '64' for squares, else '32×64', height first."""
  return f'{size[0]}×{size[1]}' if isinstance(size, tuple) else f'{size}'


def times(size: ImageSize, factor: int) -> ImageSize:
  """Returns the size of pictures that are `factor` times as high and wide."""
  height, width = sides(size)
  return of_sides(height * factor, width * factor)


def central(width: int, height: int, size: ImageSize) -> tuple[int, int, int, int]:
  """Returns the largest area in the middle of a picture that has the shape of a size.

  Args:
    width: width of the picture, in pixels.
    height: height of the picture, in pixels.
    size: the size whose ratio of height to width is wanted.

  Returns:
    Left, top, right and bottom, as PIL's `crop` takes them. They are rounded to whole pixels.
  """
  high, wide = sides(size)
  if width * high > height * wide:
    kept = max(1, round(height * wide / high)), height
  else:
    kept = width, max(1, round(width * high / wide))
  left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
  return left, top, left + kept[0], top + kept[1]
