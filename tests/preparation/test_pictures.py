"""Resizing and encoding of pictures, and the records of examples."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL import ImageCms

from parti_jax.data import image_decoding
from parti_jax.data.damage import Unusable
from parti_jax.data.sources import prepared
from parti_jax.preparation import examples
from parti_jax.preparation import pictures
from parti_jax.preparation.settings import Settings


def _prepared(picture, caption='a dog', found_columns=None, **settings):
  """Prepares one example, and returns it as read by the source of prepared pictures."""
  example = {'picture': picture, 'caption': caption.encode(), 'columns': found_columns or {}}
  found = examples.prepare(example, 'tar:7', Settings(**settings))
  return found, prepared.parsed(found.record, describe=True)


def _opened(data):
  return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
  'size, settings, expected',
  [
    ((100, 50), {}, (100, 50)),
    ((100, 50), {'size': 20}, (40, 20)),
    ((50, 100), {'size': 20}, (20, 40)),
    ((101, 50), {'size': 20}, (40, 20)),
    ((300, 300), {'size': 64}, (64, 64)),
    ((100, 50), {'size': 80}, (100, 50)),
    ((100, 50), {'size': 80, 'enlarge': True}, (160, 80)),
  ],
)
@pytest.mark.parametrize('image_format', ['jpeg', 'webp', 'png'])
def test_the_shorter_side_is_resized(draw, encode, size, settings, expected, image_format):
  _, example = _prepared(encode(draw(0, size)), image_format=image_format, **settings)
  image = _opened(example['picture'])
  assert image.format.lower() == image_format
  assert image.size == expected


def test_a_resized_picture_looks_like_the_original(draw, encode):
  image = draw(0, (400, 300))
  _, example = _prepared(encode(image, 'jpeg', quality=98), size=60, image_format='png')
  expected = np.asarray(image.resize((80, 60), Image.Resampling.BICUBIC), int)
  assert np.abs(np.asarray(_opened(example['picture']), int) - expected).mean() < 3


def test_bytes_stay_if_nothing_has_to_change(draw, encode):
  data = encode(draw(0), 'jpeg', quality=70)
  for settings, stays in (
    ({}, True),
    ({'size': 48}, True),
    ({'size': 90}, True),
    ({'size': 47}, False),
    ({'pass_through': False}, False),
    ({'image_format': 'png'}, False),
  ):
    assert (_prepared(data, **settings)[1]['picture'] == data) == stays, settings


def test_pictures_are_rotated_upright(draw, encode):
  exif = Image.Exif()
  exif[0x0112] = 6
  image = draw(0)
  _, example = _prepared(encode(image, 'jpeg', quality=95, exif=exif), image_format='png')
  found = np.asarray(_opened(example['picture']), int)
  expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270), int)
  assert found.shape == (64, 48, 3) and np.abs(found - expected).mean() < 3


def test_colours_become_srgb(encode):
  # A profile whose red is sRGB's green.
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  swapped = profile.replace(b'rXYZ', b'tmpX').replace(b'gXYZ', b'rXYZ').replace(b'tmpX', b'gXYZ')
  data = encode(Image.new('RGB', (8, 8), (255, 0, 0)), 'png', icc_profile=swapped)
  example = {'picture': data, 'caption': b'a dog'}
  for to_srgb, expected in ((True, (0, 255, 0)), (False, (255, 0, 0))):
    record = examples.prepare(example, '', Settings(image_format='png'), to_srgb).record
    pixel = _opened(prepared.parsed(record)['picture']).getpixel((0, 0))
    assert np.abs(np.subtract(pixel, expected)).max() < 30


def test_transparent_areas_become_white(encode):
  data = encode(Image.new('RGBA', (8, 8), (0, 0, 0, 0)))
  _, example = _prepared(data, image_format='png')
  assert _opened(example['picture']).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
  'picture, reason',
  [
    (b'', 'no picture'),
    (b'<html></html>', 'unknown picture format'),
  ],
)
def test_pictures_that_cannot_be_decoded(picture, reason):
  with pytest.raises(Unusable, match=reason):
    _prepared(picture)


def test_a_truncated_picture(draw, encode):
  for image_format in ('png', 'jpeg'):
    with pytest.raises(Unusable, match='damaged picture'):
      _prepared(encode(draw(0), image_format)[:-40])


def test_a_picture_that_would_be_too_large():
  header = image_decoding.Header(2, 60_000, 'PNG', True)
  with pytest.raises(Unusable, match='pixels'):
    pictures.size_after(header, Settings(size=256, enlarge=True))


def test_a_picture_that_the_format_cannot_hold(encode):
  data = encode(Image.new('RGB', (17_000, 2)))
  with pytest.raises(Unusable, match='webp'):
    _prepared(data, image_format='webp')


def test_the_record_of_an_example(draw, encode):
  columns = {'key': '12', 'clip': 0.3, 'url': 'http://x/\ud800', 'n': None}
  found, example = _prepared(encode(draw(0)), ' a dog\0 ', columns, size=24)
  assert example['caption'] == b'a dog'
  assert example['key'] == 'tar:7' and example['columns'] == columns
  assert found.pixels == 64 * 48
  assert found.notes == ['control characters taken out of the caption']
  size = len(found.record) - len(example['picture'])
  described = json.loads(found.record[8 + len('a dog') : size])
  assert (described['width'], described['height']) == (64, 48)
  _, example = _prepared(encode(draw(0)), found_columns=columns, keep_columns=('clip', 'other'))
  assert example['columns'] == {'clip': 0.3}


def test_filters_are_applied(draw, encode):
  data = encode(draw(0))
  for settings, reason in (
    ({'min_side': 49}, 'picture too small'),
    ({'caption_words': (3, 9)}, 'caption too short'),
    ({'columns': {'clip': (0.3, None)}}, 'no column clip'),
    ({'max_aspect_ratio': 1.2}, 'picture too oblong'),
  ):
    with pytest.raises(Unusable, match=reason):
      _prepared(data, **settings)
  with pytest.raises(Unusable, match='no caption'):
    _prepared(data, caption=' ')
