"""Text features in token caches: written by `parti-jax tokenize`, read in place of the encoder."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs
from PIL import Image

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import text_features
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.exported_model import model_folder
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.sampling import text_to_image
from parti_jax.tokenization import tokenizing
from parti_jax.training import train_loop  # Before gin is locked.  # noqa: F401
from parti_jax.training.objectives import frozen_text_encoder
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

TOKENIZER = tiny_configs.TOKENIZER
T5 = t5_encoder.T5EncoderConfig(
  layers=2,
  width=12,
  mlp_width=20,
  heads=3,
  head_dim=4,
  text_vocabulary=2000,
  text_length=8,
  relative_buckets=8,
)
NO_DROPOUT = dataclasses.replace(T5, dropout=0.0)
# The last one is longer than T5.text_length.
TEXTS = ['a red circle', 'blue', 'the green square', 'a woman and a man with a dog and a cat']


def _save_encoder(folder, seed):
  module = t5_encoder.T5Encoder(T5)
  part = model_folder.Part(
    T5,
    random_parameters.of(module, t5_encoder.example_inputs(T5), seed),
    vocabulary_path=text_to_image.DEMO_FOLDER / 'vocabulary.model',
  )
  model_folder.save_part(folder, 'text_encoder', part, {})
  return folder


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
  """The folder of a tiny T5 with the demo's vocabulary."""
  return _save_encoder(tmp_path_factory.mktemp('encoder') / 't5', 0)


@pytest.fixture(scope='module')
def tokenizer():
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  params = random_parameters.of(module, vit_vqgan.example_inputs(TOKENIZER))
  return frozen_tokenizer.FrozenTokenizer('run', TOKENIZER, params)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  folder, lines = tmp_path_factory.mktemp('pictures'), []
  for index in range(8):
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 30 * index, np.uint8)).save(data, 'png')
    (folder / f'{index}.png').write_bytes(data.getvalue())
    lines.append(json.dumps({'file': f'{index}.png', 'caption': f'{TEXTS[index % 4]} {index}'}))
  (folder / 'train.in').write_text('\n'.join(lines))
  return folder


def _tokenize(pictures, output, *flags):
  return main.main(
    [
      'tokenize',
      '--gin_file=gin_configs/tasks/folder.gin',
      f"--gin.folder.path='{pictures}'",
      "--gin.folder.splits={'train': 'train.in'}",
      '--tokenizer=run',
      f'--output_dir={output}',
      *map(str, flags),
    ]
  )


@pytest.fixture(scope='module')
def cache(tmp_path_factory, pictures, tokenizer, encoder):
  """A token cache with features of bfloat16, computed in bfloat16."""
  output = tmp_path_factory.mktemp('cache') / 'tokens'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)
    assert _tokenize(pictures, output, f'--text_encoder={encoder}', '--dtype=bfloat16') == 0
  return output


def _train(cache, encoder, run, *others):
  return main.main(
    [
      'train',
      '--gin_file=runs/tiny_generator.gin',
      '--gin_file=models/imported_text_encoder.gin',
      f"--gin.TEXT_ENCODER='{encoder}'",
      f"--gin.token_cache.path='{cache}'",
      '--gin.PartiConfig.grid=(2,2)',
      f'--gin.PartiConfig.codebook_size={TOKENIZER.codebook_size}',
      '--gin.drop_text.rate=0.3',
      '--gin.train.batch_size=16',
      '--gin.train.steps=3',
      '--gin.parti_schedule.warmup_steps=1',
      f'--model_dir={run}',
      *others,
    ]
  )


def _params(run):
  path = run_checkpoints.latest_checkpoint(str(run))
  config = run_checkpoints.read_config(path, 'generator')
  return run_checkpoints.read_params(path, parti.Parti(config), parti.example_inputs(config))


WITHOUT = '--gin.token_cache.text_features=False'


def test_training_is_the_same_as_with_the_encoder_in_each_step(cache, encoder, tmp_path, capsys):
  settings = ["--gin.PartiConfig.dtype='bfloat16'", '--gin.train.microbatches=2']
  assert _train(cache, encoder, tmp_path / 'read', *settings) == 0
  assert 'the text encoder does not run in steps' in capsys.readouterr().err
  assert _train(cache, encoder, tmp_path / 'run', *settings, WITHOUT) == 0
  assert 'does not run in steps' not in capsys.readouterr().err
  read, run = (jax.tree.leaves(_params(tmp_path / name)) for name in ('read', 'run'))
  for one, other in zip(read, run, strict=True):
    np.testing.assert_array_equal(one, other)


def _model(encoder=T5):
  sizes = {'decoder_layers': 1, 'width': 8, 'mlp_width': 8, 'heads': 2, 'codebook_size': 6}
  return parti_config.PartiConfig(**sizes, grid=(2, 2), text_encoder=encoder)


