"""Decoding, cropping and resizing of pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from parti_jax.data.image_decoding import decode
from parti_jax.data.image_decoding import UndecodablePicture


def _encode(array_or_image, image_format='png', **kwargs):
  image = array_or_image
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  data = io.BytesIO()
  image.save(data, image_format, **kwargs)
  return data.getvalue()


@pytest.mark.parametrize('image_format', ['png', 'jpeg', 'webp', 'gif'])
def test_formats(encode, image_format):
  image = decode(encode((200, 30, 60), (40, 40), image_format), 16)
  assert image.shape == (16, 16, 3) and image.dtype == np.uint8
  assert np.abs(image.astype(int) - (200, 30, 60)).max() <= 6


def test_the_right_size_is_unchanged():
  pixels = np.random.default_rng(0).integers(0, 256, [9, 9, 3], np.uint8)
  np.testing.assert_array_equal(decode(_encode(pixels), 9), pixels)


@pytest.mark.parametrize('shape', [(20, 60), (60, 20)])
def test_central_square(shape):
  pixels = np.zeros([*shape, 3], np.uint8)
  pixels[shape[0] // 2 - 10 : shape[0] // 2 + 10, shape[1] // 2 - 10 : shape[1] // 2 + 10] = 255
  assert (decode(_encode(pixels), 10) == 255).all()


@pytest.mark.parametrize('shape', [(20, 60), (60, 20), (40, 30)])
@pytest.mark.parametrize('size', [(8, 16), (24, 8)])
def test_the_middle_of_the_shape_of_the_size(shape, size):
  pixels = np.zeros([*shape, 3], np.uint8)
  times = min(shape[0] / size[0], shape[1] / size[1])
  top, left = (round((side - times * own) / 2) for side, own in zip(shape, size))
  pixels[top : shape[0] - top, left : shape[1] - left] = 255
  image = decode(_encode(pixels), size)
  assert image.shape == (*size, 3) and (image[2:-2, 2:-2] == 255).all()
  # What is cut off doesn't bleed in.
  turned = decode(_encode(255 - pixels), size)
  assert not turned[2:-2, 2:-2].any()


@pytest.mark.parametrize('turn', [1, 6])
def test_a_large_jpeg_in_a_size_that_is_not_square(turn):
  """It is decoded at a fraction of its size, before it is turned and cropped."""
  smooth = np.linspace(0, 255, 320).astype(np.uint8)
  pixels = np.broadcast_to(smooth[:, None, None], (320, 240, 3))
  upright = pixels if turn == 1 else np.rot90(pixels)  # The orientation 6 turns it back.
  exif = Image.Exif()
  exif[0x0112] = turn
  image = decode(_encode(np.ascontiguousarray(upright), 'jpeg', quality=95, exif=exif), (8, 16))
  # 120 of the 320 rows are left.
  expected = 255 * (100 + 15 * np.arange(8) + 7) / 319
  assert np.abs(image - expected[:, None, None]).max() < 5


def test_resizing_is_antialiased():
  checkers = (np.indices([64, 64]).sum(0) % 2 * 255).astype(np.uint8)
  image = decode(_encode(np.stack([checkers] * 3, -1)), 8)
  assert np.abs(image.astype(int) - 127).max() < 4


def test_transparency_is_white(encode):
  assert (decode(encode((255, 0, 0, 0)), 8) == 255).all()
  assert (decode(encode((255, 0, 0, 0), image_format='webp', lossless=True), 8) == 255).all()
  half = decode(encode((255, 0, 0, 128)), 8)
  assert (half[..., 0] == 255).all() and np.abs(half[..., 1].astype(int) - 127).max() <= 1
  palette = Image.new('RGB', (8, 8), 'red').quantize(2)
  assert (decode(_encode(palette), 8) == (255, 0, 0)).all()
  assert (decode(_encode(palette, transparency=palette.getpixel((0, 0))), 8) == 255).all()


def test_grey_16_bits_are_scaled():
  grey = np.full([8, 8], 128 * 257, np.uint16)
  assert (decode(_encode(grey), 8) == 128).all()


def test_first_frame_of_an_animation():
  frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
  data = _encode(frames[0], 'gif', save_all=True, append_images=frames[1:])
  assert (decode(data, 8) == (254, 0, 0)).all() or (decode(data, 8) == (255, 0, 0)).all()


def test_exif_orientation():
  pixels = np.zeros([8, 8, 3], np.uint8)
  pixels[:4] = 255
  exif = Image.Exif()
  exif[0x0112] = 3  # Upside down.
  image = decode(_encode(pixels, exif=exif), 8)
  assert (image[:4] == 0).all() and (image[4:] == 255).all()


def test_undecodable(encode):
  for data, reason in [
    (b'', 'no picture'),
    (b'<html>not found</html>', 'unknown picture format'),
    (encode((1, 2, 3), (50, 50), 'jpeg')[:-200], 'damaged picture'),
    (encode((1, 2, 3), (50, 50))[:60], 'damaged picture'),
  ]:
    with pytest.raises(UndecodablePicture, match=reason):
      decode(data, 8)
