"""The gin files for t5x with t5x: every model with every kind of run, and what users override."""

import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import require_t5x  # noqa: F401
from t5x import eval as t5x_eval
from t5x import gin_utils
from t5x import infer as t5x_infer
from t5x import partitioning
from t5x import train as t5x_train
from t5x import trainer  # noqa: F401
from t5x import utils

from parti_jax.core import gin_config
from parti_jax.data import token_cache
from parti_jax.models import parti_config
from parti_jax.t5x import models

MODELS = sorted(path.stem for path in (gin_config.folder() / 't5x/models').glob('*.gin'))
# The module that runs, and what has to be given.
RUNS = {
  'pretrain': (t5x_train, ['MODEL_DIR = "{folder}/run"']),
  'finetune': (
    t5x_train,
    ['MODEL_DIR = "{folder}/run"', 'INITIAL_CHECKPOINT_PATH = "checkpoint_8"', 'TRAIN_STEPS = 12'],
  ),
  'eval': (t5x_eval, ['CHECKPOINT_PATH = "checkpoint_8"', 'EVAL_OUTPUT_DIR = "out"']),
  'infer': (t5x_infer, ['CHECKPOINT_PATH = "checkpoint_8"', 'INFER_OUTPUT_DIR = "out"']),
}
_SEARCH_PATHS = [gin_config.folder().parent, *t5x_train._DEFAULT_GIN_SEARCH_PATHS]


@pytest.fixture(name='parse')
def _parse(monkeypatch, tmp_path):
  """Reads gin as t5x's commands do: a model's file, a run's, and bindings as on a command line."""

  def parse(model, run, *bindings):
    main, required = RUNS[run]
    monkeypatch.setitem(sys.modules, '__main__', main)  # What `import __main__` in gin gives.
    gin.clear_config()
    arguments = [
      f'--gin.{binding.replace("{folder}", str(tmp_path))}'
      for binding in ('MIXTURE_OR_TASK_NAME = "cached_tokens"', *required, *bindings)
    ]
    gin_utils.parse_gin_flags(
      [str(path) for path in _SEARCH_PATHS],
      [f'gin_configs/t5x/models/{model}.gin', f'gin_configs/t5x/runs/{run}.gin'],
      [
        argument.removeprefix('--gin_bindings=')
        for argument in gin_utils.rewrite_gin_args(arguments)
      ],
    )

  return parse


def _value(name, of=None):
  """What gin has by a name, or for the parameter of a function, made."""
  value = (
    gin.query_parameter(name)
    if of is None
    else gin.get_bindings(of, resolve_references=False)[name]
  )
  return (
    value.scoped_configurable_fn() if isinstance(value, gin.config.ConfigurableReference) else value
  )


def _made(configurable, scope=''):
  with gin.config_scope(scope):
    return gin.get_configurable(configurable)()


def _drawn_shape(model, texts):
  """Of what t5x.infer gets for so many texts; nothing is computed."""
  sizes = model.module.config
  shapes = {
    'encoder_input_tokens': (texts, sizes.text_length),
    'decoder_target_tokens': (texts, sizes.image_length),
  }

  def draw(rng):
    batch = {name: jnp.ones(shape, jnp.int32) for name, shape in shapes.items()}
    params = model.get_initial_variables(rng, shapes)['params']
    return model.predict_batch(params, batch, rng)

  return jax.eval_shape(draw, jax.random.key(0)).shape


def test_a_smaller_vocabulary_is_taken(parse, tmp_path):
  """350m knows 16,000 pieces of text; the vocabulary that comes with the package has 2,000."""
  info = {'codebook_size': 8192, 'image_tokens': 1024, 'tokenizer': 'none'}
  token_cache.write_token_cache(str(tmp_path), [('a cat', np.zeros(1024, np.int32))], info)
  parse('350m', 'pretrain', f'token_cache.path = "{tmp_path}"')
  model = _value('%MODEL')
  assert model.input_vocabulary.vocab_size == 2000 < model.module.config.text_vocabulary
  utils.verify_matching_vocabs(_made(utils.DatasetConfig, 'train'), model)


