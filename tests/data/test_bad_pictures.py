"""Unusual and damaged pictures: decoded with the right colors, or rejected with a reason."""

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL import ImageFile

from parti_jax.data import image_decoding
from parti_jax.data.image_decoding import decode
from parti_jax.data.image_decoding import UndecodablePicture

WHITE = (255, 255, 255)


def _encode(image, image_format, **kwargs):
  data = io.BytesIO()
  image.save(data, image_format, **kwargs)
  return data.getvalue()


def _blurred(width=64, height=64, mode='RGB'):
  """A picture of smooth noise, which needs many bytes."""
  noise = np.random.default_rng(0).integers(0, 256, [8, 8, 3], np.uint8)
  return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def _chunk(kind, content):
  return (
    struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
  )


def _png(width, height, depth, color, rows, extra=b'', interlaced=0):
  header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, interlaced)
  return (
    b'\x89PNG\r\n\x1a\n'
    + _chunk(b'IHDR', header)
    + extra
    + _chunk(b'IDAT', zlib.compress(rows))
    + _chunk(b'IEND', b'')
  )


def _png_16_bits(color, values, extra=b''):
  """A PNG of 4×4 equal pixels with 16 bits per channel."""
  pixel = struct.pack(f'>{len(values)}H', *values)
  return _png(4, 4, 16, color, (b'\0' + pixel * 4) * 4, extra)


def _assert_color(data, color, within=2):
  image = decode(data, 4).astype(int)
  assert np.abs(image - color).max() <= within, image[0, 0]


def _assert_refused(data, reason, size=8):
  with pytest.raises(UndecodablePicture, match=f'^{reason}$'):
    decode(data, size)


@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize(
  'mode, color',
  [
    ('RGB', (200, 30, 60)),
    ('L', 77),
    ('CMYK', (10, 200, 30, 40)),
    ('CMYK', (0, 0, 0, 0)),
    ('CMYK', (0, 0, 0, 255)),
  ],
)
def test_jpeg_colors(mode, color, progressive):
  picture = Image.new(mode, (16, 16), color)
  data = _encode(picture, 'jpeg', quality=100, progressive=progressive)
  _assert_color(data, picture.convert('RGB').getpixel((0, 0)))


