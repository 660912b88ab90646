"""JPEGs by several encoders and by hand: undamaged ones decode as with Pillow."""

import contextlib
import io
import itertools
import re
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from parti_jax.data import jpegs
from parti_jax.data.image_decoding import decode
from parti_jax.data.image_decoding import UndecodablePicture


def _smooth(width, height, mode='RGB'):
  noise = np.random.default_rng(0).integers(0, 256, [5, 5, 3], np.uint8)
  return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def _noise(width, height, mode='RGB'):
  noise = np.random.default_rng(0).integers(0, 256, [height, width, 3], np.uint8)
  return Image.fromarray(noise).convert(mode)


def _solid(width, height, mode='RGB'):
  return Image.new('RGB', (width, height), (200, 30, 60)).convert(mode)


def _encode(image, **arguments):
  data = io.BytesIO()
  image.save(data, 'jpeg', **arguments)
  return data.getvalue()


def _pillows(data):
  """Returns the central square as decoded by Pillow."""
  image = Image.open(io.BytesIO(data)).convert('RGB')
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return np.asarray(image.crop((left, top, left + side, top + side)))


def _assert_as_pillow(data):
  expected = _pillows(data)
  found = decode(data, expected.shape[0])
  assert np.abs(found.astype(int) - expected).max() <= 2


def test_pillows_encoder():
  sizes = itertools.cycle([(16, 16), (17, 31), (40, 8), (2, 9), (33, 33)])
  shapes = itertools.cycle([_smooth, _noise, _solid])
  count = 0
  for mode, quality, subsampling, progressive, optimize, restart in itertools.product(
    ('RGB', 'L', 'CMYK'),
    (1, 75, 100),
    (0, 1, 2),
    (False, True),
    (False, True),
    ({}, {'restart_marker_blocks': 1}, {'restart_marker_rows': 1}),
  ):
    image = next(shapes)(*next(sizes), mode)
    _assert_as_pillow(
      _encode(
        image,
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        optimize=optimize,
        **restart,
      )
    )
    count += 1
  assert count > 300


def test_simplejpegs_encoder():
  for subsampling, quality, size in itertools.product(
    ('444', '422', '420', '440', '411', 'Gray'), (1, 60, 100), ((16, 16), (33, 18))
  ):
    pixels = np.ascontiguousarray(_smooth(*size))
    _assert_as_pillow(
      simplejpeg.encode_jpeg(pixels, quality, colorspace='RGB', colorsubsampling=subsampling)
    )


def _segment(kind, content):
  return struct.pack('>BBH', 0xFF, kind, len(content) + 2) + content