@pytest.mark.parametrize('run', RUNS)
@pytest.mark.parametrize('name', MODELS)
def test_a_model_and_a_run_make_what_t5x_takes(parse, name, run):
  parse(name, run)
  model = _value('%MODEL')
  assert isinstance(model, models.TokenizerModel if name.startswith('vit_') else models.PartiModel)
  partitioner = _made(partitioning.PjitPartitioner)
  assert set(partitioner.mesh.shape) == {'data', 'model'}
  assert dict(partitioner._logical_axis_rules)['heads'] == 'model'
  split_along_data = ('embed', 'data') in partitioner._logical_axis_rules
  assert split_along_data == (name in ('3b', '20b'))
  lengths = (
    {'images': model.objective.model.image_size}
    if name.startswith('vit_')
    else {'inputs': model.module.config.text_length, 'targets': model.module.config.image_length}
  )
  scopes = {'pretrain': ['train', 'train_eval'], 'finetune': ['train', 'train_eval', 'infer_eval']}
  for scope in scopes.get(run, ['']):
    dataset = _made(utils.DatasetConfig, scope)
    assert dataset.task_feature_lengths == lengths
    assert dataset.mixture_or_task_name == 'cached_tokens'
    assert dataset.split == ('train' if scope == 'train' else 'validation')
    assert not dataset.pack and not dataset.use_cached and dataset.trim_output_features
  # What t5x writes to its folder can be read again.
  text = gin.config_str()
  gin.clear_config()
  gin.parse_config(text)
  assert gin.config_str() == text