def _objective(**others):
  settings = {'model': _model(), 'frozen': ('text_encoder',)} | others
  return generator_objective.GeneratorObjective(**settings)


def _features(**others):
  entries = {'encoder': 'e0', 'vocabulary': 'v0', 'text_length': 8, 'width': 12, 'dtype': 'float16'}
  return text_features.TextFeatures(**entries | others, name='the token cache X')


def test_losses_in_float32_differ_by_the_rounding_of_the_features_alone(encoder):
  loaded = frozen_text_encoder.load(encoder)
  texts = frozen_text_encoder.Encoder(loaded, 'float32', devices=jax.devices()[:1])
  plain = _objective(model=dataclasses.replace(_model(NO_DROPOUT), dtype='float32'))
  params = random_parameters.of_objective(plain)
  params['text_encoder'] = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), loaded.params)
  ids = [loaded.vocabulary.encode(text, T5.text_length)[0] for text in TEXTS]
  batch = {
    'encoder_input_tokens': jnp.asarray(np.stack(ids)),
    'decoder_target_tokens': jnp.arange(16, dtype=jnp.int32).reshape(4, 4) % 6,
    'decoder_loss_weights': jnp.ones((4, 4)),
    'text_features': jnp.stack([texts.features.padded(rows) for (rows,) in texts(TEXTS)()]),
  }
  losses = [
    jax.jit(objective.evaluate)(params, batch)['loss']
    for objective in (plain, plain.with_text_features(texts.features))
  ]
  np.testing.assert_allclose(*losses, rtol=2**-8)
  assert (losses[0] != losses[1]).any()


def test_the_objective_with_text_features_does_not_run_the_encoder():
  plain = _objective(model=_model(NO_DROPOUT))
  objective = plain.with_text_features(_features())
  assert plain.with_text_features(None) is plain
  shapes = objective.abstract_batch(2)
  assert shapes['text_features'] == jax.ShapeDtypeStruct((2, 8, 12), jnp.float16)
  assert objective.step_flops(2) < plain.step_flops(2)
  params = random_parameters.of_objective(objective)
  batch = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
  loss = jax.jit(lambda params, batch: objective.loss(params, batch, None, jnp.int32(0))[0])
  nothing = jax.tree.map(lambda leaf: leaf * jnp.nan, params['text_encoder'])
  found = loss(params | {'text_encoder': nothing}, batch)
  assert jnp.isfinite(found)
  other = batch | {'text_features': batch['text_features'].at[0, 0].set(3)}
  assert loss(params, batch) == found != loss(params, other)


@pytest.mark.parametrize(
  'settings, features, message',
  [
    ({'frozen': ()}, {}, r'but GeneratorObjective.frozen=\(\) trains it; .* or set token_cache'),
    ({}, {}, 'but its dropout is 0.1; set imported_text_encoder.dropout=0, or set token_cache'),
    ({'model': parti_config.PartiConfig()}, {}, 'is its own; .*token_cache.text_features=F'),
    ({'model': None}, {'width': 13}, 'X has 13 text features of a token, but .* has 12; set'),
    ({'model': None, 'text_features': 'bfloat16'}, {}, 'of the token cache X are float16; set it'),
    ({'model': None, 'text_features': 'float64'}, {}, "features='float64' is not one of bfloat16"),
    ({'model': None, 'text_features': 'float16'}, None, 'the examples have no text features; '),
  ],
)
def test_an_objective_that_can_not_use_them_says_so(settings, features, message):
  if settings.get('model', 0) is None:
    settings = settings | {'model': _model(NO_DROPOUT)}
  with pytest.raises(UserError, match=message) as error:
    objective = _objective(**settings)
    objective.with_text_features(None if features is None else _features(**features))
  assert '\n' not in str(error.value)


def test_another_objective_refuses_them():
  objective = tokenizer_objective.TokenizerObjective(TOKENIZER)
  assert objective.with_text_features(None) is objective
  with pytest.raises(UserError, match='text features, which TokenizerObjective does not use; set'):
    objective.with_text_features(_features())


def test_another_encoder_ends_the_run_before_its_first_step(
  cache, encoder, tmp_path, tmp_path_factory, capsys
):
  other = _save_encoder(tmp_path_factory.mktemp('other') / 't5', 1)
  assert _train(cache, other, tmp_path / 'run') == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert f'{cache} has text features of the text encoder ' in error and WITHOUT[6:] in error
  assert not list((tmp_path / 'run' / 'checkpoints').iterdir())


