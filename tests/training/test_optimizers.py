"""Adafactor, AdamW and Muon step by step on small arrays, and schedules at their corners."""

import dataclasses
import functools

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import coca
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import factored
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import optimizers
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import text_encoder_objective
from parti_jax.training.objectives import tokenizer_objective


def _state_with(state, name):
  return next(part for part in state if hasattr(part, name))


def test_adafactor_by_hand():
  draw = np.random.default_rng(0)
  kernel = draw.normal(size=(3, 4)).astype(np.float32)
  optimizer = optimizers.adafactor(
    lambda step: 0.5 + step, beta1=0.9, beta2=0.96, weight_decay=0.1, max_gradient_norm=100.0
  )
  params = {'kernel': kernel}
  state = optimizer.init(params)
  second, first = 0.0, np.zeros((3, 4))
  for step in range(3):
    gradient = draw.normal(size=(3, 4)).astype(np.float32)
    # The second moment begins with the first gradient; then beta2 is constant.
    square = gradient.astype(np.float64) ** 2
    second = square if step == 0 else 0.96 * second + 0.04 * square
    average = 0.9 * first + 0.1 * gradient / np.sqrt(second)
    updates, state = optimizer.update({'kernel': gradient}, state, params)
    np.testing.assert_allclose(
      updates['kernel'], -(0.5 + step) * (average + 0.1 * kernel), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(_state_with(state, 'v').v['kernel'], second, rtol=1e-5)
    stored = _state_with(state, 'ema').ema['kernel']
    assert stored.dtype == jnp.bfloat16
    first = np.asarray(stored, np.float64)
    # Half a unit in the last of bfloat16's 8 bits.
    np.testing.assert_allclose(first, average, rtol=2**-8)


@pytest.mark.parametrize('beta1', [0.9, 0.99, 0.999])
def test_the_first_moment_is_multiplied_in_float32(beta1):
  average = optimizers.stored_average(beta1, jnp.bfloat16)
  state = average.init({'a': jnp.zeros(3)})
  stored = jnp.asarray([0.7, -1.3e-5, 2e4], jnp.bfloat16)
  update = jnp.asarray([0.3, 1e-6, -5.0])
  got, after = average.update({'a': update}, state._replace(ema={'a': stored}))
  right = beta1 * np.asarray(stored, np.float64) + (1 - beta1) * np.asarray(update, np.float64)
  assert got['a'].dtype == jnp.float32
  np.testing.assert_allclose(got['a'], right, rtol=1e-6)
  np.testing.assert_array_equal(after.ema['a'], got['a'].astype(jnp.bfloat16))


@pytest.mark.filterwarnings('ignore:adafactor.beta1')
@pytest.mark.parametrize('beta1', [0.9, 0.99, 0.999])
def test_sums_of_updates_are_those_of_float64(beta1):
  optimizer = optimizers.adafactor(
    lambda step: 1.0, beta1=beta1, weight_decay=0.0, max_gradient_norm=1e9
  )
  draws = 0.3 + np.random.default_rng(1).standard_normal((1500, 64, 64)).astype(np.float32)
  params = {'kernel': jnp.zeros((64, 64))}

  def step(carry, draw):
    total, state = carry
    updates, state = optimizer.update({'kernel': draw}, state, params)
    return (total + updates['kernel'], state), None

  (total, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, draws))(
    jnp.zeros((64, 64)), optimizer.init(params)
  )
  second = moment = right = 0.0
  for index, draw in enumerate(draws.astype(np.float64)):
    second = draw**2 if index == 0 else 0.96 * second + 0.04 * draw**2
    moment = beta1 * moment + (1 - beta1) * draw / np.sqrt(second)
    right -= moment
  np.testing.assert_allclose(np.asarray(total, np.float64).mean() / right.mean(), 1.0, atol=1e-3)


def test_a_beta1_that_is_too_close_to_1_for_bfloat16_is_told():
  with pytest.warns(UserWarning, match=r"adafactor\.beta1=0\.999 .*first_moment_dtype='float32'"):
    optimizers.adafactor(lambda step: 1.0, beta1=0.999)
  optimizer = optimizers.adafactor(
    lambda step: 1e-3, beta1=0.999, weight_decay=0.0, first_moment_dtype='float32'
  )
  params = {'kernel': jnp.zeros((2, 2))}

  def step(carry, gradient):
    params, state = carry
    updates, state = optimizer.update(
      jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params), state, params
    )
    return (jax.tree.map(jnp.add, params, updates), state), None

  gradients = (np.arange(3000) < 100).astype(np.float32)
  (params, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, gradients))(
    params, optimizer.init(params)
  )
  second = moment = right = 0.0
  for index, gradient in enumerate(gradients.astype(np.float64)):
    second = gradient**2 if index == 0 else 0.96 * second + 0.04 * gradient**2
    moment = 0.999 * moment + 0.001 * gradient / np.sqrt(second + 1e-30)
    right -= 1e-3 * moment
  np.testing.assert_allclose(params['kernel'], right, rtol=1e-3)


