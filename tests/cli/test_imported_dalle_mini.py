"""DALL·E mini from elsewhere: import, generate in all ways, train further, export."""

import json
import shutil

import flax.serialization
import flax.traverse_util
import further_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_dalle_mini
from PIL import Image

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.importers import vqgan as vqgan_importer
from parti_jax.models import dalle_mini
from parti_jax.models import generators
from parti_jax.models import vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import continuous
from parti_jax.sampling import text_to_image

CODES = tiny_dalle_mini.CODES
VQGAN = vqgan.VQGANConfig(
  image_size=8,
  channels=32,
  multipliers=(1, 1),
  res_blocks=1,
  decoder_res_blocks=1,
  z_channels=8,
  code_dim=4,
  codebook_size=CODES,
  quantizer='euclidean',
  pixel_range=(0.0, 1.0),
  output='pixels',
  dtype='float32',
)


def _write_vqgan(folder):
  """Weights of the image tokenizer, with dalle-mini's names."""
  draw = np.random.default_rng(0)
  anchor = {'encoder/down_0/block_0/conv1/kernel': None}
  sources = vqgan_importer.key_map(VQGAN, anchor, 'dalle-mini')
  tree = {}
  for path, shape in vqgan_importer.expected(VQGAN).items():
    scale = np.sqrt(max(np.prod(shape[:-1]), 1))
    tree[sources[path].names[0]] = np.asarray(draw.normal(size=shape) / scale, np.float32)
  content = flax.serialization.msgpack_serialize(flax.traverse_util.unflatten_dict(tree, sep='/'))
  folder.mkdir()
  (folder / 'flax_model.msgpack').write_bytes(content)


@pytest.fixture(scope='module', name='sources')
def fixture_sources(tmp_path_factory):
  """Folders as they are downloaded: dalle_mini and vqgan."""
  folder = tmp_path_factory.mktemp('downloaded')
  tiny_dalle_mini.write(folder / 'dalle_mini')
  _write_vqgan(folder / 'vqgan')
  return folder


def _count(model):
  """Number of values of the generator's parameters."""
  return json.loads((model / 'config.json').read_text())['parameters']['generator']


def _import(sources, model, *others):
  command = ['import', 'generator', str(sources / 'dalle_mini'), '--format=dalle-mini']
  tokenizer = [f'--tokenizer={sources / "vqgan"}', '--image_size=8']
  return main.main([*command, *tokenizer, f'--output_dir={model}', *others])


@pytest.fixture(scope='module', name='model')
def fixture_model(sources, tmp_path_factory):
  folder = tmp_path_factory.mktemp('imported') / 'model'
  assert _import(sources, folder, '--source=somewhere', '--licence=Apache-2.0') == 0
  return folder


def test_the_folder_is_a_whole_model(model):
  found = model_folder.load(model)
  assert isinstance(found.generator_config, dalle_mini.DalleMiniConfig)
  assert found.tokenizer_config == VQGAN
  assert found.sampling.guidance_scale == 10
  origin = json.loads((model / 'config.json').read_text())['provenance']
  generator, tokenizer = origin['generator'], origin['tokenizer']
  assert (generator['source'], generator['licence']) == ('somewhere', 'Apache-2.0')
  assert (generator['start_token'], generator['text_normalizer']) == (CODES, 'min_dalle')
  assert tokenizer['files'] == ['flax_model.msgpack']
  assert tokenizer['sha256'] != generator['sha256']
  rows = tiny_dalle_mini.arrays()['model/decoder/embed_tokens/embedding']
  np.testing.assert_array_equal(found.generator_params['image_decoder']['begin'], rows[CODES])


def test_the_image_tokenizer_may_have_been_imported_before(sources, model, tmp_path):
  alone = tmp_path / 'tokenizer'
  weights = str(sources / 'vqgan' / 'flax_model.msgpack')
  command = ['import', 'tokenizer', weights, '--format=dalle-mini', f'--output_dir={alone}']
  assert main.main([*command, '--image_size=8', '--licence=MIT']) == 0
  command = ['import', 'generator', str(sources / 'dalle_mini'), '--format=dalle-mini']
  flags = [
    f'--tokenizer={alone}',
    f'--output_dir={tmp_path / "model"}',
    f'--start_token={CODES + 1}',
  ]
  assert main.main([*command, *flags, '--text_normalizer=dalle_mini']) == 0
  found, other = model_folder.load(tmp_path / 'model'), model_folder.load(model)
  jax.tree.map(
    lambda one, two: np.testing.assert_array_equal(np.asarray(one), np.asarray(two)),
    found.tokenizer_params,
    other.tokenizer_params,
  )
  rows = tiny_dalle_mini.arrays()['model/decoder/embed_tokens/embedding']
  np.testing.assert_array_equal(found.generator_params['image_decoder']['begin'], rows[CODES + 1])
  origin = json.loads((tmp_path / 'model' / 'config.json').read_text())['provenance']
  assert origin['tokenizer']['licence'] == 'MIT'
  assert origin['generator']['text_normalizer'] == 'dalle_mini'


