"""Color profiles in pictures: converted to sRGB numerically correctly, or ignored and counted."""

import concurrent.futures
import io
import struct

import gin
import numpy as np
import pytest
from PIL import Image
from PIL import ImageCms

from parti_jax.core.errors import UserError
from parti_jax.data import color_profiles
from parti_jax.data import datasets
from parti_jax.data import image_decoding
from parti_jax.data.batches import Batches
from parti_jax.data.image_decoding import decode
from parti_jax.data.image_decoding import decode_and_note

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
D50 = (0.9642, 1.0, 0.8249)
# Primaries of color spaces in XYZ, relative to D50.
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = (
  (0.51512, 0.24120, -0.00105),
  (0.29198, 0.69225, 0.04189),
  (0.15710, 0.06657, 0.78407),
)
SRGB_COLORS = (
  (0.43607, 0.22249, 0.01392),
  (0.38515, 0.71687, 0.09708),
  (0.14307, 0.06061, 0.71410),
)
UNUSABLE = 'unusable color profile ignored'


def _fixed(value):
  return struct.pack('>i', round(value * 65536))


def _profile(space, tags, kind=b'mntr', connection=b'XYZ '):
  """Returns an ICC profile, version 2."""
  tags = {
    b'desc': b'desc\0\0\0\0' + struct.pack('>I', 2) + b'a\0' + bytes(78),
    b'cprt': b'text\0\0\0\0none\0',
    b'wtpt': _xyz(D50),
    **tags,
  }
  place, table, content = 132 + 12 * len(tags), b'', b''
  for name, data in tags.items():
    data += bytes(-len(data) % 4)
    table += name + struct.pack('>II', place + len(content), len(data))
    content += data
  body = struct.pack('>I', len(tags)) + table + content
  header = (
    struct.pack('>I', 128 + len(body))
    + b'lcms\x02\x10\0\0'
    + kind
    + space
    + connection
    + bytes(12)
    + b'acsp'
    + bytes(28)
    + b''.join(map(_fixed, D50))
  )
  return header + bytes(128 - len(header)) + body


def _xyz(values):
  return b'XYZ \0\0\0\0' + b''.join(map(_fixed, values))


def _curve(gamma):
  return b'curv\0\0\0\0' + struct.pack('>IH', 1, round(gamma * 256))


def rgb_profile(colors, gamma):
  """An RGB profile with these primaries."""
  tags = {}
  for name, color in zip(b'rgb', colors):
    tags[bytes([name]) + b'XYZ'] = _xyz(color)
    tags[bytes([name]) + b'TRC'] = _curve(gamma)
  return _profile(b'RGB ', tags)


def grey_profile(gamma):
  return _profile(b'GRAY', {b'kTRC': _curve(gamma)})


def cmyk_profile():
  """Lightness is 100 without ink and 0 with all; each ink takes the same amount, without hue."""
  nodes = bytes(
    value
    for index in range(16)
    for value in (round(255 * max(0, 1 - bin(index).count('1') / 2)), 128, 128)
  )
  identity = bytes(range(256))
  lut = (
    b'mft1\0\0\0\0'
    + bytes([4, 3, 2, 0])
    + b''.join(_fixed(float(row == column)) for row in range(3) for column in range(3))
    + identity * 4
    + nodes
    + identity * 3
  )
  return _profile(b'CMYK', {b'A2B0': lut}, b'prtr', b'Lab ')


def _encoded_srgb(linear):
  linear = np.clip(linear, 0, 1)
  return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _expected(pixels, colors, gamma):
  """Returns the sRGB values, 0 to 255, of RGB pixels with these primaries."""
  xyz = (pixels / 255) ** gamma @ np.array(colors)
  return 255 * _encoded_srgb(xyz @ np.linalg.inv(np.array(SRGB_COLORS)))


def _pixels():
  """All combinations of a few levels; none near black, where curves are steep."""
  levels = np.array([40, 90, 128, 180, 215, 255])
  grid = np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), -1).reshape(-1, 3)
  return np.concatenate([grid, grid[:9]]).reshape(15, 15, 3).astype(np.uint8)