def test_adafactor_factors_the_second_moment_of_wide_kernels():
  rows, columns = np.linspace(1, 2, 128), np.linspace(3, 1, 256)
  gradient = {'kernel': np.outer(rows, columns).astype(np.float32)}
  optimizer = optimizers.adafactor(lambda step: 1.0, weight_decay=0.0, max_gradient_norm=1e9)
  params = jax.tree.map(jnp.zeros_like, gradient)
  updates, state = optimizer.update(gradient, optimizer.init(params), params)
  factored = _state_with(state, 'v_row')
  assert {factored.v_row['kernel'].shape, factored.v_col['kernel'].shape} == {(128,), (256,)}
  assert factored.v['kernel'].size == 1
  # A moment of rank one is kept exactly, so that each gradient is divided by its own size.
  np.testing.assert_allclose(updates['kernel'], -0.1, rtol=1e-4)


def test_attention_is_factored_over_embed_and_heads_times_head_dim():
  rows, columns = np.linspace(1, 2, 160), np.linspace(3, 1, 192).reshape(6, 32)
  scales = np.array([1.0, 1e-3, 20.0])  # Of queries, keys and values: each is its own matrix.
  layers = np.array([1.0, 7.0])
  gradient = {
    'attention': {
      'project_in': {'kernel': np.einsum('l,e,q,hd->leqhd', layers, rows, scales, columns)},
      'project_out': {'kernel': np.einsum('l,hd,e->lhde', layers, columns, rows)},
    },
    'cross_attention': {'project_query': {'kernel': np.einsum('e,hd->ehd', rows, columns)}},
  }
  gradient = jax.tree.map(np.float32, gradient)
  optimizer = optimizers.adafactor(lambda step: 1.0, weight_decay=0.0, max_gradient_norm=1e9)
  params = jax.tree.map(jnp.zeros_like, gradient)
  updates, state = optimizer.update(gradient, optimizer.init(params), params)
  moment = _state_with(state, 'v_row')
  shapes = lambda *path: [
    tree[path[0]][path[1]]['kernel'].shape for tree in (moment.v_row, moment.v_col, moment.v)
  ]
  assert shapes('attention', 'project_in') == [(2, 160, 3), (2, 3, 192), (1,)]
  assert shapes('attention', 'project_out') == [(2, 160), (2, 192), (1,)]
  assert shapes('cross_attention', 'project_query') == [(160,), (192,), (1,)]
  # Moments of rank one are kept exactly, so that each gradient is divided by its own size.
  jax.tree.map(lambda update: np.testing.assert_allclose(update, -0.1, rtol=1e-4), updates)


def test_what_optax_factors_by_itself_stays_bit_for_bit():
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
  params = {
    'mlp': {'project_in': {'kernel': normal(2, 128, 256)}},
    'convolution': {'kernel': normal(3, 3, 128, 160)},
    'token_embedding': {'table': normal(130, 128)},
    'norm': {'scale': normal(256)},
    # Heads that are factored one by one, and kernels that are too small with joined heads too.
    'attention': {
      'project_in': {'kernel': normal(128, 3, 2, 128)},
      'project_out': {'kernel': normal(4, 16, 256)},
    },
  }
  ours = optimizers.scale_by_factored_moment(0.96)
  plain = optax.scale_by_factored_rms(
    decay_rate=0.96, decay_rate_fn=lambda step, rate: jnp.where(step == 0, 0.0, rate)
  )
  states = [ours.init(params), plain.init(params)]
  for _ in range(2):
    gradient = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
    (updates, states[0]), (right, states[1]) = (
      jax.jit(optimizer.update)(gradient, state, params)
      for optimizer, state in zip((ours, plain), states)
    )
    jax.tree.map(np.testing.assert_array_equal, updates, right)
    jax.tree.map(np.testing.assert_array_equal, *states)