def test_files_of_another_model_are_refused(sources, model, tmp_path):
  """The folder's files belong together; their sizes alone don't say so."""
  changed = tmp_path / 'changed'
  shutil.copytree(model, changed)
  vocabulary = (model / 'vocabulary.model').read_bytes()
  other = vocabulary.replace(
    b'"parti_jax_normalizer": "min_dalle"', b'"parti_jax_normalizer": "dalle_mini"'
  )
  assert other != vocabulary
  (changed / 'vocabulary.model').write_bytes(other)
  with pytest.raises(UserError, match='the generator was made with the vocabulary'):
    model_folder.load(changed)
  (changed / 'vocabulary.model').write_bytes(vocabulary)
  rounded = tmp_path / 'rounded'
  weights = str(sources / 'vqgan' / 'flax_model.msgpack')
  command = ['import', 'tokenizer', weights, '--format=dalle-mini', '--image_size=8']
  assert main.main([*command, f'--output_dir={rounded}', '--dtype=bfloat16']) == 0
  own = model_folder.load_part('tokenizer', rounded).made_with['tokenizer']
  # Rounded when it is stored, as `tokenize` and `import generator` then read it.
  command = ['import', 'generator', str(sources / 'dalle_mini'), '--format=dalle-mini']
  command += [f'--tokenizer={rounded}', f'--output_dir={tmp_path / "model"}']
  assert main.main(command) == 0
  found = model_folder.load(tmp_path / 'model').made_with
  assert found['tokenizer']['tokenizer'] == found['generator']['tokenizer'] == own
  draw = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: draw.normal(size=leaf.shape).astype(np.float32),
    model_folder.load(model).tokenizer_params,
  )
  another = tmp_path / 'another'
  part = model_folder.Part(VQGAN, params)
  model_folder.save_part(another, 'tokenizer', part, {'tokenizer': 'random'})
  shutil.copy(another / 'tokenizer.safetensors', changed)
  with pytest.raises(UserError, match='the generator was made with the tokenizer'):
    model_folder.load(changed)


def test_files_of_min_dalle_give_the_same_model(sources, model, tmp_path):
  for tower, arrays in tiny_dalle_mini.towers().items():
    safetensors.numpy.save_file(arrays, tmp_path / f'{tower}.safetensors')
  files = [str(tmp_path / f'{tower}.safetensors') for tower in ('encoder', 'decoder')]
  command = [
    'import',
    'generator',
    *files,
    '--format=min-dalle',
    f'--output_dir={tmp_path / "model"}',
  ]
  tokenizer = [f'--tokenizer={sources / "vqgan"}', '--image_size=8']
  text = [f'--vocabulary={sources / "dalle_mini"}']
  config = [f'--config={sources / "dalle_mini" / "config.json"}']
  assert main.main([*command, *tokenizer, *text, *config]) == 0
  for name in ('generator.safetensors', 'tokenizer.safetensors', 'vocabulary.model'):
    assert (tmp_path / 'model' / name).read_bytes() == (model / name).read_bytes()


def test_what_is_missing_or_does_not_apply_is_named(sources, model, tmp_path, capsys):
  def fails(*command):
    assert main.main([str(part) for part in command]) == 2
    return capsys.readouterr().err

  start = ('import', 'generator', sources / 'dalle_mini', '--format=dalle-mini')
  out = f'--output_dir={tmp_path / "out"}'
  vqgan_folder = f'--tokenizer={sources / "vqgan"}'
  assert '--tokenizer is required' in fails(*start, out)
  # The VQGAN of the published size has 16×16 tokens.
  assert 'but the weights have rows for 15 codes' in fails(*start, vqgan_folder, out)
  assert '--image_size is for weights' in fails(
    *start, f'--tokenizer={model}', '--image_size=8', out
  )
  flags = (vqgan_folder, '--image_size=8', out)
  assert 'has neither vocab.json and merges.txt' in fails(
    *start, *flags, f'--vocabulary={sources / "vqgan"}'
  )
  assert 'decoder_start_token_id' in fails(*start, *flags, '--start_token=16')
  assert 'does not apply to --format=clip' in fails(
    'import', 'ranker', sources, '--format=clip', vqgan_folder, out
  )
  assert 'exists; choose another one' in fails(*start, *flags[:2], f'--output_dir={model}')
  assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module', name='loaded')
