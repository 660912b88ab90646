"""PNGs of all types, written by hand, and WebPs and GIFs: each pixel has the file's value."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from parti_jax.data.image_decoding import decode
from parti_jax.data.image_decoding import UndecodablePicture

WIDTH, HEIGHT = 11, 9
GREY, COLOR, PALETTE, GREY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOR_ALPHA: 4}
DEPTHS = {
  GREY: (1, 2, 4, 8, 16),
  COLOR: (8, 16),
  PALETTE: (1, 2, 4, 8),
  GREY_ALPHA: (8, 16),
  COLOR_ALPHA: (8, 16),
}
TYPES = [(color, depth) for color, depths in DEPTHS.items() for depth in depths]
# First column and row of each Adam7 pass, and its steps.
PASSES = (
  (0, 0, 8, 8),
  (4, 0, 8, 8),
  (0, 4, 4, 8),
  (2, 0, 4, 4),
  (0, 2, 2, 4),
  (1, 0, 2, 2),
  (0, 1, 1, 2),
)


def _chunk(kind, content):
  return (
    struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
  )


def _rows(samples, depth):
  """Packs samples, [height, width, channels], as rows without a filter."""
  rows = b''
  for row in samples.reshape(samples.shape[0], -1):
    bits = ''.join(f'{sample:0{depth}b}' for sample in row)
    bits += '0' * (-len(bits) % 8)
    rows += b'\0' + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
  return rows


def png(samples, color, depth, interlaced=False, chunks=b''):
  """Writes a PNG of samples, [height, width, channels]; `chunks` come before the pixels."""
  height, width = samples.shape[:2]
  parts = (
    [(samples[top::down, left::across]) for left, top, across, down in PASSES]
    if interlaced
    else [samples]
  )
  pixels = b''.join(_rows(part, depth) for part in parts if part.size)
  return b''.join(
    [
      b'\x89PNG\r\n\x1a\n',
      _chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, interlaced)),
      chunks,
      _chunk(b'IDAT', zlib.compress(pixels)),
      _chunk(b'IEND', b''),
    ]
  )


def _samples(color, depth, few=False):
  """Random samples; with `few` only four levels, so that many pixels have the same color."""
  levels = np.random.default_rng(depth).integers(0, 2**depth, 4 if few else 64)
  shape = [HEIGHT, WIDTH, CHANNELS[color]]
  return np.random.default_rng(1).choice(levels, shape)


def _in_8_bits(samples, depth):
  return samples >> 8 if depth == 16 else samples * 255 // (2**depth - 1)


def _on_white(colors, opacity):
  """Blends colors, [height, width, 1 or 3], with white; opacity, [height, width], in 0 to 1."""
  opacity = opacity[..., None]
  return np.broadcast_to(colors * opacity + 255 * (1 - opacity), [HEIGHT, WIDTH, 3])


def _assert_pixels(data, expected, within=0):
  side = min(WIDTH, HEIGHT)
  left, top = (WIDTH - side) // 2, (HEIGHT - side) // 2
  found = decode(data, side).astype(float)
  difference = np.abs(found - expected[top : top + side, left : left + side])
  assert difference.max() <= within


@pytest.mark.parametrize('interlaced', [False, True])
@pytest.mark.parametrize('color, depth', TYPES)
def test_pngs_of_all_types(color, depth, interlaced):
  samples = _samples(color, depth)
  chunks, opaque = b'', np.ones([HEIGHT, WIDTH])
  if color == PALETTE:
    palette = np.random.default_rng(0).integers(0, 256, [2**depth, 3])
    chunks = _chunk(b'PLTE', palette.astype(np.uint8).tobytes())
    expected = palette[samples[..., 0]]
  elif color in (GREY_ALPHA, COLOR_ALPHA):
    expected = _on_white(
      _in_8_bits(samples[..., :-1], depth), _in_8_bits(samples[..., -1], depth) / 255
    )
  else:
    expected = _on_white(_in_8_bits(samples, depth), opaque)
  data = png(samples, color, depth, interlaced, chunks)
  _assert_pixels(data, expected, within=1 if color in (GREY_ALPHA, COLOR_ALPHA) else 0)
  # Text, a time and unknown chunks change nothing.
  more = (
    _chunk(b'tEXt', b'Comment\0a dog')
    + _chunk(b'tIME', bytes(7))
    + _chunk(b'prVt', b'x')
    + _chunk(b'gAMA', struct.pack('>I', 45455))
  )
  np.testing.assert_array_equal(
    decode(png(samples, color, depth, interlaced, chunks + more) + b'behind the end', 9),
    decode(data, 9),
  )
  with pytest.raises(UndecodablePicture):
    decode(data[:-20], 9)


@pytest.mark.parametrize('interlaced', [False, True])
@pytest.mark.parametrize('color, depth', [kind for kind in TYPES if kind[0] in (GREY, COLOR)])
def test_a_transparent_color(color, depth, interlaced):
  samples = _samples(color, depth, few=True)
  for row, column in ((0, 0), (4, 5), (HEIGHT - 1, WIDTH - 1)):
    transparent = samples[row, column]
    chunk = _chunk(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent.tolist()))
    opacity = 1.0 - (samples == transparent).all(-1)
    assert 0 < opacity.sum() < opacity.size
    _assert_pixels(
      png(samples, color, depth, interlaced, chunk), _on_white(_in_8_bits(samples, depth), opacity)
    )
  # All pixels, and none.
  same = np.broadcast_to(transparent, samples.shape)
  _assert_pixels(png(same, color, depth, interlaced, chunk), np.full([HEIGHT, WIDTH, 3], 255))
  other = (same + 1) % 2**depth
  _assert_pixels(
    png(other, color, depth, interlaced, chunk),
    _on_white(_in_8_bits(other, depth), np.ones([HEIGHT, WIDTH])),
  )


@pytest.mark.parametrize('color', [GREY, COLOR])
@pytest.mark.parametrize('byte', [0, 1])
def test_16_bits_are_compared_with_16_bits(color, byte):
  """A color that differs in one byte of one channel isn't the transparent one."""
  samples = np.full([HEIGHT, WIDTH, CHANNELS[color]], 0x1234)
  chunk = _chunk(b'tRNS', struct.pack(f'>{samples.shape[-1]}H', *[0x1234] * samples.shape[-1]))
  samples[:, ::2, -1] ^= 1 << (8 * byte)
  opacity = 1.0 - (samples == 0x1234).all(-1)
  assert opacity.any() and not opacity.all()
  _assert_pixels(png(samples, color, 16, chunks=chunk), _on_white(_in_8_bits(samples, 16), opacity))