@pytest.mark.parametrize('name', MODELS)
def test_pretraining_has_our_runs_steps_batch_and_schedule(parse, name):
  parse(name, 'pretrain')
  steps = _value('%TRAIN_STEPS')
  assert steps == _value('%PRETRAIN_STEPS')
  assert _made(utils.DatasetConfig, 'train').batch_size == _value('%PRETRAIN_BATCH_SIZE')
  schedule = _value('t5x.trainer.Trainer.learning_rate_fn')
  assert float(schedule(0)) == 0 < float(schedule(steps)) < float(schedule(steps // 2))


def test_what_users_override_in_training(parse):
  parse(
    '350m',
    'pretrain',
    'TASK_FEATURE_LENGTHS = {"inputs": 8, "targets": 9}',
    'TRAIN_STEPS = 7',
    'BATCH_SIZE = 6',
    'DROPOUT_RATE = 0.25',
    'EVAL_PERIOD = 5',
    'EVAL_STEPS = 4',
    'RANDOM_SEED = 3',
    'USE_CACHED_TASKS = True',
    'LABEL_SMOOTHING = 0.125',
    'Z_LOSS = 1e-4',
    'PjitPartitioner.num_partitions = 2',
    'Trainer.num_microbatches = 2',
    'train_eval/utils.DatasetConfig.batch_size = 10',
    'utils.SaveCheckpointConfig.period = 11',
    'PartiModel.guidance_scale = 3.0',
    'PartiModel.predict_batch_with_aux.num_decodes = 4',
    'PartiModel.predict_batch_with_aux.return_all_decodes = True',
    'PartiConfig.encoder_layers = 1',
    'adafactor.beta1 = 0.5',
    'parti_schedule.peak = 2.0',
    'partitioning.standard_logical_axis_rules.activation_partitioning_dims = 2',
  )
  train, evaluation = (_made(utils.DatasetConfig, scope) for scope in ('train', 'train_eval'))
  assert train.task_feature_lengths == {'inputs': 8, 'targets': 9}
  assert (train.batch_size, evaluation.batch_size) == (6, 10) and train.use_cached
  assert [
    _value(name, t5x_train.train)
    for name in ('total_steps', 'eval_period', 'eval_steps', 'random_seed')
  ] == [7, 5, 4, 3]
  assert _made(parti_config.PartiConfig).dropout == 0.25
  model = _value('%MODEL')
  assert model.module.config.encoder_layers == 1 and model.guidance_scale == 3.0
  assert (model._label_smoothing, model._z_loss) == (0.125, 1e-4)
  assert _drawn_shape(model, texts=2) == (2, 4, model.module.config.image_length)
  partitioner = _made(partitioning.PjitPartitioner)
  assert dict(partitioner.mesh.shape) == {'data': 4, 'model': 2}
  assert ('embed', 'model') in partitioner._logical_axis_rules
  assert gin.query_parameter('t5x.trainer.Trainer.num_microbatches') == 2
  assert _made(utils.SaveCheckpointConfig).period == 11
  assert float(_value('t5x.trainer.Trainer.learning_rate_fn')(5000)) == 2.0


def test_a_submesh_and_a_schedule_of_t5x_can_be_chosen(parse):
  # Of emulated devices: processes and the devices of one.
  parse(
    'tiny',
    'pretrain',
    'PjitPartitioner.model_parallel_submesh = (1, 4)',
    'Trainer.learning_rate_fn = @utils.create_learning_rate_scheduler()',
    'create_learning_rate_scheduler.warmup_steps = 100',
  )
  assert dict(_made(partitioning.PjitPartitioner).mesh.shape) == {'data': 2, 'model': 4}
  schedule = _value('t5x.trainer.Trainer.learning_rate_fn')
  assert float(schedule(jnp.int32(400))) == pytest.approx(1 / 20)


def test_finetuning_goes_on_at_a_constant_rate_or_ours(parse):
  parse('demo', 'finetune')
  assert _made(utils.RestoreCheckpointConfig).path == 'checkpoint_8'
  schedule = _value('t5x.trainer.Trainer.learning_rate_fn')
  assert (
    float(schedule(8)) == float(schedule(8000)) == pytest.approx(_value('%FINETUNE_LEARNING_RATE'))
  )
  assert _made(utils.DatasetConfig, 'infer_eval').batch_size == 32
  assert not _made(utils.RestoreCheckpointConfig).fallback_to_scratch
  parse(
    'demo',
    'finetune',
    'Trainer.learning_rate_fn = %SCHEDULE',
    'TRAIN_STEPS_RELATIVE = 4',
    'PARAMETERS_ONLY = True',
  )
  assert float(_value('t5x.trainer.Trainer.learning_rate_fn')(200)) == pytest.approx(1.5e-3)
  assert _value('relative_steps', t5x_train.train) == 4
  restored = _made(utils.RestoreCheckpointConfig)
  assert restored.fallback_to_scratch and restored.state_transformation_fns


def test_what_users_override_in_drawing(parse):
  parse(
    'tiny',
    'infer',
    'decoding.temperature_sample.temperature = 0.5',
    'decoding.temperature_sample.topk = 3',
    'decoding.temperature_sample.topp = 0.9',
    'utils.DatasetConfig.split = "train"',
    'DatasetConfig.batch_size = 4',
    'infer.mode = "predict_with_aux"',
  )
  found = {
    name: gin.query_parameter(f't5x.decoding.temperature_sample.{name}')
    for name in ('temperature', 'topk', 'topp')
  }
  assert found == {'temperature': 0.5, 'topk': 3, 'topp': 0.9}
  dataset = _made(utils.DatasetConfig)
  assert (dataset.split, dataset.batch_size) == ('train', 4)
  assert _value('mode', t5x_infer.infer) == 'predict_with_aux'
  assert _value('checkpoint_ds_iter', t5x_infer.infer) is False
  assert _value('%MODEL').decode_fn.__name__ == 'temperature_sample'
  restored = _made(utils.RestoreCheckpointConfig)
  assert (restored.path, restored.dtype) == ('checkpoint_8', 'float32')
