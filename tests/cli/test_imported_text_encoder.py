"""Text encoders from elsewhere: import, train with them frozen or along, export, generate."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_clip

import parti_jax
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.models import clip
from parti_jax.models import generators
from parti_jax.models import t5_encoder
from parti_jax.sampling import text_to_image

CAPTIONS = ['a red circle', 'a blue circle', 'a red square', 'a blue square']
WIDTH, HEADS = 12, 3


@pytest.fixture(scope='module')
def tokenizer():
  """A tokenizer for images of 16 × 16 pixels."""
  return model_folder.load_part('tokenizer', text_to_image.DEMO_FOLDER)


@pytest.fixture(scope='module')
def tokens(tmp_path_factory, tokenizer):
  """A token cache of the demo's tokenizer."""
  folder = tmp_path_factory.mktemp('cache') / 'tokens'
  draw = np.random.default_rng(0)
  length, codes = tokenizer.config.image_length, tokenizer.config.codebook_size
  examples = [(caption, draw.integers(0, codes, length)) for caption in CAPTIONS * 4]
  fingerprint = tokenizer.made_with['tokenizer'] if tokenizer.made_with else None
  info = {'codebook_size': codes, 'image_tokens': length, 'tokenizer': fingerprint or 'none'}
  token_cache.write_token_cache(str(folder), examples, info)
  return folder


def _t5_arrays(rows):
  draw = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(draw.normal(size=shape) * 0.3, np.float32)
  block = 'encoder.block.{}.layer.'
  arrays = {
    'shared.weight': normal(rows, WIDTH),
    'encoder.final_layer_norm.weight': 1 + normal(WIDTH),
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': normal(8, HEADS),
    'decoder.final_layer_norm.weight': normal(WIDTH),  # A whole T5 has a decoder.
  }
  for layer in range(2):
    first = block.format(layer)
    for name in 'qkv':
      arrays[f'{first}0.SelfAttention.{name}.weight'] = normal(HEADS * 4, WIDTH)
    arrays[f'{first}0.SelfAttention.o.weight'] = normal(WIDTH, HEADS * 4)
    arrays[f'{first}0.layer_norm.weight'] = 1 + normal(WIDTH)
    arrays[f'{first}1.layer_norm.weight'] = 1 + normal(WIDTH)
    for name in ('wi_0', 'wi_1'):
      arrays[f'{first}1.DenseReluDense.{name}.weight'] = normal(20, WIDTH)
    arrays[f'{first}1.DenseReluDense.wo.weight'] = normal(WIDTH, 20)
  return arrays


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
  """The folder of an imported T5, and the files that it was made of."""
  folder = tmp_path_factory.mktemp('t5')
  pieces = vocabulary.train_vocabulary(
    CAPTIONS * 10, 40, str(folder / 'spiece.model'), 'bpe', 1.0, at_most=True
  )
  # More rows than pieces, as in the published files.
  safetensors.numpy.save_file(_t5_arrays(pieces.size + 5), folder / 'model.safetensors')
  command = ['import', 'text_encoder', str(folder / 'model.safetensors'), '--format=t5']
  flags = [f'--vocabulary={folder}/spiece.model', f'--output_dir={folder}/t5', '--text_length=8']
  assert main.main([*command, *flags, '--source=somewhere', '--licence=Apache-2.0']) == 0
  return folder / 't5'


@pytest.fixture(scope='module')
def other_t5(t5):
  """The folder of another imported T5, of the same sizes and vocabulary."""
  source, folder = t5.parent, t5.parent / 'other_t5'
  rows = len(safetensors.numpy.load_file(source / 'model.safetensors')['shared.weight'])
  arrays = {name: 0.9 * array for name, array in _t5_arrays(rows).items()}
  safetensors.numpy.save_file(arrays, source / 'other.safetensors')
  command = ['import', 'text_encoder', str(source / 'other.safetensors'), '--format=t5']
  flags = [f'--vocabulary={source}/spiece.model', f'--output_dir={folder}', '--text_length=8']
  assert main.main([*command, *flags]) == 0
  return folder