def _encode(image, image_format='png', **arguments):
  data = io.BytesIO()
  image.save(data, image_format, **arguments)
  return data.getvalue()


@pytest.mark.parametrize(
  'image_format, arguments, within',
  [
    ('png', {}, 2),
    ('webp', {'lossless': True}, 2),
    ('jpeg', {'quality': 100, 'subsampling': 0}, 9),
  ],
)
@pytest.mark.parametrize(
  'colors, gamma', [(ADOBE_RGB, 2.2), (DISPLAY_P3, 2.2), (SRGB_COLORS, 1.0), (SRGB_COLORS, 1.8)]
)
def test_colors_follow_the_profile(colors, gamma, image_format, arguments, within):
  pixels = _pixels()
  data = _encode(
    Image.fromarray(pixels), image_format, icc_profile=rgb_profile(colors, gamma), **arguments
  )
  expected = _expected(pixels, colors, gamma)
  assert np.abs(expected - pixels).max() > 15
  found, notes = decode_and_note(data, 15)
  assert np.abs(found - expected).mean() < within / 4 and not notes
  assert np.abs(found - expected).max() <= within
  plain = decode(data, 15, to_srgb=False)
  np.testing.assert_array_equal(
    plain, decode(_encode(Image.fromarray(pixels), image_format, **arguments), 15)
  )


def test_palettes_and_transparency_have_colors_too():
  profile = rgb_profile(ADOBE_RGB, 2.2)
  red = np.full([4, 4, 3], (200, 30, 60), np.uint8)
  expected = _expected(red, ADOBE_RGB, 2.2)
  palette = Image.fromarray(red).quantize(2)
  assert np.abs(decode(_encode(palette, icc_profile=profile), 4) - expected).max() <= 2
  half = np.concatenate([red, np.full([4, 4, 1], 128, np.uint8)], -1)
  blended = expected * 128 / 255 + 255 * 127 / 255
  for image_format in ('png', 'webp'):
    data = _encode(Image.fromarray(half), image_format, icc_profile=profile, lossless=True)
    assert np.abs(decode(data, 4) - blended).max() <= 2
  clear = Image.fromarray(np.concatenate([red, np.zeros([4, 4, 1], np.uint8)], -1))
  assert (decode(_encode(clear, icc_profile=profile), 4) == 255).all()


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'png 16 bits', 'png alpha'])
def test_greys(kind):
  levels = np.linspace(40, 255, 64).round().astype(np.uint8).reshape(8, 8)
  expected = 255 * _encoded_srgb((levels / 255) ** 1.0)
  image = Image.fromarray(levels)
  if kind == 'png 16 bits':
    image = Image.fromarray(levels.astype(np.uint16) << 8)
  elif kind == 'png alpha':
    image.putalpha(255)
  data = _encode(
    image,
    kind.split()[0],
    icc_profile=grey_profile(1.0),
    **({'quality': 100} if kind == 'jpeg' else {}),
  )
  found, notes = decode_and_note(data, 8)
  assert np.abs(found - expected[..., None]).max() <= (4 if kind == 'jpeg' else 2) and not notes


def test_cmyk():
  inks = np.zeros([8, 8, 4], np.uint8)
  inks[:, :, 0] = 100
  inks[4:, :, 3] = 100
  data = _encode(Image.fromarray(inks, 'CMYK'), 'jpeg', quality=100, icc_profile=cmyk_profile())
  found, notes = decode_and_note(data, 8)
  # Each ink takes 100/255 of half of the lightness.
  lightness = np.where(np.arange(8) < 4, 1 - 50 / 255, 1 - 100 / 255)[:, None, None]
  expected = 255 * _encoded_srgb(((100 * lightness + 16) / 116) ** 3)
  assert np.abs(found - expected).max() <= 3 and not notes
  without = decode(_encode(Image.fromarray(inks, 'CMYK'), 'jpeg', quality=100), 8)
  assert np.abs(without.astype(int) - found).max() > 50
  np.testing.assert_array_equal(decode(data, 8, to_srgb=False), without)


