"""Enlarging pictures: in parts as in whole, and what can't be enlarged is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import super_resolution
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement
from parti_jax.sampling import upscaling


@pytest.fixture
def upscaler(enlarger):
  return upscaling.Upscaler(enlarger.config, enlarger.params, placement.Placement())


def pictures(*shape):
  return np.random.default_rng(0).integers(0, 256, shape + (3,)).astype(np.uint8)


def test_it_is_the_network_of_the_model(enlarger, upscaler):
  images = pictures(3, 4, 6)
  config, params, *_ = enlarger
  pixels = super_resolution.SuperResolution(config).apply(
    {'params': params}, jnp.asarray(images / np.float32(255))
  )
  enlarged = upscaler(images)
  assert enlarged.shape == (3, 4 * upscaler.factor, 6 * upscaler.factor, 3)
  assert enlarged.dtype == np.uint8
  assert np.abs(np.clip(pixels, 0, 1) * 255 - enlarged).max() < 0.51


def test_a_large_picture_in_parts_is_as_in_whole(upscaler, monkeypatch):
  images = pictures(2, 58, 96)
  whole = upscaler(images)
  monkeypatch.setattr(upscaling, '_LARGEST_SIDE', 1)  # As small as the network's reach allows.
  monkeypatch.setattr(upscaling, '_MOST_BYTES', 100_000)  # Several batches.
  shapes = []
  run = placement.Placement.run

  def spy(self, function, params, arrays, **statics):
    shapes.append(arrays[0].shape)
    return run(self, function, params, arrays, **statics)

  monkeypatch.setattr(placement.Placement, 'run', spy)
  parts = upscaler(images)
  assert np.abs(parts.astype(int) - whole).max() <= 1
  assert len(shapes) > 2 and shapes[0][1] < 58 and shapes[0][2] < 96 and len(set(shapes)) == 1


def test_on_a_mesh_the_pictures_are_the_same(enlarger, upscaler):
  mesh = mesh_lib.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
  sharded = upscaling.Upscaler(enlarger.config, enlarger.params, placement.Placement(mesh))
  images = pictures(3, 4, 6)
  assert np.abs(sharded(images).astype(int) - upscaler(images)).max() <= 1


def test_sides_that_the_network_can_not_take_are_extended_by_reflection(upscaler):
  images = pictures(2, 5, 6)
  mirrored = np.concatenate([images, images[:, -2:-1]], axis=1)
  odd = upscaler(images)
  assert odd.shape == (2, 5 * upscaler.factor, 6 * upscaler.factor, 3)
  np.testing.assert_array_equal(odd, upscaler(mirrored)[:, : 5 * upscaler.factor])
  assert upscaler(pictures(1, 1, 1)).shape == (1, upscaler.factor, upscaler.factor, 3)


@pytest.mark.parametrize(
  'images',
  [np.zeros((1, 4, 4, 3), np.float32), pictures(4, 4), pictures(0, 4, 4)],
)
def test_what_can_not_be_enlarged(upscaler, images):
  with pytest.raises(UserError, match='images are'):
    upscaler(images)


def test_a_pipeline_enlarges_what_it_draws(parts, enlarger, tmp_path):
  folder = model_folder.save(
    tmp_path / 'model', parts={'super_resolution': enlarger}, dtype='float32', **parts
  )
  pipeline = parti_jax.load(folder)
  result = pipeline.generate(['red apple', 'blue ball'], num_images=2, upscale=True)
  assert result.images.shape == (2, 2, 8, 8, 3) and result.upscaled.shape == (2, 2, 16, 16, 3)
  np.testing.assert_array_equal(
    result.upscaled.reshape(4, 16, 16, 3), pipeline.upscale(result.images.reshape(4, 8, 8, 3))
  )
  assert pipeline.generate('red apple', num_images=1).upscaled is None
  assert (
    main.main(
      [
        'generate',
        'red apple',
        '--num_images=2',
        f'--model={folder}',
        '--upscale',
        f'--output_dir={tmp_path}/pictures',
      ]
    )
    == 0
  )
  path = tmp_path / 'pictures' / 'red-apple_seed0_1_x2.png'
  np.testing.assert_array_equal(np.asarray(Image.open(path)), result.upscaled[0, 1])
  assert images_lib.read_metadata(path)['upscaled'] == '2'
  assert (tmp_path / 'pictures' / 'red-apple_seed0_grid_x2.png').is_file()


def test_a_model_that_can_not_enlarge_says_so(tiny_folder, tmp_path, capsys):
  pipeline = parti_jax.load(tiny_folder)
  assert pipeline.upscaler is None
  with pytest.raises(UserError, match='the model tiny has no super-resolution.*export --base'):
    pipeline.upscale(pictures(1, 8, 8))
  assert (
    main.main(
      [
        'generate',
        'red apple',
        f'--model={tiny_folder}',
        '--upscale',
        f'--output_dir={tmp_path}/pictures',
      ]
    )
    == 2
  )
  assert 'no super-resolution' in capsys.readouterr().err
  assert not (tmp_path / 'pictures').exists()