@pytest.fixture(scope='module')
def clip_text(tmp_path_factory):
  """The folder of an imported text encoder of CLIP."""
  folder = tmp_path_factory.mktemp('clip')
  size = tiny_clip.write_tokenizer(folder / 'source')
  arrays = tiny_clip.clip_arrays(size)
  weights = tiny_clip.write(folder / 'source', arrays, eos_token_id=size - 1)
  command = ['import', 'text_encoder', str(weights), '--format=clip', f'--output_dir={folder}/clip']
  assert main.main([*command, f'--vocabulary={folder}/source', '--activation=quick_gelu']) == 0
  return folder / 'clip'


def _train(encoder, tokens, tokenizer, run, *others):
  rows, columns = tokenizer.config.grid
  command = [
    'train',
    '--gin_file=runs/tiny_generator.gin',
    '--gin_file=models/imported_text_encoder.gin',
    f"--gin.TEXT_ENCODER='{encoder}'",
    f"--gin.token_cache.path='{tokens}'",
    f'--gin.PartiConfig.grid=({rows},{columns})',
    f'--gin.PartiConfig.codebook_size={tokenizer.config.codebook_size}',
    '--gin.train.batch_size=8',
    '--gin.train.steps=2',
    '--gin.parti_schedule.warmup_steps=1',
    f'--model_dir={run}',
  ]
  return main.main([*command, *others])


def _newest(run):
  path = run_checkpoints.latest_checkpoint(str(run))
  config = run_checkpoints.read_config(path, 'generator')
  module, inputs = generators.module(config), generators.example_inputs(config)
  return config, run_checkpoints.read_params(path, module, inputs)


def _same(one, other):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_the_folder_has_the_network_its_vocabulary_and_its_origin(t5, capsys):
  part = model_folder.load_part('text_encoder', t5)
  assert part.config == t5_encoder.T5EncoderConfig(
    layers=2,
    width=WIDTH,
    mlp_width=20,
    heads=HEADS,
    head_dim=4,
    text_vocabulary=part.config.text_vocabulary,
    text_length=8,
    relative_buckets=8,
    dtype='float32',
  )
  table = np.asarray(part.params['token_embedding']['table'])
  np.testing.assert_array_equal(table, _t5_arrays(len(table))['shared.weight'])
  assert part.vocabulary_path.read_bytes() == (t5.parent / 'spiece.model').read_bytes()
  origin = json.loads((t5 / 'config.json').read_text())['provenance']['text_encoder']
  assert (origin['source'], origin['licence'], origin['format']) == (
    'somewhere',
    'Apache-2.0',
    't5',
  )
  assert main.main(['info', str(t5)]) == 0
  shown = capsys.readouterr().out
  assert 'text encoder' in shown and 'Apache-2.0' in shown


@pytest.mark.parametrize('kind', ['t5', 'clip'])
def test_the_chain_with_a_frozen_text_encoder(request, kind, tokens, tokenizer, tmp_path, capsys):
  encoder = request.getfixturevalue('t5' if kind == 't5' else 'clip_text')
  run, model = tmp_path / 'run', tmp_path / 'model'
  assert _train(encoder, tokens, tokenizer, run) == 0, capsys.readouterr().err
  config, params = _newest(run)
  part = model_folder.load_part('text_encoder', encoder)
  assert type(config.text_encoder) is (
    t5_encoder.T5EncoderConfig if kind == 't5' else clip.CLIPTextConfig
  )
  assert _same(params['text_encoder'], part.params)
  # Going on, and nothing but the decoder changes.
  assert _train(encoder, tokens, tokenizer, run, '--gin.train.steps=3') == 0
  _, later = _newest(run)
  assert _same(later['text_encoder'], part.params)
  assert not _same(later['image_decoder'], params['image_decoder'])
  export = ['export', f'--tokenizer={text_to_image.DEMO_FOLDER}', f'--generator={run}']
  flags = ['--dtype=float32', f'--output_dir={model}', '--allow_mismatch']
  assert main.main([*export, f'--vocabulary={run}', *flags]) == 2
  assert f'--vocabulary={run}: the folder has none of text_enc' in capsys.readouterr().err
  flags = [f'--vocabulary={encoder}', *flags]
  assert main.main([*export, *flags]) == 0
  origin = json.loads((encoder / 'config.json').read_text())['provenance']['text_encoder']
  exported = model_folder.load(model)
  assert exported.made_with['generator']['text_encoder'] == origin['sha256'][:16]
  assert exported.provenance['text_encoder'] == origin
  loaded = parti_jax.load(model)
  drawn = loaded.generate(['a red circle', 'a blue square'], 2, guidance_scale=2.0)
  assert drawn.images.shape[:2] == (2, 2)
  with pytest.raises(UserError, match='prompt 1 is empty'):
    loaded.generate([' '])
  with pytest.raises(UserError, match='has no generator, only a text encoder; give one that has'):
    parti_jax.load(encoder)
  assert main.main(['info', str(model)]) == 0