def test_srgb_pictures_stay_bit_for_bit(monkeypatch):
  pixels = np.random.default_rng(0).integers(0, 256, [9, 9, 3], np.uint8)
  for image_format, arguments in (
    ('png', {}),
    ('jpeg', {'quality': 90}),
    ('webp', {'lossless': True}),
    ('webp', {}),
  ):
    image = Image.fromarray(pixels)
    plain = decode(_encode(image, image_format, **arguments), 9)
    data = _encode(image, image_format, icc_profile=SRGB, **arguments)
    np.testing.assert_array_equal(decode(data, 9), plain)
  # Once its profile is cached, no transform is applied to its pixels.
  monkeypatch.setattr(ImageCms, 'applyTransform', lambda *_: pytest.fail('converted'))
  np.testing.assert_array_equal(decode(data, 9), plain)


def _cut(profile):
  return profile[: len(profile) // 2]


@pytest.mark.parametrize(
  'profile',
  [
    b'nonsense',
    bytes(200),
    _cut(rgb_profile(ADOBE_RGB, 2.2)),
    grey_profile(1.0),
    cmyk_profile(),
    _profile(b'RGB ', {}),
    _profile(b'Lab ', {}),
    _profile(b'RGB ', {}, kind=b'link'),
    rgb_profile(ADOBE_RGB, 2.2) + bytes(color_profiles.MAX_BYTES),
  ],
  ids=['nonsense', 'zeros', 'cut', 'grey', 'CMYK', 'empty', 'Lab', 'link', 'huge'],
)
def test_unusable_profiles_are_ignored_and_noted(profile):
  image = Image.fromarray(_pixels())
  data = _encode(image, 'jpeg', icc_profile=profile)
  found, notes = decode_and_note(data, 15)
  assert notes == [UNUSABLE]
  np.testing.assert_array_equal(found, decode(_encode(image, 'jpeg'), 15))


def test_a_color_profile_does_not_fit_greys():
  image = Image.fromarray(_pixels()[..., 0])
  for image_format in ('png', 'jpeg'):
    data = _encode(image, image_format, icc_profile=rgb_profile(ADOBE_RGB, 1.0))
    found, notes = decode_and_note(data, 15)
    assert notes == [UNUSABLE]
    np.testing.assert_array_equal(found, decode(_encode(image, image_format), 15))


def test_several_threads():
  profiles = [rgb_profile(ADOBE_RGB, 1 + number / 10) for number in range(12)]
  data = [_encode(Image.fromarray(_pixels()), icc_profile=profile) for profile in profiles] * 20
  expected = [decode(one, 15) for one in data[:12]] * 20
  color_profiles._transform.cache_clear()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda one: decode(one, 15), data))
  np.testing.assert_array_equal(found, expected)


def test_in_a_run(folder):
  pixels = _pixels()
  image = Image.fromarray(pixels)
  folder(
    [
      ('a', _encode(image, icc_profile=rgb_profile(ADOBE_RGB, 2.2))),
      ('b', _encode(image, icc_profile=b'nonsense')),
      ('c', _encode(image)),
    ]
  )
  lengths = {'images': 15}
  batches = Batches('folder_images', 'train', 3, lengths, shuffle=False, num_epochs=1)
  images = next(batches)['images']
  assert np.abs(images[0] - _expected(pixels, ADOBE_RGB, 2.2)).max() <= 2
  assert (images[1:] == pixels).all() and batches.shortened == {UNUSABLE: 1}
  with gin.unlock_config():
    gin.parse_config('decode_images.to_srgb = False')
  batches = Batches('folder_images', 'train', 3, lengths, shuffle=False, num_epochs=1)
  assert (next(batches)['images'] == pixels).all() and not batches.shortened
  assert all(
    (picture == pixels).all()
    for _, picture in datasets.pictures_and_captions('folder', 'train', 15)
  )


def test_the_switch_must_be_a_boolean():
  gin.parse_config("decode_images.to_srgb = 'no'")
  with pytest.raises(UserError, match="decode_images.to_srgb = 'no'"):
    image_decoding.configured()