def by_hand(factors, width=40, height=36, restart=0, adobe=None, ids=None, seed=0):
  """A baseline JPEG of uniform blocks; `factors` are the components' sampling factors."""
  rng = np.random.default_rng(seed)
  across, down = (max(factor[axis] for factor in factors) for axis in (0, 1))
  blocks = [(1, 1)] if len(factors) == 1 else factors
  if len(factors) == 1:
    across = down = 1
  units = -(-width // (8 * across)) * -(-height // (8 * down))
  scan, bits, before, restarts = b'', '', [0] * len(factors), 0

  def written(bits):
    bits += '1' * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(
      b'\xff', b'\xff\0'
    )

  for unit in range(units):
    if restart and unit and unit % restart == 0:
      scan += written(bits) + bytes([0xFF, 0xD0 + restarts % 8])
      bits, before, restarts = '', [0] * len(factors), restarts + 1
    for component, (horizontal, vertical) in enumerate(blocks):
      for _ in range(horizontal * vertical):
        level = int(rng.integers(-200, 200))
        change, before[component] = level - before[component], level
        length = abs(change).bit_length()
        bits += f'{length:04b}'
        if length:
          bits += f'{change if change > 0 else change + 2**length - 1:0{length}b}'
        bits += '0'  # No other coefficients.
  ids = ids or range(1, len(factors) + 1)
  return b''.join(
    [
      b'\xff\xd8',
      b'' if adobe is None else _segment(0xEE, b'Adobe\0d\0\0\0\0' + bytes([adobe])),
      _segment(0xDB, b'\0' + b'\x04' * 64),
      _segment(
        0xC0,
        struct.pack('>BHHB', 8, height, width, len(factors))
        + b''.join(
          bytes([identity, 16 * horizontal + vertical, 0])
          for identity, (horizontal, vertical) in zip(ids, factors)
        ),
      ),
      _segment(0xC4, bytes([0, 0, 0, 0, 12] + [0] * 12) + bytes(range(12))),
      _segment(0xC4, bytes([0x10, 1] + [0] * 15) + b'\0'),
      _segment(0xDD, struct.pack('>H', restart)) if restart else b'',
      _segment(0xDA, bytes([len(factors)]) + b''.join(bytes([i, 0]) for i in ids) + b'\0\x3f\0'),
      scan,
      written(bits),
      b'\xff\xd9',
    ]
  )


def test_all_samplings():
  """Including those that simplejpeg doesn't support."""
  one = [(across, down) for across in (1, 2, 3, 4) for down in (1, 2, 3, 4)]
  factors = [
    (luma, chroma, chroma)
    for luma in one
    for chroma in one
    if luma[0] * luma[1] + 2 * chroma[0] * chroma[1] <= 10
  ]
  factors += [(factor,) for factor in one] + [((2, 1), (1, 2), (1, 1)), ((2, 2),) * 2 + ((1, 2),)]
  read = refused = 0
  for factor, restart in itertools.product(factors, (0, 3)):
    data = by_hand(factor, restart=restart)
    try:
      _pillows(data)
    except OSError:  # Fractional ratios of samplings, which libjpeg doesn't support.
      continue
    _assert_as_pillow(data)
    read += 1
    # Truncated scans are detected in all of them.
    scan = data.index(b'\xff\xda')
    with pytest.raises(UndecodablePicture, match='damaged'):
      decode(data[: scan + (len(data) - scan) // 2] + b'\xff\xd9', 36)
    refused += 1
  assert read == refused > 100


@pytest.mark.parametrize(
  'components, adobe, ids',
  [
    (3, None, None),
    (3, None, b'RGB'),
    (3, 0, None),
    (3, 1, None),
    (3, 2, None),
    (4, None, None),
    (4, 0, None),
    (4, 2, None),
    (4, 1, None),
  ],
)
def test_color_transforms(components, adobe, ids):
  _assert_as_pillow(by_hand([(1, 1)] * components, adobe=adobe, ids=ids))


def _pictures():
  """Encoded pictures of all types."""
  for image in (_noise(60, 52), _smooth(52, 60), _solid(64, 64), _smooth(52, 60, 'L')):
    for arguments in ({}, {'optimize': True}, {'progressive': True}, {'restart_marker_blocks': 2}):
      yield _encode(image, **arguments)


def _places(data):
  """Returns the positions of a file's markers, except for its beginning."""
  places, position = [], 2
  while data[position - 1] != 0xD9:
    position = re.compile(rb'\xff[^\x00\xff]').search(data, position).start()
    places.append(position)
    kind = data[position + 1]
    position += 2 + (
      0 if 0xD0 <= kind <= 0xD9 else int.from_bytes(data[position + 2 : position + 4])
    )
  return places


def _with_before_markers(data, added, places):
  for place in sorted(places, reverse=True):
    data = data[:place] + added + data[place:]
  return data


@pytest.mark.parametrize(
  'added',
  [*(bytes(count) for count in (1, 3, 8, 50, 1000)), b'\xff', b'\xff' * 9, b'\0' * 5 + b'\xff' * 3],
)
def test_padding_before_markers(added):
  """All pixels are present."""
  for data in _pictures():
    if len(added) == 1000 and b'\xff\xc2' in data:
      continue  # In scans of a progressive JPEG, so much padding looks like a hole.
    expected, places = decode(data, 52), _places(data)[1:]
    for place in places:
      padded = _with_before_markers(data, added, [place])
      np.testing.assert_array_equal(decode(padded, 52), expected)
    np.testing.assert_array_equal(decode(_with_before_markers(data, added, places), 52), expected)


@pytest.mark.parametrize(
  'added',
  [
    _segment(0xFE, b'a comment'),
    _segment(0xFE, b'\xff\xda' * 9),
    _segment(0xE5, bytes(9)),
    _segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x/>'),
    _segment(0xED, b'Photoshop 3.0\0'),
    _segment(0xE2, b'FPXR\0\xff\xd9'),
    _segment(0xE1, b'Exif\0\0' + _encode(_noise(16, 16))),
  ],
)
def test_segments_between_others(added):
  for data in _pictures():
    before = [place for place in _places(data)[1:] if data[place + 1] in (0xC0, 0xC2, 0xC4, 0xDB)]
    np.testing.assert_array_equal(
      decode(_with_before_markers(data, added, before), 52), decode(data, 52)
    )


def test_data_after_the_end_is_ignored():
  for data in _pictures():
    expected = decode(data, 52)
    for trailer in (
      data,
      data * 3,
      b'\xff\xda' * 1000,
      bytes(100),
      b'\0\0\0\x18ftypmp42' * 9,
      _encode(_noise(40, 40), progressive=True) * 20,
      b'\xff',
      b'\xff\xd8\xff',
    ):
      np.testing.assert_array_equal(decode(data + trailer, 52), expected)


def test_only_scans_are_counted():
  scans = b'\xff\xda' * 500
  for data in _pictures():
    start = _places(data)[0]
    for kind in (0xE1, 0xFE):
      more = data[:start] + _segment(kind, scans) + data[start:]
      np.testing.assert_array_equal(decode(more + scans, 52), decode(data, 52))
  data = _encode(_noise(16, 16), progressive=True)
  scan = data.rindex(b'\xff\xda')
  many = data[:scan] + data[scan:-2] * 101 + b'\xff\xd9'
  with pytest.raises(UndecodablePicture, match='picture of too many scans'):
    decode(many, 16)


def _assert_mostly_refused(changed, allowed):
  """Asserts that at most a share of the files is accepted; damage may look like a picture."""
  read = 0
  for data in changed:
    try:
      decode(data, 128)
    except UndecodablePicture:
      continue
    read += 1
  assert read <= allowed * len(changed), (read, len(changed))


@pytest.mark.parametrize('arguments', [{}, {'progressive': True}, {'restart_marker_rows': 1}])
def test_holes_are_not_padding(arguments):
  """Zeros in place of data, as left by interrupted downloads."""
  data, rng = _encode(_smooth(128, 128), **arguments), np.random.default_rng(0)
  start = data.index(b'\xff\xda') + 20
  places = rng.integers(start, len(data) - 80, 100)
  _assert_mostly_refused(
    [data[:place] + bytes(len(data) - 2 - place) + b'\xff\xd9' for place in places], 0.03
  )
  _assert_mostly_refused(
    [data[:place] + bytes(int(rng.integers(1, 3000))) + b'\xff\xd9' for place in places], 0.05
  )


def test_other_bytes_before_a_marker_are_damage():
  data = _encode(_noise(60, 52))
  for place in _places(data)[1:-1]:
    with pytest.raises(UndecodablePicture, match='damaged'):
      decode(data[:place] + b'\x17\x2a' + data[place:], 52)


def test_zeros_missing_from_adobes_segment_are_not_padding():
  """Its length is wrong by one bit, so the colors would be misinterpreted."""
  data = bytearray(by_hand([(1, 1)] * 3, adobe=0))
  assert data[4:6] == b'\0\x0e'
  data[5] = 0x0C
  with pytest.raises(UndecodablePicture, match='damaged'):
    decode(bytes(data), 36)


@pytest.mark.parametrize('fault', ['spectrum', 'adobe', 'jfif'])
def test_a_harmless_fault_hides_no_damage(fault):
  image = _noise(60, 52)
  data = bytearray(_encode(image))
  expected = decode(bytes(data), 52)
  if fault == 'spectrum':
    data[data.index(b'\xff\xda') + 12] = 0
  elif fault == 'jfif':
    data[data.index(b'JFIF') + 5] = 7
  else:
    data[2:2] = _segment(0xEE, b'Adobe\0d\0\0\0\0\x07')
  np.testing.assert_array_equal(decode(bytes(data), 52), expected)
  middle = (data.index(b'\xff\xda') + len(data)) // 2
  with pytest.raises(UndecodablePicture, match='damaged'):
    decode(bytes(data[:middle]) + b'\xff\xd9', 52)
  # Also if several harmless faults occur together.
  data[2:2] = _segment(0xEE, b'Adobe\0d\0\0\0\0\x09') + bytes(3)
  np.testing.assert_array_equal(decode(bytes(data[:-2]) + bytes(9) + b'\xff\xd9', 52), expected)


def test_decodings_of_one_file_are_bounded(monkeypatch):
  calls = []
  real = simplejpeg.decode_jpeg
  monkeypatch.setattr(
    simplejpeg, 'decode_jpeg', lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
  )
  data = _encode(_noise(96, 96), restart_marker_blocks=1)
  places = [place for place in _places(data) if 0xD0 <= data[place + 1] <= 0xD7]
  # Padded and damaged.
  broken = _with_before_markers(data[: len(data) // 2] + b'\xff\xd9', bytes(9), places[:40])
  with pytest.raises(UndecodablePicture):
    decode(broken, 96)
  assert 1 < len(calls) <= 105


@pytest.mark.parametrize('content', [b'\xff', b'\xff\xd0', b'\xff\xfe\0\2', b'\xff\xda', b'\0'])
def test_hostile_markers(content):
  data = _encode(_noise(16, 16))
  for place in (2, data.index(b'\xff\xda') + 14):
    hostile = data[:place] + content * (2**18 // len(content)) + data[place:]
    for more in (b'', b'\0\1' + data):
      with contextlib.suppress(UndecodablePicture):
        assert decode(hostile + more, 16).shape == (16, 16, 3)


def test_pictures_are_decoded_at_a_fraction_of_their_size():
  data = _encode(_smooth(1024, 1024), quality=95)
  image = jpegs.decode(data, 'RGB', 128)
  assert image.size == (128, 128)
  assert (
    np.abs(
      decode(data, 64).astype(int)
      - np.asarray(_smooth(1024, 1024).resize((64, 64), Image.Resampling.BICUBIC))
    ).max()
    < 12
  )
  # Not if one side has very few pixels, which would keep its size while the other shrinks.
  thin = _encode(_noise(300, 4), quality=100, subsampling=0)
  np.testing.assert_array_equal(decode(thin, 4), _pillows(thin))
