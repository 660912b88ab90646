"""Every gin file of gin_configs/runs/ makes an objective, an optimizer, a schedule and a mesh."""

import contextlib
import inspect
import math
import pathlib

import gin
import jax
import numpy as np
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import examples
from parti_jax.data import mixtures
from parti_jax.data import token_cache
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import state as state_lib
from parti_jax.training import train_loop

# Files of runs that are given after one of a model.
MODELS = {
  'pretrain.gin': 'parti_350m.gin',
  'text_encoder.gin': 'parti_350m.gin',
  'super_resolution.gin': 'super_resolution_x2.gin',
}
RUNS = sorted(path.name for path in (gin_config.folder() / 'runs').glob('*.gin'))
PAPERS_PARTI = ['parti_350m.gin', 'parti_750m.gin', 'parti_3b.gin', 'parti_20b.gin']


def _parse(name):
  models = [f'gin_configs/models/{MODELS[name]}'] if name in MODELS else []
  bindings = ['SuperResolutionObjective.image_size = 512'] if name == 'super_resolution.gin' else []
  gin_config.parse([*models, f'gin_configs/runs/{name}'], bindings)


def _value(name):
  """A value of `train` as gin has it, with what it refers to made."""
  value = gin.query_parameter(f'train.{name}')
  if not isinstance(value, gin.config.ConfigurableReference):
    return value
  return value.scoped_configurable_fn() if value.evaluate else value.scoped_configurable_fn