def test_the_fingerprint_is_of_values_and_places_on_any_mesh():
  params = {'a': {'kernel': jnp.arange(32.0).reshape(8, 4)}, 'b': jnp.ones(3, jnp.bfloat16)}
  found = frozen_text_encoder.fingerprint(_model(), params, None)
  arrays = jax.tree.map(np.asarray, params)
  assert frozen_text_encoder.fingerprint(_model(), arrays, None) == found
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('data',))
  place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  split = params | {'a': jax.device_put(params['a'], place('data'))}
  split['b'] = jax.device_put(params['b'].astype(jnp.float32), place())
  assert frozen_text_encoder.fingerprint(_model(), split, place()) == found
  free = dataclasses.replace(T5, text_length=9, dropout=0.5, dtype='float32')
  assert frozen_text_encoder.fingerprint(_model(free), params, None) == found
  others = [
    (T5, params | {'a': {'kernel': params['a']['kernel'][::-1]}}),
    (T5, params | {'a': {'other': params['a']['kernel']}}),
    (T5, params | {'b': params['b'].at[1].set(1 + 2**-7)}),
    (dataclasses.replace(T5, relative_distance=64), params),
  ]
  digests = {
    frozen_text_encoder.fingerprint(_model(config), arrays, None) for config, arrays in others
  }
  assert len(digests) == len(others) and found not in digests


def test_the_features_are_those_of_the_network(encoder):
  loaded = frozen_text_encoder.load(encoder)
  texts = frozen_text_encoder.Encoder(loaded, 'float32', 'float16', jax.devices()[:2])
  given = [TEXTS[0], captions.several([TEXTS[3], '\u200b', TEXTS[1]]).decode()]
  found = texts(given)()
  assert [len(of_caption) for of_caption in found] == [1, 3]
  assert found[1][1].shape == (0, T5.width)  # Training leaves out this text.
  (empty,) = texts.features.from_bytes(texts.features.empty, 1)
  apply = t5_encoder.T5Encoder(dataclasses.replace(T5, dtype='float32')).apply
  params = {'params': jax.tree.map(np.asarray, loaded.params)}
  for text, rows in ((TEXTS[0], found[0][0]), (TEXTS[3], found[1][0]), ('', empty)):
    ids, _ = loaded.vocabulary.encode(text, T5.text_length)
    whole = apply(params, jnp.asarray(ids)[None])[0]
    assert rows.dtype == np.float16 and len(rows) == np.count_nonzero(ids)
    np.testing.assert_allclose(rows, whole[: len(rows)], atol=2e-3)


def test_features_beyond_the_dtype_are_refused(encoder):
  loaded = frozen_text_encoder.load(encoder)
  params = jax.tree.map(np.asarray, loaded.params)
  params['encoder']['norm']['scale'] = params['encoder']['norm']['scale'] * 1e6
  large = dataclasses.replace(loaded, params=params)
  with pytest.raises(UserError, match='not finite in float16; set --text_features_dtype=bfloat16'):
    frozen_text_encoder.Encoder(large, 'float32', 'float16', jax.devices()[:1])


def _content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_workers_write_the_same_cache_and_go_on(
  pictures, tokenizer, encoder, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD_WITH_TEXT_FEATURES', 3)
  monkeypatch.setattr(tokenizing, '_WAITING', 1)
  flags = [f'--text_encoder={encoder}', '--text_length=6', '--text_features_dtype=float16']
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert _tokenize(pictures, one, *flags) == 0
  shown = capsys.readouterr().out
  assert 'adds 24 bytes for each text token, at most 144 for' in shown
  assert 'kept in part: 2 caption cut to 6 tokens' in shown
  for worker in (1, 0):
    assert _tokenize(pictures, two, *flags, f'--worker={worker}/2', '--batch_size=2') == 0
  assert _content(one) == _content(two)
  info = token_cache_info.read_info(str(one))
  assert len(info['splits']['train']['shards']) == 3
  assert (info['text_features']['text_length'], info['text_features']['dtype']) == (6, 'float16')
  assert _tokenize(pictures, one, *flags) == 0
  assert 'cut to 6 tokens (finished before)' in capsys.readouterr().out
  assert _tokenize(pictures, one) == 2
  assert "holds a finished split 'train' with text_features {" in capsys.readouterr().err
  assert _content(one) == _content(two)


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--text_length=6'], '--text_length is of --text_encoder; give both or neither'),
    (['--text_features_dtype=float16'], '--text_features_dtype is of --text_encoder'),
    (['--text_encoder=nowhere'], '--text_encoder=nowhere: '),
    (['--text_encoder=ENCODER', '--text_length=0'], '--text_length'),
    (['--text_encoder=ENCODER', '--text_length=5000'], 'text_length=5000'),
  ],
)
def test_flags_that_do_not_fit_are_one_line(
  pictures, tokenizer, encoder, tmp_path, monkeypatch, capsys, flags, message
):
  monkeypatch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)
  flags = [flag.replace('ENCODER', str(encoder)) for flag in flags]
  assert _tokenize(pictures, tmp_path / 'tokens', *flags) == 2
  error = capsys.readouterr().err.strip()
  assert message in error and '\n' not in error
  assert not (tmp_path / 'tokens').exists()