def test_the_text_encoder_can_be_trained_along(t5, other_t5, tokens, tokenizer, tmp_path, capsys):
  run = tmp_path / 'run'
  assert _train(t5, tokens, tokenizer, run, '--gin.GeneratorObjective.frozen=()') == 0
  _, params = _newest(run)
  part = model_folder.load_part('text_encoder', t5)
  start = np.asarray(part.params['token_embedding']['table'])
  table = np.asarray(params['text_encoder']['token_embedding']['table'])
  assert not np.array_equal(table, start)
  np.testing.assert_allclose(table, start, atol=0.1)  # It began there.
  # The run has parameters of its own, so another encoder would be ignored.
  others = ['--gin.GeneratorObjective.frozen=()', '--gin.train.steps=3']
  assert _train(other_t5, tokens, tokenizer, run, *others) == 2
  error = capsys.readouterr().err
  assert f'the run {run} was made with the text encoder ' in error
  assert f"but GeneratorObjective.text_encoder='{other_t5}' has " in error
  assert (
    _train(t5, tokens, tokenizer, run, *others, '--gin.imported_text_encoder.text_length=4') == 2
  )
  error = capsys.readouterr().err
  assert 'text_encoder.text_length is 8 there and 4 here; train in another' in error


@pytest.mark.parametrize(
  'settings, named',
  [
    (["--gin.TEXT_ENCODER='nothing'"], 'nothing'),
    ([f"--gin.TEXT_ENCODER='{text_to_image.DEMO_FOLDER}'"], 'has no text encoder, only '),
    (['--gin.GeneratorObjective.text_encoder=None'], 'nothing gives parameters for text_encoder'),
    (["--gin.GeneratorObjective.frozen=('encoder',)"], "unknown parts ['encoder']"),
    (['--gin.vocabulary.path=None'], 'vocabulary'),
    (['--gin.PartiConfig.text_encoder=@T5EncoderConfig()'], 'width is 12 there and 1024 here'),
    (['--gin.PartiConfig.text_encoder=None'], 'text encoder of PartiConfig is its own'),
  ],
)
def test_what_does_not_fit_ends_before_the_first_step(
  t5, tokens, tokenizer, tmp_path, capsys, settings, named
):
  assert _train(t5, tokens, tokenizer, tmp_path / 'run', *settings) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert named in error
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize(
  'flags, named',
  [
    (
      [],
      "--vocabulary is required: the file of the text encoder's text tokenizer, its spiece.model",
    ),
    (['--vocabulary=DEMO'], 'has 2000 pieces, but the weights are of'),
    (['--vocabulary=OWN', '--text_length=0'], 'text_length'),
    (['--vocabulary=OWN', '--image_size=8'], '--image_size does not apply to --format=t5'),
    (['--vocabulary=OWN', '--activation=gelu'], '--activation does not apply to --format=t5'),
  ],
)
def test_what_an_import_lacks_is_one_line(t5, tmp_path, capsys, flags, named):
  own, demo = t5.parent / 'spiece.model', text_to_image.DEMO_FOLDER / 'vocabulary.model'
  flags = [flag.replace('OWN', str(own)).replace('DEMO', str(demo)) for flag in flags]
  command = ['import', 'text_encoder', str(t5.parent / 'model.safetensors'), '--format=t5']
  assert main.main([*command, *flags, f'--output_dir={tmp_path}/t5']) == 2
  error = capsys.readouterr().err.strip()
  assert named in error and '\n' not in error
  assert not (tmp_path / 't5').exists()
