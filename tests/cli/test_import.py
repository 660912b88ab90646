"""Tests of `parti-jax import`, and of what the other commands do with an imported tokenizer."""

import json

import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core import errors
from parti_jax.exported_model import model_folder
from parti_jax.importers import vqgan as importer
from parti_jax.models import vqgan
from parti_jax.sampling import text_to_image

CONFIG = vqgan.VQGANConfig(
  image_size=16,
  channels=32,
  multipliers=(1, 1, 1),
  res_blocks=1,
  decoder_res_blocks=1,
  z_channels=32,
  codebook_size=64,
  quantizer='cosine',
  output='pixels',
  dtype='float32',
)


@pytest.fixture(scope='module')
def parameters():
  draw = np.random.default_rng(0)
  return {
    path: (draw.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1))).astype(np.float32)
    for path, shape in importer.expected(CONFIG).items()
  }


@pytest.fixture(scope='module')
def weights(parameters, tmp_path_factory):
  """The parameters in a file with LlamaGen's names and torch's layout."""
  anchor = {'encoder.conv_blocks.0.res.0.conv1.weight': None}
  foreign = {}
  for path, source in importer.key_map(CONFIG, anchor, 'llamagen').items():
    array = parameters[path]
    (name,) = source.names
    foreign[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)
  file = tmp_path_factory.mktemp('weights') / 'vq.safetensors'
  safetensors.numpy.save_file(foreign, file)
  return file


@pytest.fixture(scope='module')
def imported(weights, tmp_path_factory):
  folder = tmp_path_factory.mktemp('imported') / 'tokenizer'
  command = ['import', 'tokenizer', str(weights), '--format=llamagen', f'--output_dir={folder}']
  assert main.main([*command, '--image_size=16', '--source=somewhere', '--licence=MIT']) == 0
  return folder


def test_parameters_config_and_origin_are_in_the_folder(imported, parameters, capsys):
  part = model_folder.load_part('tokenizer', imported)
  assert part.config == CONFIG
  read = flax.traverse_util.flatten_dict(part.params, sep='/')
  assert set(read) == set(parameters)
  for path, array in parameters.items():
    np.testing.assert_array_equal(read[path], array)
  origin = json.loads((imported / 'config.json').read_text())['provenance']['tokenizer']
  assert origin['source'] == 'somewhere' and origin['licence'] == 'MIT'
  assert origin['files'] == ['vq.safetensors'] and len(origin['sha256']) == 64
  assert main.main(['info', str(imported)]) == 0
  shown = capsys.readouterr().out
  assert 'an image tokenizer' in shown and '16 image tokens' in shown and 'MIT' in shown


def test_the_whole_chain_runs_on_an_imported_tokenizer(imported, tmp_path):
  pictures = tmp_path / 'pictures'
  pictures.mkdir()
  draw = np.random.default_rng(1)
  lines = []
  for index in range(8):
    Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(pictures / f'{index}.png')
    lines.append(json.dumps({'file': f'{index}.png', 'caption': f'picture {index}'}))
  (pictures / 'train.jsonl').write_text('\n'.join(lines))
  tokens, run, model = (tmp_path / name for name in ('tokens', 'run', 'model'))
  vocabulary = text_to_image.DEMO_FOLDER / 'vocabulary.model'
  tokenize = [
    'tokenize',
    '--gin_file=gin_configs/tasks/folder.gin',
    f'--tokenizer={imported}',
    f'--output_dir={tokens}',
  ]
  bindings = [f"--gin.folder.path='{pictures}'", "--gin.folder.splits={'train': 'train.jsonl'}"]
  assert main.main([*tokenize, *bindings]) == 0
  info = json.loads((tokens / 'info.json').read_text())
  assert (info['codebook_size'], info['grid']) == (64, [4, 4])
  train = ['train', '--gin_file=gin_configs/runs/tiny_generator.gin', f'--model_dir={run}']
  settings = [
    f"--gin.token_cache.path='{tokens}'",
    '--gin.train.batch_size=8',
    '--gin.train.steps=1',
    '--gin.train.eval_split=None',
    '--gin.PartiConfig.grid=(4,4)',
    '--gin.PartiConfig.codebook_size=64',
    f"--gin.GeneratorObjective.tokenizer='{imported}'",
    '--gin.train.pictures_every=1',
    '--gin.train.num_pictures=2',
  ]
  assert main.main([*train, *settings]) == 0
  assert list((run / 'pictures').iterdir())
  export = ['export', f'--tokenizer={imported}', f'--generator={run}', f'--output_dir={model}']
  assert main.main([*export, f'--vocabulary={vocabulary}']) == 0
  loaded = parti_jax.load(model)
  assert loaded.provenance['tokenizer']['source'] == 'somewhere'
  assert loaded.generate(['picture 1'], seed=0).images.shape == (1, 4, 16, 16, 3)


@pytest.mark.parametrize(
  'flags, named',
  [
    (['--format=taming'], 'llamagen'),
    (['--format=llamagen', '--image_size=18'], 'image_size=18'),
    (['--format=llamagen', '--pixel_range', '1', '0'], 'pixel_range'),
  ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(weights, tmp_path, capsys, flags, named):
  folder = tmp_path / 'tokenizer'
  command = ['import', 'tokenizer', str(weights), f'--output_dir={folder}']
  assert main.main([*command, *flags]) == 2
  error = capsys.readouterr().err.strip()
  assert named in error and '\n' not in error
  assert not folder.exists()


def test_a_folder_is_replaced_only_where_that_is_asked_for(weights, imported, capsys):
  before = (imported / 'config.json').read_bytes()
  command = ['import', 'tokenizer', str(weights), '--format=llamagen', f'--output_dir={imported}']
  assert main.main(command) == 2
  assert str(imported) in capsys.readouterr().err
  assert (imported / 'config.json').read_bytes() == before


def test_an_unknown_kind_is_named(imported, tmp_path, capsys):
  config = json.loads((imported / 'config.json').read_text())
  config['tokenizer']['kind'] = 'other'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'tokenizer.safetensors').write_bytes(
    (imported / 'tokenizer.safetensors').read_bytes()
  )
  command = ['export', f'--tokenizer={tmp_path}', '--base=demo', f'--output_dir={tmp_path}/model']
  with pytest.raises(errors.UserError, match='tokenizer.kind=.other. is not one of vit_vqgan'):
    model_folder.load_part('tokenizer', tmp_path)
  assert main.main(command) == 2


def test_settings_that_decide_tokens_are_part_of_the_fingerprint(weights, imported, tmp_path):
  command = ['import', 'tokenizer', str(weights), '--format=llamagen', '--image_size=16']
  other = [*command, f'--output_dir={tmp_path}/other', '--pixel_range', '0', '1']
  assert main.main(other) == 0
  assert main.main([*command, f'--output_dir={tmp_path}/same']) == 0
  first, same, other = (
    model_folder.load_part('tokenizer', folder).made_with['tokenizer']
    for folder in (imported, tmp_path / 'same', tmp_path / 'other')
  )
  assert first == same != other