_SIZES = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=256,
  mlp_width=256,
  heads=4,
  text_vocabulary=128,
  text_length=2,
  codebook_size=128,
  grid=(2, 2),
  dtype='float32',
)
_COCA = coca.CoCaConfig(
  image_size=16,
  patch_size=8,
  image_layers=1,
  unimodal_layers=1,
  multimodal_layers=1,
  width=256,
  mlp_width=256,
  heads=4,
  caption_queries=4,
  feature_dim=128,
  text_vocabulary=128,
  text_length=6,
)
_TOKENIZER = vit_vqgan.ViTVQGANConfig(
  image_size=16,
  patch_size=8,
  encoder_layers=1,
  encoder_width=256,
  encoder_mlp_width=256,
  encoder_heads=4,
  decoder_layers=1,
  decoder_width=256,
  decoder_mlp_width=256,
  decoder_heads=4,
)


@pytest.mark.parametrize(
  'objective',
  [
    generator_objective.GeneratorObjective(_SIZES),
    ranker_objective.RankerObjective(_COCA),
    tokenizer_objective.TokenizerObjective(_TOKENIZER),
    text_encoder_objective.TextEncoderObjective(_SIZES, _COCA, contrastive_weight=1.0),
  ],
  ids=lambda objective: objective.name,
)
def test_every_kernel_of_attention_is_factored_by_its_logical_axes(objective):
  boxed = jax.eval_shape(objective.init, jax.random.key(0))
  params = nn.meta.unbox(boxed)
  state = jax.eval_shape(optimizers.adafactor(1.0).init, params)
  whole = _state_with(state, 'v_row').v
  kernels = 0
  for (path, leaf), parameter, names in zip(
    jax.tree_util.tree_leaves_with_path(whole),
    jax.tree.leaves(params),
    jax.tree.leaves(nn.get_partition_spec(boxed)),
  ):
    path, axis = [key.key for key in path], None
    if 'heads' in names:
      axis = names.index('heads')
      assert names[axis + 1] == 'head_dim'
      kernels += 1
    assert factored.joined_axis(path, parameter.shape) == axis, path
    if parameter.ndim > 1 and 'kernel' in path and 'project_codes' not in path:
      assert leaf.shape == (1,), path
  assert kernels >= 4


def test_the_second_moments_of_the_largest_model_take_next_to_nothing():
  sizes = parti_config.PartiConfig(
    encoder_layers=16, decoder_layers=64, width=4096, mlp_width=16384, heads=64
  )
  params = nn.meta.unbox(
    jax.eval_shape(generator_objective.GeneratorObjective(sizes).init, jax.random.key(0))
  )
  moment = _state_with(jax.eval_shape(optimizers.adafactor(1.0).init, params), 'v_row')
  size = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves((moment.v, moment.v_row, moment.v_col))
  )
  assert layers.count_parameters(params) > 20e9
  assert size < 0.04 * 2**30


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters():
  gradients = {
    'a': {'kernel': np.full((2, 8), 3.0, np.float32)},
    'b': {'kernel': np.full((5,), 4.0, np.float32)},
  }
  norm = np.sqrt(16 * 9 + 5 * 16)
  optimizer = optimizers.adafactor(lambda step: 1.0, max_gradient_norm=4.0)
  _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
  second = _state_with(state, 'v').v
  np.testing.assert_allclose(second['a']['kernel'], (3.0 * 4.0 / norm) ** 2, rtol=1e-5)
  np.testing.assert_allclose(second['b']['kernel'], (4.0 * 4.0 / norm) ** 2, rtol=1e-5)
  small = jax.tree.map(lambda leaf: leaf / norm, gradients)
  _, state = optimizer.update(small, optimizer.init(gradients), gradients)
  np.testing.assert_allclose(_state_with(state, 'v').v['a']['kernel'], (3.0 / norm) ** 2, rtol=1e-5)


@pytest.mark.parametrize('make', [optimizers.adafactor, optimizers.adamw, optimizers.muon])
def test_weight_decay_acts_on_kernels_alone(make):
  params = {
    'mlp': {'kernel': jnp.ones((2, 3))},
    'norm': {'scale': jnp.ones(3)},
    'codebook': {'table': jnp.ones((4, 3))},
    'begin': jnp.ones(3),
  }
  optimizer = make(lambda step: 0.5, weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates['mlp']['kernel'], -0.05, rtol=1e-5)
  for path in (('norm', 'scale'), ('codebook', 'table')):
    assert not np.any(updates[path[0]][path[1]])
  assert not np.any(updates['begin'])