def fixture_loaded(model):
  return text_to_image.load(model)


def test_pictures_do_not_depend_on_the_batch_and_follow_the_text(loaded):
  prompts = ['a red cat', 'the cat']
  result = loaded.generate(prompts, num_images=3, seed=1)
  assert result.images.shape == (2, 3, 8, 8, 3)
  alone = loaded.generate(prompts[1], num_images=1, seed=1)
  np.testing.assert_array_equal(result.tokens[1, 0], alone.tokens[0, 0])
  assert (result.tokens[0] != result.tokens[1]).any()
  assert result.tokens.max() < CODES
  with pytest.raises(UserError, match='prompt 1 is empty'):
    loaded.generate(' ')
  with pytest.warns(UserWarning, match="left out: 'cat cat cat'"):
    loaded.encode_prompts(['cat ' * 10])


def test_greedy_pictures_are_those_of_whole_sequences(loaded, model):
  """The cache, guidance and the first input, against the network for training."""
  result = loaded.generate(['a red cat'], num_images=1, temperature=0.0, guidance_scale=3.0)
  tokens = result.tokens[0]
  found = model_folder.load(model)
  config = found.generator_config
  texts = loaded.encode_prompts(['a red cat'])
  both = jnp.concatenate([texts, dalle_mini.empty_text(config, jnp.asarray(texts))])
  module = generators.module(config)
  params = jax.tree.map(np.asarray, found.generator_params)
  logits = module.apply({'params': params}, both, jnp.repeat(jnp.asarray(tokens), 2, axis=0))
  given, without = logits
  np.testing.assert_array_equal(np.argmax(without + 3 * (given - without), axis=-1), tokens[0])


def test_early_exit_and_speculative_decoding(loaded):
  plain = loaded.generate('a red cat', num_images=2, temperature=0.0)
  never = loaded.generate(
    'a red cat', num_images=2, temperature=0.0, exit_threshold=0.999999, guidance_skip_threshold=1.0
  )
  np.testing.assert_array_equal(never.tokens, plain.tokens)
  always = loaded.generate('a red cat', num_images=2, exit_threshold=0.0)
  assert always.usage.layers.max() == 1
  drafted = loaded.generate(
    'a red cat', num_images=2, temperature=0.0, speculative_window=4, speculative_rule='equal'
  )
  np.testing.assert_array_equal(drafted.tokens, plain.tokens)


def test_a_running_batch_and_a_mesh_give_the_same_pictures(loaded, model):
  plain = loaded.generate('a red cat', num_images=2, temperature=0.0)
  with continuous.ContinuousSampler(loaded, batch_size=2) as sampler:
    joined = sampler.submit('a red cat', temperature=0.0).result()
  np.testing.assert_array_equal(joined.tokens[0], plain.tokens[0, :1])
  mesh = mesh_lib.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  sharded = text_to_image.load(model, mesh=mesh)
  found = sharded.generate('a red cat', num_images=2, temperature=0.0)
  np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_int8_weights_and_cache(model):
  loaded = text_to_image.load(model, weights='int8', cache='int8')
  result = loaded.generate('a red cat', num_images=2)
  assert result.images.std() > 0
  plain = text_to_image.load(model).generate('a red cat', num_images=2)
  assert np.mean(result.tokens[..., 0] == plain.tokens[..., 0]) > 0


def test_its_sampling_step_is_planned(model, tmp_path, capsys):
  command = ['plan', '--what=sample', '--topology=cpu:2', '--gin_file=runs/tiny_generator.gin']
  flags = ['--gin_file=models/imported_generator.gin', f"--gin.MODEL='{model}'", '--weights=int8']
  assert main.main([*command, *flags, '--gin.make_mesh.tensor=2', '--gin.make_mesh.data=1']) == 0
  said = capsys.readouterr().out
  assert f'{_count(model):,} parameters, on cpu:2' in said and 'tensor 2' in said


def test_a_run_goes_on_from_it_and_is_exported(model, tmp_path):
  captions = ['a cat', 'a red cat', 'the cat', 'red'] * 4
  changes, picture = further_training.train_and_export(model, captions, CODES, tmp_path)
  assert 0 < changes['image_decoder']['decoder']['norm']['bias'] < 0.1
  assert max(jax.tree.leaves(changes)) < 0.1
  assert Image.open(picture).size == (8, 8)
