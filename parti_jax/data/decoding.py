"""Encoded pictures (jpeg, png, webp, gif) to square RGB arrays on white."""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

# What Pillow may try. It knows many more, of which some start other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF')
# 8192 × 8192. Pillow itself only warns up to 179 million, and then takes 700 MB.
MAX_PIXELS = 2**26
MAX_BYTES = 2**26
# Each scan of a progressive JPEG goes over all pixels; encoders write about ten.
_MAX_SCANS = 100
# What libjpeg warns of where the pixels are right all the same.
_HARMLESS = ('Invalid SOS parameters', 'Unknown Adobe color transform code',
             'Warning: unknown JFIF revision')
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodablePicture(Exception):
  """The bytes are no picture that can be used; the message is the reason in a few words."""


def decode(data: bytes, size: int) -> np.ndarray:
  """Decodes a picture, crops its central square and resizes it with antialiasing.

  Transparent parts become white; of an animation the first frame is taken; a photograph is turned
  as its EXIF orientation says, where that can be read. Of 16 bits the upper 8 are taken, and colour
  profiles are not applied.

  Args:
    data: the encoded picture.
    size: height and width of the result in pixels.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    UndecodablePicture: there is no picture, it is one pixel high or wide, it is damaged, if only in
      part, or it has more than `MAX_BYTES` bytes or `MAX_PIXELS` pixels.
  """
  if not data:
    raise UndecodablePicture('no picture')
  if len(data) > MAX_BYTES:
    raise UndecodablePicture('picture of too many bytes')
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image)
    image = _loaded(image, data, size)
    return np.asarray(_resized(_on_white(_central_square(image)), size))
  except UndecodablePicture:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise UndecodablePicture('picture of too many pixels') from error
  except UnidentifiedImageError as error:
    raise UndecodablePicture('unknown picture format') from error
  except Exception as error:
    # Damaged files make the decoders raise nearly anything.
    raise UndecodablePicture('damaged picture') from error


def _check_size(image: Image.Image) -> None:
  """Looks at the size that the header says, before anything is decoded."""
  if image.width * image.height > MAX_PIXELS:
    raise UndecodablePicture('picture of too many pixels')
  if min(image.size) < 1:
    raise UndecodablePicture('damaged picture')
  if min(image.size) == 1:
    raise UndecodablePicture('picture one pixel high or wide')


def _loaded(image: Image.Image, data: bytes, size: int) -> Image.Image:
  """Returns the picture decoded and upright."""
  opened = image
  if image.format == 'GIF' or image.format == 'WEBP':
    image.load()
  elif image.format == 'PNG':
    _load_png(image, data)
  else:  # Of several JPEGs in one file the format is MPO.
    image = _decode_jpeg(data, size)
  turn = _ORIENTATIONS.get(_orientation(opened))
  return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image):
  """Returns the EXIF orientation, 1 where there is none that can be read."""
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) else 1
  except Exception:  # As above, for EXIF.
    return 1


def _decode_jpeg(data: bytes, size: int) -> Image.Image:
  """Decodes a JPEG at a fraction of its size, at least 2·size, which is several times faster.

  Pillow ignores libjpeg's warnings, and so fills what is missing or unreadable with grey.
  """
  if data.count(b'\xff\xda') > _MAX_SCANS:
    raise UndecodablePicture('picture of too many scans')
  _, _, colors, _ = simplejpeg.decode_jpeg_header(data, strict=False)
  mode = 'CMYK' if colors in ('CMYK', 'YCCK') else 'RGB'
  arguments = {'colorspace': mode, 'min_height': 2 * size, 'min_width': 2 * size}
  try:
    pixels = simplejpeg.decode_jpeg(data, **arguments)
  except ValueError as error:
    if not str(error).startswith(_HARMLESS):
      raise
    pixels = simplejpeg.decode_jpeg(data, **arguments, strict=False)
  if mode == 'CMYK':
    # Adobe's programs, from which nearly all of these come, write the inks inverted.
    pixels = 255 - pixels
  return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels))


def _load_png(image: ImageFile.ImageFile, data: bytes) -> None:
  """Decodes a PNG of which no part is missing or changed, which Pillow does not always see."""
  _check_checksums(data)
  sixteen_bits = image.tile and str(image.tile[0][3]).endswith('16B')
  interlaced = image.info.get('interlace')
  image.load()
  if image.mode == 'RGB' and sixteen_bits and 'transparency' in image.info:
    image.info['transparency'] = tuple(value >> 8 for value in image.info['transparency'])
  # Rows that were not there stay black.
  last = image.crop((0, image.height - 1, *image.size))
  if interlaced or last.getbbox(alpha_only=False) is None:
    _check_pixels(data)


def _chunks(data: bytes):
  """Yields kind, start and end of each chunk's content in a PNG."""
  position = 8
  while position + 12 <= len(data):
    length, kind = struct.unpack_from('>I4s', data, position)
    yield kind, position + 8, position + 8 + length
    position += 12 + length


def _check_checksums(data: bytes) -> None:
  kind = b''
  for kind, start, end in _chunks(data):
    if zlib.crc32(memoryview(data)[start - 4:end]) != int.from_bytes(data[end:end + 4]):
      raise UndecodablePicture('damaged picture')
    if kind == b'IEND':
      return
  raise UndecodablePicture('damaged picture')


def _check_pixels(data: bytes) -> None:
  """Compares the number of bytes of pixels with the header's size."""
  width, height, depth, color, _, _, interlaced = struct.unpack_from('>IIBBBBB', data, 16)
  bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
  # Adam7: first column and row of each pass, and the steps between its columns and rows.
  passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
            (0, 1, 1, 2)) if interlaced else ((0, 0, 1, 1),)
  missing = 0
  for left, top, across, down in passes:
    columns, rows = -(-(width - left) // across), -(-(height - top) // down)
    if columns > 0:
      missing += max(rows, 0) * (1 + (columns * bits + 7) // 8)
  unpacking = zlib.decompressobj()
  for kind, start, end in _chunks(data):
    if kind == b'IDAT':
      packed = data[start:end]
      while packed and missing > 0:
        missing -= len(unpacking.decompress(packed, 2**20))
        packed = unpacking.unconsumed_tail
  if missing > 0:
    raise UndecodablePicture('damaged picture')


def _central_square(image: Image.Image) -> Image.Image:
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  # `resize` has a crop of its own, but lets pixels outside of it bleed in.
  return image.crop((left, top, left + side, top + side))


def _on_white(image: Image.Image) -> Image.Image:
  """Returns the picture in RGB, its transparent parts white."""
  if image.mode.startswith('I'):
    # Pillow would clip 16-bit greys at 255 instead of scaling them.
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get('transparency', -1)] = 255
    return Image.fromarray(grey).convert('RGB')
  if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')


def _resized(image: Image.Image, size: int) -> Image.Image:
  if image.size == (size, size):
    return image
  return image.resize((size, size), Image.Resampling.BICUBIC)