def test_every_kernel_of_a_model_is_decayed_and_nothing_else():
  sizes = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    width=8,
    mlp_width=8,
    heads=2,
    text_vocabulary=8,
    text_length=2,
    codebook_size=8,
    grid=(2, 2),
  )
  boxed = jax.eval_shape(generator_objective.GeneratorObjective(sizes).init, jax.random.key(0))
  for path, decays in jax.tree_util.tree_leaves_with_path(optimizers.decayed(nn.meta.unbox(boxed))):
    assert decays == ('kernel' in jax.tree_util.keystr(path)), path


def test_adamw_by_hand():
  params = {'kernel': np.array([2.0, -1.0], np.float32)}
  gradient = {'kernel': np.array([0.3, -0.4], np.float32)}  # Of norm 0.5.
  optimizer = optimizers.adamw(
    lambda step: 0.1, beta1=0.9, beta2=0.99, weight_decay=0.2, max_gradient_norm=0.25
  )
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  # Debiased moments of the first step: the clipped gradient over its size.
  np.testing.assert_allclose(
    updates['kernel'], [-0.1 * (1 + 0.2 * 2), -0.1 * (-1 - 0.2)], rtol=1e-5
  )


def _orthogonalized(matrix):
  """Five steps of Newton-Schulz with Muon's coefficients, in float64."""
  x = matrix / np.linalg.norm(matrix)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


def test_muon_by_hand():
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
  make = lambda: {
    'layers': {
      'attention': {
        'project_in': {'kernel': normal(2, 6, 3, 2, 4)},
        'project_out': {'kernel': normal(2, 2, 4, 6)},
      },
      'mlp': {
        'project_in': {'kernel': normal(2, 6, 10)},
        'project_out': {'kernel': normal(2, 9, 6)},
      },
    },
    'cross_attention': {'project_query': {'kernel': normal(6, 2, 4)}},
    'logits': {'kernel': normal(6, 5)},
    'token_embedding': {'table': normal(5, 6)},
  }
  params = make()
  optimizer = optimizers.muon(
    lambda step: 0.5 + step,
    beta=0.95,
    beta1=0.9,
    beta2=0.99,
    weight_decay=0.1,
    max_gradient_norm=1e9,
  )
  # Kernels -> indices of a stack, and the shape of a matrix.
  kernels = {
    ('layers', 'attention', 'project_in'): (
      [(i, slice(None), j) for i in (0, 1) for j in (0, 1, 2)],
      (6, 8),
    ),
    ('layers', 'attention', 'project_out'): ([(0,), (1,)], (8, 6)),
    ('layers', 'mlp', 'project_in'): ([(0,), (1,)], (6, 10)),
    ('layers', 'mlp', 'project_out'): ([(0,), (1,)], (9, 6)),
    ('cross_attention', 'project_query'): ([()], (6, 8)),
  }
  at = lambda tree, path: functools.reduce(lambda node, key: node[key], path, tree)
  state, moments = optimizer.init(params), jax.tree.map(np.zeros_like, params)
  update = jax.jit(optimizer.update)
  for step in range(2):
    gradients = make()
    updates, state = update(gradients, state, params)
    moments = jax.tree.map(lambda old, new: 0.95 * old + 0.05 * np.float64(new), moments, gradients)
    for path, (indices, shape) in kernels.items():
      for index in indices:
        moment, gradient, kernel, found = (
          np.asarray(at(tree, path)['kernel'][index], np.float64).reshape(shape)
          for tree in (moments, gradients, params, updates)
        )
        # Nesterov's momentum, debiased as of the next step.
        ahead = 0.95 * moment / (1 - 0.95 ** (step + 2)) + 0.05 * gradient / (
          1 - 0.95 ** (step + 1)
        )
        wanted = 0.2 * np.sqrt(max(shape)) * _orthogonalized(ahead) + 0.1 * kernel
        np.testing.assert_allclose(found, -(0.5 + step) * wanted, rtol=1e-3, atol=1e-3)
    # AdamW does the rest; only the logits are decayed.
    if step == 0:
      for name, kind, decay in (('logits', 'kernel', 0.1), ('token_embedding', 'table', 0.0)):
        wanted = -0.5 * (np.sign(gradients[name][kind]) + decay * params[name][kind])
        np.testing.assert_allclose(updates[name][kind], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'objective',
  [
    generator_objective.GeneratorObjective(_SIZES),
    generator_objective.GeneratorObjective(
      dataclasses.replace(
        _SIZES,
        text_encoder=t5_encoder.T5EncoderConfig(
          layers=1, width=8, mlp_width=16, heads=2, text_vocabulary=8, text_length=2
        ),
      )
    ),
    generator_objective.GeneratorObjective(
      dataclasses.replace(_SIZES, mlp='swiglu', qk_norm=True, positions='rotary_2d')
    ),
    ranker_objective.RankerObjective(_COCA),
    tokenizer_objective.TokenizerObjective(_TOKENIZER),
  ],
  ids=['generator', 'with_t5', 'with_options', 'ranker', 'tokenizer'],
)
def test_muon_takes_the_axes_of_matrices_by_their_names(objective):
  boxed = jax.eval_shape(objective.init, jax.random.key(0))
  params = nn.meta.unbox(boxed)
  names = jax.tree.leaves(nn.get_partition_spec(boxed))
  found = jax.tree.leaves(
    optimizers.muon_axes(params), is_leaf=lambda node: not isinstance(node, dict)
  )
  sides, matrices = {('embed',), ('mlp',), ('heads', 'head_dim')}, 0
  for (path, _), axes_names, axes in zip(
    jax.tree_util.tree_leaves_with_path(params), names, found, strict=True
  ):
    rest = set(axes_names) - {'layers', 'qkv', 'kv'}
    name = jax.tree_util.keystr(path)
    inner = rest in ({'embed', 'mlp'}, {'embed', 'heads', 'head_dim'})
    inner = inner and 'project_hidden' not in name  # That of the tokenizer is in no block.
    assert (axes is not None) == inner, path
    if axes is None:
      continue
    matrices += 1
    of = lambda numbers, names=axes_names: tuple(names[number] for number in numbers)
    read, written = of(axes.reduction_axis), of(axes.output_axis)
    assert {read, written} <= sides and set(read + written) == rest, path
    assert (read == ('embed',)) == ('project_out' not in name), path
  assert matrices >= 6