def _mesh(devices):
  """A mesh of devices that are not there, of the sizes that gin gives `make_mesh`."""
  sizes = {}
  for axis in mesh_lib.AXES:
    try:
      sizes[axis] = gin.query_parameter(f'make_mesh.{axis}')
    except ValueError:
      sizes[axis] = -1 if axis == 'data' else 1
  known = abs(math.prod(sizes.values()))
  return jax.sharding.AbstractMesh(
    tuple(devices // known if size == -1 else size for size in sizes.values()), mesh_lib.AXES
  )


def test_the_papers_runs_are_there():
  assert {
    *PAPERS_PARTI,
    'vit_vqgan_small.gin',
    'vit_vqgan_base.gin',
    'vit_vqgan_large_decoder.gin',
    'tiny_tokenizer.gin',
    'tiny_generator.gin',
    'demo_tokenizer.gin',
    'demo_generator.gin',
    'tiny_text_encoder.gin',
    'demo_text_encoder.gin',
    'text_encoder_350m.gin',
    'tiny_ranker.gin',
    'demo_ranker.gin',
  } <= set(RUNS)


@pytest.mark.parametrize('name', RUNS)
def test_a_run_makes_its_state_abstractly(name):
  _parse(name)
  objective, schedule, optimizer = _value('objective'), _value('schedule'), _value('optimizer')
  steps, batch_size = _value('steps'), _value('batch_size')
  # The width of LlamaGen-3B is 25 · 128.
  mesh, table = _mesh(128 if name == 'llamagen_3b.gin' else 256), rules.logical_axis_rules()
  state = state_lib.abstract_state(objective, optimizer(schedule), mesh, table)
  assert len(jax.tree.leaves(state.params)) > 10
  if pathlib.Path(name).stem.startswith(('parti', 'vit_vqgan', 'text_encoder')):
    rules.check_batch(batch_size, mesh, table)
  assert 0 < float(schedule(steps // 2)) <= 1
  if name != 'vqgan_f16.gin':  # Its learning rate is constant.
    assert float(schedule(steps)) < float(schedule(steps // 2))
  assert objective.step_flops(batch_size) > 0
  kinds = tuple(
    f'{source}{kind}' for source in ('openmoji_', 'folder_', '') for kind in ('images', 'pairs')
  )
  known = (*datasets.TOKEN_TASKS, *mixtures.NAMES, *kinds)
  assert gin.query_parameter('train.task') in known


def test_every_generator_loses_a_tenth_of_its_texts():
  rates = {}
  for name in RUNS:
    _parse(name)
    if gin.query_parameter('train.task') in (*datasets.TOKEN_TASKS, 'mixture_tokens'):
      with contextlib.suppress(ValueError):
        rates[name] = gin.query_parameter('drop_text.rate')
      rates.setdefault(name, inspect.signature(examples.drop_rate).parameters['rate'].default)
  ours = {'demo_generator.gin', 'scenes_generator.gin', 'tiny_generator.gin'}
  assert {*PAPERS_PARTI, *ours} <= set(rates)
  assert set(rates.values()) == {0.1}


@pytest.mark.parametrize('name', PAPERS_PARTI)
def test_a_size_is_its_model_with_the_run_of_all(name):
  _parse(name)
  together = gin.config_str()
  gin_config.parse(['gin_configs/models/' + name, 'gin_configs/runs/pretrain.gin'], [])
  assert gin.config_str() == together


@pytest.mark.parametrize('name', PAPERS_PARTI)
def test_parti_trains_as_in_the_paper(name):
  _parse(name)
  assert _value('steps') == 450000 and _value('batch_size') == 8192
  assert [float(_value('schedule')(step)) for step in (0, 5000, 85000, 450000)] == pytest.approx(
    [0, 4.5e-5, 4.5e-5, 1.125e-6]
  )
  assert {
    name: gin.query_parameter(f'adafactor.{name}')
    for name in ('beta1', 'beta2', 'weight_decay', 'max_gradient_norm')
  } == {'beta1': 0.9, 'beta2': 0.96, 'weight_decay': 0.045, 'max_gradient_norm': 4.0}


@pytest.mark.parametrize(
  'name, millions',
  [
    ('vit_vqgan_small.gin', (8 * 3.1 + 8 * 3.1, 0.1)),
    ('vit_vqgan_base.gin', (24 * 7.1, 0.1)),
    ('vit_vqgan_large_decoder.gin', (8 * 3.1 + 600, 0.1)),
  ],
)
def test_tokenizers_train_as_in_the_paper(name, millions):
  _parse(name)
  objective = _value('objective')
  weights = {
    loss: getattr(objective, f'{loss}_weight')
    for loss in ('l2', 'logit_laplace', 'perceptual', 'adversarial', 'quantizer', 'coarse_l2')
  }
  assert weights == {
    'l2': 1.0,
    'logit_laplace': 0.1,
    'perceptual': 0.1,
    'adversarial': 0.1,
    'quantizer': 1.0,
    'coarse_l2': 0.0,
  }
  assert objective.ema == 0.999 and objective.r1_every == 16
  assert _value('steps') == 500000 and _value('batch_size') == 256
  assert [float(_value('schedule')(step)) for step in (0, 10000, 500000)] == pytest.approx(
    [0, 1e-4, 5e-5]
  )
  params = jax.eval_shape(objective.init, jax.random.key(0))
  assert layers.count_parameters(params.pop('discriminator')) == 28_864_129
  assert layers.count_parameters(params) / 1e6 == pytest.approx(millions[0], rel=millions[1])


def test_the_convolutional_tokenizer_trains_as_in_the_paper():
  _parse('vqgan_f16.gin')
  objective = _value('objective')
  assert (_value('steps'), _value('batch_size')) == (400_000, 128)
  assert [float(_value('schedule')(step)) for step in (0, 20_000, 400_000)] == pytest.approx(
    [1e-4] * 3
  )
  adam = {name: gin.query_parameter(f'adamw.{name}') for name in ('beta1', 'beta2', 'weight_decay')}
  assert adam == {'beta1': 0.9, 'beta2': 0.95, 'weight_decay': 0.0}
  # Squares of pixels in [-1, 1] are four times those in [0, 1].
  assert (objective.l2_weight, objective.logit_laplace_weight) == (4.0, 0.0)
  assert (objective.perceptual_weight, objective.quantizer_weight) == (1.0, 1.0)
  assert (objective.adversarial_weight, objective.adversarial_from) == (0.5, 20_000)
  assert objective.model.quantizer == 'cosine' and objective.model.commitment == 0.25
  params = jax.eval_shape(objective.init, jax.random.key(0))
  assert layers.count_parameters(params.pop('discriminator')) == 28_864_129
  assert layers.count_parameters(params) / 1e6 == pytest.approx(72, abs=0.5)


def test_the_20b_model_fits_on_the_devices_of_its_mesh():
  # Parameters, gradients and both moments of Adafactor, without activations. A whole second moment
  # of the attention kernels would be 0.14 more.
  gin_config.parse(['gin_configs/runs/parti_20b.gin'], [])
  state = state_lib.abstract_state(
    _value('objective'),
    _value('optimizer')(_value('schedule')),
    _mesh(256),
    rules.logical_axis_rules(),
  )
  part = lambda tree: sum(
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(tree)
  )
  gigabytes = (part(state) + part(state.params)) / 2**30
  assert gigabytes < 0.8  # Of 32 on a TPU v4.


def test_a_task_with_more_ids_than_the_model_has_room_for_is_named(tokens_folder):
  gin_config.parse(
    ['gin_configs/runs/tiny_generator.gin'],
    [f"token_cache.path = '{tokens_folder}'", 'PartiConfig.text_vocabulary = 1999'],
  )
  with pytest.raises(UserError, match=r"PartiConfig\.text_vocabulary=1999.* 2000 ids in 'inputs'"):
    train_loop.check_vocabularies(_value('objective'), 'cached_tokens')
  gin_config.parse(
    ['gin_configs/runs/tiny_generator.gin'],
    [f"token_cache.path = '{tokens_folder}'", 'PartiConfig.codebook_size = 128'],
  )
  with pytest.raises(UserError, match=r"PartiConfig\.codebook_size=128.* 64 ids in 'targets'"):
    train_loop.check_vocabularies(_value('objective'), 'cached_tokens')


@pytest.mark.parametrize(
  'known, grid, message',
  [
    ([4, 4], (2, 8), r'PartiConfig\.grid=\(2, 8\).* 4×4 image tokens.*grid="\(4, 4\)"'),
    ([4, 4], (4, 5), r'PartiConfig\.grid=\(4, 5\).* 4×4 image tokens'),
    ([4, 4], (4, 4), None),
    # Caches of earlier releases, whose pictures were square.
    (None, (4, 5), r'PartiConfig\.grid=\(4, 5\).* 4×4 image tokens'),
    (None, (2, 8), r'PartiConfig\.grid=\(2, 8\).* 4×4 image tokens.*grid="\(4, 4\)"'),
    (None, (4, 4), None),
  ],
)
def test_another_grid_than_that_of_the_tokens_is_named(tmp_path, known, grid, message):
  info = {'codebook_size': 64, 'image_tokens': 16, 'tokenizer': 'none'}
  info |= {'grid': known} if known else {}
  token_cache.write_token_cache(str(tmp_path), [('a', np.zeros(16, np.int32))], info)
  gin_config.parse(
    ['gin_configs/runs/tiny_generator.gin'],
    [f"token_cache.path = '{tmp_path}'", f'PartiConfig.grid = {grid}'],
  )
  ends = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
  with ends:
    train_loop.check_vocabularies(_value('objective'), 'cached_tokens')
