"""Real-ESRGAN: `parti-jax import super_resolution`, and what all commands do with the folder."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.importers import real_esrgan as importer
from parti_jax.models import real_esrgan
from parti_jax.models import upscalers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement
from parti_jax.sampling import upscaling

RRDB = real_esrgan.RRDBNetConfig(blocks=1, width=8, growth=4, dtype='float32')
COMPACT = real_esrgan.SRVGGNetCompactConfig(layers=1, width=8, dtype='float32')


def _rrdb(**sizes):
  return real_esrgan.RRDBNetConfig(width=4, growth=2, dtype='float32', **sizes)


def _parameters(config, seed=0):
  """{path: random values} of a network whose pictures are near [0, 1]."""
  draw = np.random.default_rng(seed)
  found = {}
  for path, shape in importer.expected(config).items():
    scale = 0.7 / np.sqrt(np.prod(shape[-4:-1])) if path.endswith('kernel') else 0.1
    found[path] = draw.normal(0.5 if path == 'tail/bias' else 0, scale, shape).astype(np.float32)
  return found


def _write(file, config, parameters):
  """Writes parameters with Real-ESRGAN's names and torch's layout."""
  anchor = 'params.body.0.rdb1.conv1' if config == RRDB else 'params.body.0'
  arrays = {}
  for path, source in importer.key_map(config, {f'{anchor}.weight': None}).items():
    stack = parameters[path] if source.stacked else parameters[path][None]
    for name, array in zip(source.names, stack, strict=True):
      if path == 'tail/kernel' and config == COMPACT:
        array = array.reshape(*array.shape[:3], 16, 3).swapaxes(-1, -2).reshape(array.shape)
      if path == 'tail/bias' and config == COMPACT:
        array = array.reshape(16, 3).swapaxes(0, 1).reshape(-1)
      arrays[name] = np.ascontiguousarray(
        array.transpose(3, 2, 0, 1) if path.endswith('kernel') else array
      )
  safetensors.numpy.save_file(arrays, file)


def _import(file, folder, *flags, file_format='real-esrgan'):
  command = ['import', 'super_resolution', str(file), f'--format={file_format}']
  return main.main([*command, f'--output_dir={folder}', *flags])


@pytest.fixture(scope='session', name='files')
def fixture_files(tmp_path_factory):
  """{config: a file with random weights}."""
  folder = tmp_path_factory.mktemp('weights')
  found = {RRDB: folder / 'rrdb.safetensors', COMPACT: folder / 'compact.safetensors'}
  for config, file in found.items():
    _write(file, config, _parameters(config))
  return found


@pytest.fixture(scope='session', name='imported')
def fixture_imported(files, tmp_path_factory):
  """{config: the folder of its import}."""
  folder = tmp_path_factory.mktemp('imported')
  found = {config: folder / file.stem for config, file in files.items()}
  for config, path in found.items():
    assert _import(files[config], path, '--source=somewhere', '--licence=BSD-3-Clause') == 0
  return found


def _pictures(*shape):
  return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize('config', [RRDB, COMPACT])
def test_parameters_config_and_origin_are_in_the_folder(imported, config, capsys):
  folder = imported[config]
  part = model_folder.load_part('super_resolution', folder)
  assert part.config == config
  read = flax.traverse_util.flatten_dict(part.params, sep='/')
  parameters = _parameters(config)
  assert set(read) == set(parameters)
  for path, array in parameters.items():
    np.testing.assert_array_equal(read[path], array)
  capsys.readouterr()
  assert main.main(['info', str(folder)]) == 0
  shown = capsys.readouterr().out
  assert 'a super-resolution network' in shown and 'BSD-3-Clause' in shown


@pytest.mark.parametrize('config', [RRDB, COMPACT])
def test_pictures_are_those_of_the_module(imported, config):
  images = _pictures(2, 5, 6)
  params = flax.traverse_util.unflatten_dict(_parameters(config), sep='/')
  pixels = upscalers.module(config).apply({'params': params}, jnp.asarray(images / np.float32(255)))
  enlarged = upscaling.load(imported[config])(images)
  assert enlarged.shape == (2, 20, 24, 3)
  assert np.abs(np.clip(pixels, 0, 1) * 255 - enlarged).max() < 0.51
  assert enlarged.std() > 5


@pytest.mark.parametrize(
  'config, size',
  [
    (RRDB, (87, 90)),
    (_rrdb(factor=2, blocks=1, unshuffle=2), (175, 182)),
    (_rrdb(blocks=7), (388, 130)),  # With a receptive field larger than its reach.
    (COMPACT, (22, 15)),
  ],
)
def test_a_large_picture_in_parts_is_as_in_whole(config, size, monkeypatch):
  upscaler = upscaling.Upscaler(
    config, flax.traverse_util.unflatten_dict(_parameters(config), sep='/'), placement.Placement()
  )
  images = _pictures(1, *size)
  monkeypatch.setattr(upscaling, '_LARGEST_SIDE', 1000)
  whole = upscaler(images)
  monkeypatch.setattr(upscaling, '_LARGEST_SIDE', 1)  # As small as the network's reach allows.
  windows = []
  run = placement.Placement.run

  def spy(self, function, params, arrays, **statics):
    windows.append(arrays[0].shape)
    return run(self, function, params, arrays, **statics)

  monkeypatch.setattr(placement.Placement, 'run', spy)
  parts = upscaler(images)
  assert parts.shape == whole.shape == (1, size[0] * config.factor, size[1] * config.factor, 3)
  assert np.abs(parts.astype(int) - whole).max() <= 1
  assert windows[0][1] < size[0] and sum(shape[0] for shape in windows) > 1


def test_on_a_mesh_the_pictures_are_the_same(imported):
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  images = _pictures(3, 4, 6)
  sharded = upscaling.load(imported[RRDB], placement.Placement(mesh))(images)
  assert np.abs(sharded.astype(int) - upscaling.load(imported[RRDB])(images)).max() <= 1


def test_generate_enlarges_with_it_as_with_the_models_own(imported, tiny_folder, tmp_path):
  exported = tmp_path / 'model'
  export = ['export', f'--base={tiny_folder}', f'--super_resolution={imported[RRDB]}']
  assert main.main([*export, f'--output_dir={exported}']) == 0
  origin = json.loads((exported / 'config.json').read_text())['provenance']['super_resolution']
  assert origin['licence'] == 'BSD-3-Clause'
  flags = ([f'--model={tiny_folder}', f'--upscaler={imported[RRDB]}'], [f'--model={exported}'])
  found = []
  for place, more in enumerate((flags[0], [*flags[1], '--upscale'])):
    folder = tmp_path / str(place)
    generate = ['generate', 'red apple', '--num_images=2', f'--output_dir={folder}', *more]
    assert main.main(generate) == 0
    path = folder / 'red-apple_seed0_1_x4.png'
    assert images_lib.read_metadata(path)['upscaled'] == '4'
    found.append(np.asarray(Image.open(path)))
  assert found[0].shape == (32, 32, 3)
  np.testing.assert_array_equal(*found)
  # It takes the place of the model's own.
  other = parti_jax.load(exported, upscaler=imported[COMPACT])
  images = _pictures(1, 8, 8)
  np.testing.assert_array_equal(other.upscale(images), upscaling.load(imported[COMPACT])(images))


def test_evaluate_upscaling_measures_it(imported, tiny_folder, tmp_path, capsys):
  pictures = tmp_path / 'pictures'
  pictures.mkdir()
  lines = []
  for index, picture in enumerate(_pictures(2, 32, 32)):
    Image.fromarray(picture).save(pictures / f'{index}.png')
    lines.append(json.dumps({'file': f'{index}.png', 'caption': 'a picture'}))
  (pictures / 'validation.jsonl').write_text('\n'.join(lines))
  evaluate = ['evaluate_upscaling', '--source=folder', f'--model={tiny_folder}']
  evaluate += [f"--gin.folder.path='{pictures}'", f'--output_dir={tmp_path}/report']
  evaluate += ["--gin.folder.splits={'validation': 'validation.jsonl'}"]
  assert main.main(evaluate) == 2
  assert (
    'no super-resolution' in (error := capsys.readouterr().err) and '--upscaler=FOLDER' in error
  )
  assert main.main([*evaluate, f'--upscaler={imported[COMPACT]}']) == 0
  report = json.loads((tmp_path / 'report' / 'report.json').read_text())
  assert (report['pictures'], report['small_size'], report['large_size']) == (2, 8, 32)


def test_a_folder_without_one_is_named(tiny_folder, tmp_path, capsys):
  generate = ['generate', 'red apple', f'--model={tiny_folder}', f'--upscaler={tiny_folder}']
  assert main.main([*generate, f'--output_dir={tmp_path}/pictures']) == 2
  assert 'has no super-resolution network' in capsys.readouterr().err
  assert not (tmp_path / 'pictures').exists()
  with pytest.raises(UserError, match='upscaler=3 must be a string'):
    upscaling.load(3)


def test_weights_between_two_files_are_denoised_between_them(files, imported, tmp_path):
  second = tmp_path / 'wdn.safetensors'
  _write(second, COMPACT, _parameters(COMPACT, seed=1))
  mix = [f'--interpolate_with={second}']
  for name, flags, share in (('half', [], 0.5), ('none', ['--denoise_strength=0'], 0.0)):
    assert _import(files[COMPACT], tmp_path / name, *mix, *flags) == 0
    read = model_folder.load_part('super_resolution', tmp_path / name).params
    for path, array in flax.traverse_util.flatten_dict(read, sep='/').items():
      first, other = (_parameters(COMPACT, seed)[path] for seed in (0, 1))
      np.testing.assert_allclose(array, share * first + (1 - share) * other, rtol=1e-5, atol=1e-7)
    config = json.loads((tmp_path / name / 'config.json').read_text())
    origin = config['provenance']['super_resolution']
    assert origin['denoise_strength'] == share
    assert origin['files'] == ['compact.safetensors', 'wdn.safetensors']


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--denoise_strength=0.5'], '--denoise_strength needs --interpolate_with=FILE'),
    (['--interpolate_with={second}', '--denoise_strength=1.5'], '--denoise_strength=1.5 must lie'),
    (['--interpolate_with={second}', '--denoise_strength=nan'], '--denoise_strength=nan must lie'),
    (['--interpolate_with={second}'], 'have different arrays, such as params.body.0.bias'),
    (['--interpolate_with=missing.pth'], 'missing.pth does not exist'),
    (['--vocabulary=words'], '--vocabulary does not apply to --format=real-esrgan'),
  ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(files, tmp_path, capsys, flags, message):
  folder = tmp_path / 'upscaler'
  flags = [flag.format(second=files[COMPACT]) for flag in flags]
  assert _import(files[RRDB], folder, *flags) == 2
  error = capsys.readouterr().err.strip()
  assert message in error and '\n' not in error
  assert not folder.exists()


def test_weights_of_other_networks_are_refused(tmp_path, capsys):
  file, folder = tmp_path / 'net.safetensors', tmp_path / 'upscaler'
  safetensors.numpy.save_file({'params.head.weight': np.zeros([3, 3, 3, 3], np.float32)}, file)
  assert _import(file, folder) == 2
  assert 'the weights are not of the format real-esrgan' in capsys.readouterr().err
  file.write_bytes(b'\x00' * 100)
  assert _import(file, folder) == 2
  assert 'damaged or unfinished' in capsys.readouterr().err
  assert _import(file, folder, file_format='taming') == 2
  assert 'choose from real-esrgan' in capsys.readouterr().err
  assert not folder.exists()