@pytest.mark.parametrize('color, depth', [kind for kind in TYPES if kind[0] in (GREY, COLOR)])
def test_only_the_bits_of_the_depth_define_the_transparent_color(color, depth):
  """The other bits should be zero; libpng ignores them."""
  samples = _samples(color, depth, few=True)
  transparent = samples[0, 0]
  high = [value | 0xFFFF << depth & 0xFFFF for value in transparent.tolist()]
  _assert_pixels(
    png(samples, color, depth, chunks=_chunk(b'tRNS', struct.pack(f'>{len(high)}H', *high))),
    _on_white(_in_8_bits(samples, depth), 1.0 - (samples == transparent).all(-1)),
  )


@pytest.mark.parametrize('depth', DEPTHS[PALETTE])
@pytest.mark.parametrize('kind', ['one', 'some', 'few'])
def test_transparent_palettes(depth, kind):
  samples = _samples(PALETTE, depth, few=True)
  palette = np.random.default_rng(0).integers(0, 256, [2**depth, 3])
  opacities = np.full(2**depth, 255)
  if kind == 'one':
    opacities[samples[0, 0, 0]] = 0
  else:
    opacities[:] = np.random.default_rng(2).integers(0, 256, 2**depth)
  count = max(1, 2**depth // 2) if kind == 'few' else 2**depth
  opacities[count:] = 255
  chunks = _chunk(b'PLTE', palette.astype(np.uint8).tobytes()) + _chunk(
    b'tRNS', opacities[:count].astype(np.uint8).tobytes()
  )
  _assert_pixels(
    png(samples, PALETTE, depth, chunks=chunks),
    _on_white(palette[samples[..., 0]], opacities[samples[..., 0]] / 255),
    within=1,
  )


def test_a_transparent_color_is_turned_with_the_picture():
  """If EXIF says so."""
  samples = _samples(COLOR, 16, few=True)
  chunk = _chunk(b'tRNS', struct.pack('>3H', *samples[0, 0].tolist()))
  exif = Image.Exif()
  exif[0x0112] = 3
  turned = png(samples, COLOR, 16, chunks=chunk + _chunk(b'eXIf', exif.tobytes()[6:]))
  plain = png(samples[::-1, ::-1], COLOR, 16, chunks=chunk)
  np.testing.assert_array_equal(decode(turned, 9), decode(plain, 9))


def _smooth(width, height, mode='RGB'):
  noise = np.random.default_rng(0).integers(0, 256, [4, 4, 4], np.uint8)
  image = Image.fromarray(noise, 'RGBA').resize((width, height), Image.Resampling.BICUBIC)
  return image.convert(mode)


def _encode(image, image_format, **arguments):
  data = io.BytesIO()
  image.save(data, image_format, **arguments)
  return data.getvalue()


def _assert_as_pillow(data):
  image = Image.open(io.BytesIO(data)).convert('RGBA')
  white = Image.new('RGBA', image.size, 'white')
  expected = Image.alpha_composite(white, image).convert('RGB')
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  np.testing.assert_array_equal(
    decode(data, side), expected.crop((left, top, left + side, top + side))
  )


def test_webps_and_gifs():
  count = 0
  for size, mode in itertools.product(((8, 8), (17, 30), (31, 16)), ('RGB', 'RGBA', 'L', 'P')):
    image = _smooth(*size, mode)
    animation = {'save_all': True, 'append_images': [image.rotate(90)] * 2}
    webp = [
      dict(lossless=lossless, quality=quality, **more)
      for lossless in (False, True)
      for quality in (1, 90)
      for more in ({}, animation)
    ]
    gif = [
      dict(interlace=interlace, **more)
      for interlace in (0, 1)
      for more in ({}, {'transparency': 1}, animation, {'comment': b'a dog'})
    ]
    for image_format, arguments in [('webp', kind) for kind in webp] + [
      ('gif', kind) for kind in gif
    ]:
      data = _encode(image, image_format, **arguments)
      _assert_as_pillow(data)
      _assert_as_pillow(data + b'behind the end')
      count += 2
  assert count > 350