def test_ycck_jpeg():
  # The bytes written as C, M, Y, K are read as Y, Cb, Cr, K if Adobe's marker says so.
  data = bytearray(_encode(Image.new('CMYK', (16, 16), (55, 127, 127, 55)), 'jpeg', quality=100))
  marker = data.index(b'Adobe')
  assert data[marker + 11] == 0
  data[marker + 11] = 2
  # Written inverted: Y = 200, Cb = Cr = 128 are inverses of inks of 55; Adobe's are inverted again.
  _assert_color(bytes(data), [(255 - 200) * (255 - 55) // 255] * 3)


def test_pixels_of_a_jpeg_are_pillows():
  data = _encode(_blurred(30, 20), 'jpeg', quality=90)
  expected = np.asarray(Image.open(io.BytesIO(data)).crop((5, 0, 25, 20)))
  np.testing.assert_array_equal(decode(data, 20), expected)


@pytest.mark.parametrize(
  'image_format, arguments',
  [
    ('jpeg', {}),
    ('jpeg', {'progressive': True}),
    ('png', {}),
    ('gif', {}),
    ('webp', {'lossless': True}),
    ('webp', {}),
  ],
)
def test_all_truncations_are_refused(image_format, arguments):
  data = _encode(_blurred(), image_format, **arguments)
  decode(data, 64)
  for length in [*range(1, 60, 7), *range(60, len(data) - 9, len(data) // 40)]:
    with pytest.raises(UndecodablePicture):
      decode(data[:length], 64)


@pytest.mark.parametrize('progressive', [False, True])
def test_missing_parts_of_a_jpeg_are_not_filled_with_grey(progressive):
  data = _encode(_blurred(), 'jpeg', progressive=progressive)
  # In the middle of a scan: omitting whole scans of a progressive JPEG is allowed.
  ended = data[: (data.rindex(b'\xff\xda') + len(data)) // 2] + b'\xff\xd9'
  Image.open(io.BytesIO(ended)).load()  # Pillow accepts it.
  _assert_refused(ended, 'damaged picture')


def test_damaged_huffman_data():
  """Damage that happens to decode to as many pixels can't be detected."""
  data, refused = bytearray(_encode(_blurred(), 'jpeg')), 0
  start = data.index(b'\xff\xda') + 20
  for place in range(start, len(data) - 2, 16):
    # 16 ones in a row aren't a valid code.
    damaged = data[:place] + b'\xff\x00\xff\x00' + data[place + 4 :]
    try:
      decode(bytes(damaged), 64)
    except UndecodablePicture:
      refused += 1
  assert refused > 0.5 * len(range(start, len(data) - 2, 16))


def test_a_harmless_warning_is_ignored():
  data = bytearray(_encode(_blurred(), 'jpeg'))
  expected = decode(bytes(data), 64)
  scan = data.index(b'\xff\xda')
  # The end of the spectrum, which some cameras write incorrectly.
  assert data[scan + 12] == 63
  data[scan + 12] = 0
  np.testing.assert_array_equal(decode(bytes(data), 64), expected)


def test_jpeg_of_too_many_scans():
  data = _encode(_blurred(), 'jpeg', progressive=True)
  scan = data.rindex(b'\xff\xda')
  _assert_refused(data[:scan] + data[scan:-2] * 100 + b'\xff\xd9', 'picture of too many scans')


@pytest.mark.parametrize('kind', ['flipped', 'checksum', 'no end'])
def test_png_checksums(kind):
  data = bytearray(_encode(_blurred(), 'png', compress_level=0))
  pixels, end = data.index(b'IDAT') + 200, len(data) - 12
  if kind == 'flipped':
    data[pixels] ^= 1
  elif kind == 'checksum':
    data[end - 1] ^= 1
  _assert_refused(bytes(data[:end] if kind == 'no end' else data), 'damaged picture')


def test_png_of_too_few_rows():
  row = b'\0' + bytes([200] * 24)
  _assert_color(_png(8, 8, 8, 2, row * 8), (200, 200, 200))
  short = _png(8, 8, 8, 2, row * 5)
  Image.open(io.BytesIO(short)).load()  # Pillow accepts it: the last rows are black.
  _assert_refused(short, 'damaged picture')
  decode(_png(8, 8, 8, 2, row * 7 + b'\0' + bytes(24)), 8)  # The last row is black but present.


@pytest.mark.parametrize('depth, color, bits', [(8, 2, 24), (1, 0, 1), (16, 6, 64), (4, 3, 4)])
def test_interlaced_png(depth, color, bits):
  """Adam7, 5×3 pixels."""
  counts = [(1, 1), (1, 1), (0, 0), (1, 1), (3, 1), (2, 2), (5, 1)]
  rows = b''.join(
    (b'\0' + b'\xff' * ((columns * bits + 7) // 8)) * lines for columns, lines in counts
  )
  palette = _chunk(b'PLTE', b'\xff' * 48) if color == 3 else b''
  _assert_color(_png(5, 3, depth, color, rows, palette, 1), WHITE, 0)
  _assert_refused(_png(5, 3, depth, color, rows[:-1], palette, 1), 'damaged picture')


def test_16_bits():
  _assert_color(_png_16_bits(0, [0x4000]), (64, 64, 64), 0)
  _assert_color(_png_16_bits(2, [0x8000, 0x4000, 0xFFFF]), (128, 64, 255), 0)
  _assert_color(_png_16_bits(6, [0xFFFF, 0, 0, 0x8000]), (255, 127, 127), 1)
  _assert_color(_png_16_bits(4, [0, 0x8000]), (127, 127, 127), 1)


@pytest.mark.parametrize('color, values', [(0, [0x80FF]), (2, [0x80FF, 0x4000, 0xFFFF])])
def test_16_bits_with_a_transparent_color(color, values):
  transparent = _chunk(b'tRNS', struct.pack(f'>{len(values)}H', *values))
  _assert_color(_png_16_bits(color, values, transparent), WHITE, 0)


def test_palettes():
  palette = Image.new('RGB', (8, 8), 'red').quantize(2)
  index = palette.getpixel((0, 0))
  for image_format in ('png', 'gif'):
    _assert_color(_encode(palette, image_format), (255, 0, 0), 1)
    _assert_color(_encode(palette, image_format, transparency=index), WHITE, 0)
  half = _encode(palette, 'png', transparency=bytes([128] * 2))
  _assert_color(half, (255, 127, 127), 1)
  for mode, value, color in (('1', 1, 255), ('1', 0, 0), ('L', 9, 9), ('LA', (9, 0), 255)):
    _assert_color(_encode(Image.new(mode, (8, 8), value), 'png'), (color,) * 3, 0)


@pytest.mark.parametrize('image_format', ['png', 'webp', 'gif'])
def test_animations_show_their_first_frame(image_format):
  frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue', 'green')]
  data = _encode(frames[0], image_format, save_all=True, append_images=frames[1:])
  _assert_color(data, (255, 0, 0), 2)


def test_webp_alpha():
  clear = Image.new('RGBA', (8, 8), (255, 0, 0, 0))
  for lossless in (False, True):
    _assert_color(_encode(clear, 'webp', lossless=lossless), WHITE, 0)


def _gif(screen, frame):
  return (
    b'GIF89a'
    + struct.pack('<HHBBB', *screen, 0x80, 0, 0)
    + b'\xff\0\0\0\0\xff,'
    + struct.pack('<HHHHB', 0, 0, *frame, 0)
    + b'\x02\x02\x44\x01\0;'
  )


@pytest.mark.parametrize(
  'screen, frame', [((0, 0), (0, 0)), ((8, 8), (0, 0)), ((0, 8), (0, 8)), ((8, 8), (0, 8))]
)
def test_gif_of_empty_frames(screen, frame):
  with pytest.raises(UndecodablePicture):
    decode(_gif(screen, frame), 8)


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1)])
def test_one_pixel_high_or_wide(size):
  for image_format in ('png', 'jpeg', 'gif', 'webp'):
    _assert_refused(_encode(Image.new('RGB', size), image_format), 'picture one pixel high or wide')


def test_extreme_aspect():
  assert decode(_encode(Image.new('RGB', (16_000, 2), 'red'), 'png'), 8).shape == (8, 8, 3)
  _assert_color(
    _encode(Image.new('RGB', (2, 16_000), (200, 30, 60)), 'jpeg', quality=100), (200, 30, 60)
  )


@pytest.mark.parametrize('side', [9_000, 12_000, 2**31 - 1])
def test_decompression_bombs(side):
  with warnings.catch_warnings():
    # Also if Pillow's warnings are errors.
    warnings.simplefilter('error' if side == 12_000 else 'ignore')
    for bomb in (_png(side, side, 1, 0, b''), _gif((min(side, 2**16 - 1),) * 2, (2, 2))):
      _assert_refused(bomb, 'picture of too many pixels')
    jpeg = bytearray(_encode(Image.new('L', (8, 8)), 'jpeg'))
    frame = jpeg.index(b'\xff\xc0')
    jpeg[frame + 5 : frame + 9] = struct.pack('>HH', *[min(side, 65_500)] * 2)
    _assert_refused(bytes(jpeg), 'picture of too many pixels')


def test_too_many_bytes(monkeypatch):
  data = _encode(Image.new('RGB', (8, 8)), 'png')
  monkeypatch.setattr(image_decoding, 'MAX_BYTES', len(data))
  decode(data, 8)
  _assert_refused(data + b'\0', 'picture of too many bytes')


def test_metadata_that_unpacks_to_a_huge_size():
  """It is ignored without being unpacked."""
  packed = zlib.compress(bytes(2**26))
  for kind, content in ((b'iCCP', b'p\0\0' + packed), (b'zTXt', b'k\0\0' + packed)):
    tracemalloc.start()
    _assert_color(_png(8, 8, 8, 0, bytes([0, *[77] * 8]) * 8, _chunk(kind, content)), (77,) * 3, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize(
  'kind, content',
  [
    (b'iCCP', b''),
    (b'iCCP', b'p\0\1'),
    (b'iCCP', b'p\0\0not zlib'),
    (b'zTXt', b'k\0\1x'),
    (b'pHYs', b'ab'),
    (b'gAMA', b'a'),
    (b'cHRM', b'a'),
    (b'sRGB', b''),
    (b'acTL', b'x'),
    (b'fcTL', b'x'),
    (b'tEXt', b''),
    (b'iTXt', b'k\0\1\0\0\0x'),
  ],
)
def test_invalid_metadata_is_ignored(kind, content):
  rows = bytes([0, *[7] * 8]) * 8
  exif = Image.Exif()
  exif[0x0112] = 3
  more = _chunk(b'eXIf', exif.tobytes()[6:]) + _chunk(kind, content)
  image, notes = image_decoding.decode_and_note(_png(8, 8, 8, 0, rows[:-1] + b'\xff', more), 8)
  assert (image[0, 0] == 255).all() and (image[1:] == 7).all()
  assert notes == (['unusable color profile ignored'] if kind == b'iCCP' else [])


@pytest.mark.parametrize(
  'exif',
  [
    b'Exif\0\0nonsense',
    b'Exif\0\0II*\0\xff\xff\xff\xff',
    b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01ABCD',
  ],
)
def test_invalid_exif_is_ignored(exif):
  for image_format in ('jpeg', 'png', 'webp'):
    _assert_color(
      _encode(Image.new('RGB', (8, 8), (200, 30, 60)), image_format, exif=exif), (200, 30, 60), 4
    )


@pytest.mark.parametrize('orientation', range(1, 9))
def test_all_orientations(orientation):
  picture = _blurred(12, 8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = _encode(picture, 'png', exif=exif)
  from PIL import ImageOps

  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  left, top = (upright.width - 8) // 2, (upright.height - 8) // 2
  np.testing.assert_array_equal(
    decode(data, 8), np.asarray(upright.crop((left, top, left + 8, top + 8)))
  )


@pytest.mark.parametrize('image_format', ['tiff', 'bmp', 'ppm', 'ico', 'eps'])
def test_other_formats_are_not_tried(image_format):
  _assert_refused(_encode(Image.new('RGB', (16, 16)), image_format), 'unknown picture format')


def test_eps_starts_no_program(monkeypatch):
  from PIL import EpsImagePlugin

  monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_: pytest.fail('started'))
  _assert_refused(
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n', 'unknown picture format'
  )


def test_pillow_rejects_truncated_pictures():
  assert not ImageFile.LOAD_TRUNCATED_IMAGES