@pytest.mark.parametrize('name', ['beta', 'beta1', 'beta2'])
def test_decays_of_muon_that_can_not_be_are_named(name):
  with pytest.raises(UserError, match=rf'muon\.{name}=1\.0 must be at least 0 and below 1'):
    optimizers.muon(1.0, **{name: 1.0})


@pytest.mark.parametrize(
  'step, rate',
  [
    (0, 0.0),
    (2500, 2.25e-5),
    (5000, 4.5e-5),
    (30000, 4.5e-5),
    (85000, 4.5e-5),
    (267500, 4.5e-5 * 0.025**0.5),
    (450000, 4.5e-5 * 0.025),
    (600000, 4.5e-5 * 0.025),
  ],
)
def test_the_papers_schedule_at_its_corners(step, rate):
  schedule = optimizers.parti_schedule()
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)
  np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-5)


@pytest.mark.parametrize(
  'step, rate',
  [(0, 0.0), (5000, 5e-5), (10000, 1e-4), (255000, 7.5e-5), (500000, 5e-5), (600000, 5e-5)],
)
def test_the_tokenizers_schedule_at_its_corners(step, rate):
  schedule = optimizers.warmup_cosine(1e-4, 10000, 500000, 5e-5)
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-4)


@pytest.mark.parametrize('steps, ends', [(100, 100), (30, 30), (2, 2)])
def test_a_schedule_follows_the_length_of_the_run(steps, ends):
  file = 'gin_configs/runs/tiny_ranker.gin'  # Its warm-up takes 10 steps.
  gin_config.parse([file], [f'train.steps = {steps}'])
  schedule = gin.get_configurable(optimizers.warmup_cosine)()
  assert float(schedule(steps)) == pytest.approx(2e-5 if steps > 10 else steps * 2e-4)
  assert gin.query_parameter('warmup_cosine.train_steps') == ends


def test_a_schedule_may_have_a_length_of_its_own():
  gin_config.parse(['gin_configs/runs/tiny_ranker.gin'], ['warmup_cosine.decay_steps = 40'])
  schedule = gin.get_configurable(optimizers.warmup_cosine)()
  assert float(schedule(40)) == pytest.approx(2e-5) and float(schedule(39)) > 2.1e-5
  gin.clear_config()
  with pytest.raises(UserError, match='set warmup_cosine.decay_steps'):
    optimizers.warmup_cosine(1e-3, 10)
