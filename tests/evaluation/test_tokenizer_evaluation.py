"""What is measured of a tokenizer, and the command over each kind of pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import safetensors.numpy
import tiny_configs
from PIL import Image

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation import tokenizer_evaluation
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import reconstruction
from parti_jax.importers import lpips_files
from parti_jax.models import enhancing_vit_vqgan
from parti_jax.models import image_tokenizers
from parti_jax.models import lpips
from parti_jax.sampling import text_to_image

DEMO = text_to_image.DEMO_FOLDER
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 64, 64, 3), dtype=np.uint8)


def _demo():
  model = text_to_image.load(None)
  return model.reconstruct, model.tokenize


@pytest.fixture(scope='module', name='folder')
def fixture_folder(tmp_path_factory):
  """Pictures as an .npz and as files."""
  folder = tmp_path_factory.mktemp('pictures')
  np.savez(folder / 'pictures.npz', arr_0=IMAGES)
  (folder / 'files').mkdir()
  for index, image in enumerate(IMAGES):
    Image.fromarray(image).save(folder / 'files' / f'{index:04d}.png')
  return folder


def _alexnet(folder):
  """Files of LPIPS over AlexNet with random weights."""
  draw = np.random.default_rng(0)
  shapes = lpips_files.shapes('alexnet')
  arrays = {}
  for key_map in (lpips_files.network_key_map('alexnet'), lpips_files.heads_key_map()):
    for path, source in key_map.items():
      shape = shapes[path]
      if len(shape) == 4:
        shape = (shape[3], shape[2], *shape[:2])
      elif path.startswith('head'):
        shape = (1, shape[0], 1, 1)
      values = draw.normal(scale=0.05, size=shape)
      arrays[source.names[0]] = np.abs(values) if path.startswith('head') else values
  arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
  heads = {name for name in arrays if name.startswith('lin')}
  for file, names in (('alexnet', set(arrays) - heads), ('heads', heads)):
    safetensors.numpy.save_file(
      {name: arrays[name] for name in names}, folder / f'{file}.safetensors'
    )
  return [
    f'--alexnet_weights={folder / "alexnet.safetensors"}',
    f'--lpips_weights={folder / "heads.safetensors"}',
  ]


def _run(folder, *flags):
  assert (
    main.main(['evaluate_tokenizer', f'--tokenizer={DEMO}', f'--output_dir={folder}', *flags]) == 0
  )
  return measurement.read(str(folder / 'measurement.json'))


def test_the_command_measures_pairs_sets_and_codes(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(picture_sets, 'BLOCK', 20)
  flags = [f'--pictures={folder / "pictures.npz"}', *_alexnet(tmp_path)]
  found = _run(tmp_path / 'out', *flags)
  reconstruct, tokenize = _demo()
  expected = reconstruct(IMAGES)
  psnr = reconstruction.psnr(expected, IMAGES)
  assert found.values['psnr'].value == pytest.approx(psnr.mean(), rel=1e-4)
  assert found.values['psnr'].error == pytest.approx(psnr.std(ddof=1) / 37**0.5, rel=1e-3)
  ssim = reconstruction.ssim(jnp.asarray(expected), jnp.asarray(IMAGES))
  assert found.values['ssim'].value == pytest.approx(float(ssim.mean()), abs=1e-4)
  params = lpips_files.read(
    tmp_path / 'alexnet.safetensors', tmp_path / 'heads.safetensors', 'alexnet'
  )
  pair = (jnp.asarray(images / np.float32(255)) for images in (expected, IMAGES))
  distance = jax.jit(lpips.LPIPS(network='alexnet').apply)({'params': params}, *pair)
  assert found.values['lpips'].value == pytest.approx(float(distance.mean()), rel=1e-3)
  counts = np.bincount(tokenize(IMAGES).ravel(), minlength=1024)
  assert found.values['codes_used'].value == pytest.approx((counts > 0).mean())
  assert found.values['code_perplexity'].value == pytest.approx(
    reconstruction.code_use(counts).perplexity
  )
  assert found.values['frechet_distance'].value > 0 and 'rfid' not in found.values
  assert found.protocol['lpips']['network'] == 'alexnet' and found.protocol['pictures'] == 37
  assert found.subject['tokenizer']['kind'] == 'vit_vqgan'

  # A second command computes nothing again, and the same pictures as files give the same numbers.
  def refuse(*_):
    raise AssertionError('a block was computed again')

  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_evaluation, '_compute_block', refuse)
    assert _run(tmp_path / 'out', *flags).values == found.values
  of_files = _run(tmp_path / 'files', f'--pictures={folder / "files"}', *flags[1:])
  assert of_files.values == found.values and of_files.protocol == found.protocol


def test_a_source_and_its_first_pictures(tmp_path, monkeypatch):
  monkeypatch.setattr(picture_sets, 'BLOCK', 20)
  flags = ['--source=openmoji', '--split=validation']
  found = _run(tmp_path / 'out', *flags, '--max_pictures=30')
  assert found.protocol['pictures'] == 40 and 'openmoji' in found.subject['pictures']
  assert any('LPIPS: left out' in remark for remark in found.remarks)
  assert any('tokens are few for 1,024 codes' in remark for remark in found.remarks)


def test_another_run_is_refused(folder, tmp_path, capsys):
  _run(tmp_path / 'out', f'--pictures={folder / "files"}')
  command = ['evaluate_tokenizer', f'--tokenizer={DEMO}', f'--output_dir={tmp_path / "out"}']
  assert main.main([*command, f'--pictures={folder / "pictures.npz"}']) == 2
  assert 'another run, with pictures' in capsys.readouterr().err


@pytest.mark.parametrize(
  'flags, named',
  [
    (['--pictures=a', '--tfds=b'], '--pictures and --tfds both give the pictures'),
    (['--pictures=a', '--split=b'], '--split is of a source'),
    (['--pictures=a', '--gin.folder.path=b'], '--gin is of a source'),
    (['--tfds_dir=a'], '--tfds_dir needs --tfds'),
    (['--max_pictures=0'], '--max_pictures'),
    (['--lpips_weights=a'], 'LPIPS needs --lpips_weights FILE and one of'),
    (['--vgg16_weights=a'], 'LPIPS needs --lpips_weights FILE and one of'),
    (['--vgg16_weights=a', '--alexnet_weights=b', '--lpips_weights=c'], 'drop one'),
    (['--inception_weights=nowhere'], "nowhere isn't a file"),
    ([], '--tokenizer nowhere does not exist; give the folder of a run'),
  ],
)
def test_bad_flags(flags, named, capsys):
  assert main.main(['evaluate_tokenizer', '--tokenizer=nowhere', *flags]) == 2
  assert named in capsys.readouterr().err


_OF_EACH_KIND = (
  dataclasses.replace(tiny_configs.TOKENIZER, image_size=16),
  dataclasses.replace(tiny_configs.VQGAN, image_size=16),
  enhancing_vit_vqgan.EnhancingViTVQGANConfig(
    image_size=16,
    patch_size=8,
    layers=1,
    width=8,
    mlp_width=16,
    heads=2,
    codebook_size=6,
    code_dim=4,
  ),
)


@pytest.mark.parametrize('config', _OF_EACH_KIND, ids=image_tokenizers.CONFIGS.name_of)
def test_every_kind_of_tokenizer_is_reconstructed(config):
  module = image_tokenizers.module(config)
  params = random_parameters.of(module, image_tokenizers.example_inputs(config))
  images = IMAGES[:3, :16, :16]
  found = tokenizer_evaluation.Reconstructor(config, params)(images)
  assert found.images.shape == images.shape and found.images.dtype == np.uint8
  assert found.tokens.shape == (3, config.image_length) and found.lpips is None
  one = tokenizer_evaluation.Reconstructor(config, params)(images[1:2])
  np.testing.assert_array_equal(one.images[0], found.images[1])


def test_pictures_that_are_too_small_are_refused():
  with pytest.raises(UserError, match='pictures of 8 pixels are smaller than 11'):
    tokenizer_evaluation.Reconstructor(tiny_configs.TOKENIZER, {})
  config = dataclasses.replace(tiny_configs.TOKENIZER, image_size=16)
  perceptual = tokenizer_evaluation.Perceptual('alexnet', {}, ('', ''))
  with pytest.raises(UserError, match='pictures of 16 pixels are smaller than 31'):
    tokenizer_evaluation.Reconstructor(config, {}, perceptual)


def test_all_parameters_are_in_the_digest():
  params = {'encoder': {'a': np.zeros(3)}, 'decoder': {'b': np.ones((2, 2))}}
  digest = tokenizer_evaluation.params_digest(params)
  assert len(digest) == 64
  params['decoder']['b'][0, 0] = 2
  assert tokenizer_evaluation.params_digest(params) != digest
