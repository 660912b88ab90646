"""Parti as a model of t5x: its parameters' axes, losses, scores and drawing, on t5x's own mesh."""

import dataclasses
import os
import types

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import require_t5x  # noqa: F401
import seqio
from t5x import checkpoints
from t5x import decoding
from t5x import partitioning
from t5x import trainer as t5x_trainer
from t5x import utils

from parti_jax.core import errors
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding as our_decoding
from parti_jax.sampling import parameters
from parti_jax.t5x import logical_axes
from parti_jax.t5x import models
from parti_jax.t5x import optimizers
from parti_jax.training import optimizers as our_optimizers
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

# Wide enough for Adafactor to factor the moment of the embeddings.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=128,
  mlp_width=256,
  heads=4,
  text_vocabulary=160,
  text_length=6,
  codebook_size=32,
  grid=(2, 3),
  dropout=0.1,
  dtype='float32',
)
SHAPES = {
  'encoder_input_tokens': (4, 6),
  'decoder_target_tokens': (4, 6),
  'decoder_loss_weights': (4, 6),
}
TYPES = {
  'encoder_input_tokens': jnp.int32,
  'decoder_target_tokens': jnp.int32,
  'decoder_loss_weights': jnp.float32,
}


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  texts = rng.integers(3, 160, (4, 6), np.int32)
  texts[:, 4:] = [1, 0]
  return {
    'encoder_input_tokens': texts,
    'decoder_target_tokens': rng.integers(0, 32, (4, 6)),
    'decoder_loss_weights': np.ones((4, 6), np.float32),
  }


def make_model(**kwargs):
  return models.PartiModel(
    parti.Parti(CONFIG), optimizers.OptaxWrapper(our_optimizers.adafactor), **kwargs
  )


@pytest.fixture(scope='module')
def params():
  return jax.jit(make_model().get_initial_variables, static_argnums=1)(
    jax.random.key(0), flax.core.freeze(SHAPES)
  )['params']


@pytest.fixture(scope='module')
def partitioner():
  """A mesh of 4 of the emulated devices would need other devices; this one has 4 × 2."""
  return partitioning.PjitPartitioner(num_partitions=2)


def make_initializer(model, partitioner, shapes, types):
  return utils.TrainStateInitializer(
    model.optimizer_def, model.get_initial_variables, shapes, partitioner, types
  )


def test_partitions_on_emulated_devices(partitioner):
  assert dict(partitioner.mesh.shape) == {'data': 4, 'model': 2}
  with pytest.raises(ValueError, match='num_partitions=3'):
    partitioning.default_mesh(3)


def test_relative_folders_are_taken(partitioner, tmp_path, monkeypatch):
  """Orbax refuses them, and so would t5x's commands."""
  monkeypatch.chdir(tmp_path)
  state = make_initializer(make_model(), partitioner, SHAPES, TYPES).global_train_state_shape
  os.mkdir('run')
  manager = checkpoints.OrbaxCheckpointManagerInterface('run', state, partitioner)
  assert str(manager.directory) == str(tmp_path / 'run')
  manager.close()
  with pytest.raises(AssertionError, match=str(tmp_path)):
    manager.restore(path='run/checkpoint_7')


def test_state_is_split_by_t5x_standard_rules(partitioner):
  """Parameters and both kinds of Adafactor's moments, abstractly: nothing is computed."""
  rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
  two_ways = partitioning.PjitPartitioner(num_partitions=2, logical_axis_rules=rules)
  axes = make_initializer(make_model(), two_ways, SHAPES, TYPES).train_state_axes.state_dict()
  spec = lambda *names: jax.sharding.PartitionSpec(*names)
  decoder = axes['target']['image_decoder']['decoder']['layers']
  assert decoder['mlp']['project_in']['kernel'] == spec(None, 'data', 'model')
  moments = axes['state']['param_states']['1']
  table = ('image_decoder', 'token_embedding', 'table')
  of_table = lambda tree: tree[table[0]][table[1]][table[2]]
  assert of_table(axes['target']) == spec('model', 'data')
  row = moments['v_row']['image_decoder']['decoder']['layers']['mlp']['project_in']['kernel']
  column = moments['v_col']['image_decoder']['decoder']['layers']['mlp']['project_in']['kernel']
  assert (row, column) == (spec(None, 'data'), spec(None, 'model'))
  assert of_table(moments['v']) == spec('model', 'data')  # 32 codes are too few to be factored.
  assert of_table(axes['state']['param_states']['2']['ema']) == spec('model', 'data')


def test_activations_are_split_by_t5x_rules(partitioner, params, batch):
  """Their names are ours; and what is written for a platform knows which one it is."""
  model = make_model()

  def of_batch(params, batch):
    with logical_axes.bound():
      assert mesh_lib.platform() == 'cpu' and mesh_lib.current().shape['model'] == 2
    return model.eval_fn(params, batch)[0]

  lowered = partitioner.partition(
    of_batch,
    in_axis_resources=(None, partitioner.data_partition_spec),
    out_axis_resources=None,
  ).lower(params, batch)
  assert '[{"data"}, {}, {"model"}]' in lowered.as_text()  # Logits, from replicated parameters.


def test_loss_is_ours(params, batch):
  key = jax.random.PRNGKey(3)
  for weights in (None, (1.0, 2.0)):
    model = make_model(depth_loss_weights=weights)
    objective = generator_objective.GeneratorObjective(CONFIG, depth_loss_weights=weights)
    found, metrics = jax.jit(model.loss_fn)(params, batch, key)
    keys = layers.dropout_keys(jax.random.wrap_key_data(key), 4)
    wanted, aux = jax.jit(objective.loss)(flax.core.unfreeze(params), batch, keys, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(
      metrics['accuracy'].compute(), aux['metrics']['token_accuracy'], rtol=1e-6
    )
    of_eval = jax.jit(model.eval_fn)(params, batch)[0]
    np.testing.assert_allclose(
      of_eval,
      np.mean(jax.jit(objective.evaluate)(flax.core.unfreeze(params), batch)['loss']),
      rtol=1e-6,
    )
    assert abs(found - of_eval) > 1e-4  # Dropout is on in one of them.


def test_microbatches_are_the_batch(params, batch):
  """t5x adds the losses and gradients of microbatches up, after it has given the batch's size."""

  def of_parts(microbatches, **kwargs):
    module = parti.Parti(dataclasses.replace(CONFIG, dropout=0.0))
    model = models.PartiModel(module, optimizers.OptaxWrapper(our_optimizers.adafactor), **kwargs)
    jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), SHAPES))
    state = types.SimpleNamespace(params=params, flax_mutables=None)
    gradients, metrics, _ = jax.jit(
      lambda batch, key: t5x_trainer.accumulate_grads_microbatched(
        model, state, batch, key, microbatches
      )
    )(batch, jax.random.PRNGKey(0))
    return gradients, metrics['loss'].total

  whole, loss = of_parts(None)
  for kwargs in ({}, {'loss_normalizing_factor': batch['decoder_loss_weights'].size}):
    parts, loss_of_parts = of_parts(2, **kwargs)
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    jax.tree.map(
      lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), parts, whole
    )


def test_scores_are_log_likelihoods(params, batch):
  batch = {**batch, 'decoder_loss_weights': np.array([[1, 1, 1, 0, 0, 0]] * 4, np.float32)}
  scores, parts = jax.jit(make_model().score_batch, static_argnums=2)(params, batch, True)
  logits = parti.Parti(CONFIG).apply(
    {'params': flax.core.unfreeze(params)},
    jnp.asarray(batch['encoder_input_tokens']),
    jnp.asarray(batch['decoder_target_tokens']),
  )
  of_tokens = np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch['decoder_target_tokens'][..., None], 2
  )[..., 0]
  np.testing.assert_allclose(scores, of_tokens[:, :3].sum(1), rtol=1e-5)
  np.testing.assert_allclose(parts['decoder']['token_scores'][0].sum(1), scores, rtol=1e-6)


@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
def test_greedy_tokens_are_ours(params, batch, guidance_scale):
  model = make_model(guidance_scale=guidance_scale)
  drawn, aux = jax.jit(
    lambda params, batch: model.predict_batch_with_aux(
      params, batch, decoder_params={'temperature': 0.0}
    )
  )(params, batch)
  ours = our_decoding.sample_tokens(
    CONFIG,
    parameters.for_sampling(CONFIG, flax.core.unfreeze(params)),
    jnp.asarray(batch['encoder_input_tokens']),
    our_decoding.image_keys(0, jnp.arange(4)),
    our_decoding.Sampling(guidance_scale, guided=guidance_scale != 1.0, greedy=True),
  )
  np.testing.assert_array_equal(drawn, ours)
  assert aux['scores'].shape == (4,)


def _likelihoods(params, texts, tokens, guidance_scale):
  """Log likelihoods of pictures' tokens, all given at once, float32 [batch, pictures]."""
  apply = jax.jit(
    lambda texts, tokens: parti.Parti(CONFIG).apply(
      {'params': flax.core.unfreeze(params)}, texts, tokens
    )
  )
  texts = np.repeat(texts, tokens.shape[1], axis=0)
  flat = np.reshape(tokens, (-1, tokens.shape[2]))
  logits, unconditional = (
    apply(texts, flat),
    apply(text_encoders.empty_text(CONFIG, jnp.asarray(texts)), flat),
  )
  logits = unconditional + guidance_scale * (logits - unconditional)
  of_tokens = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), flat[..., None], 2)
  return of_tokens.sum((1, 2)).reshape(tokens.shape[:2])


@pytest.mark.parametrize('guidance_scale', [1.0, 2.0])
@pytest.mark.parametrize('decode_fn', [decoding.temperature_sample, decoding.beam_search])
def test_several_pictures_of_a_text(params, batch, decode_fn, guidance_scale):
  """Each has its own text's memory and its own cache: scores are those of the whole picture."""
  model = make_model(guidance_scale=guidance_scale, decode_fn=decode_fn)
  drawing = {'topk': 0} if decode_fn is decoding.temperature_sample else {}
  draw = jax.jit(
    lambda params, batch, rng: model.predict_batch_with_aux(
      params, batch, rng, drawing, return_all_decodes=True, num_decodes=3
    )
  )
  tokens, aux = draw(params, batch, jax.random.PRNGKey(1))
  assert tokens.shape == (4, 3, 6) and len({tuple(row) for row in np.asarray(tokens[0])}) == 3
  np.testing.assert_allclose(
    aux['scores'],
    _likelihoods(params, batch['encoder_input_tokens'], tokens, guidance_scale),
    rtol=1e-5,
  )
  assert np.all(np.diff(aux['scores']) >= 0)  # The likeliest is the last.


def test_steps_on_the_mesh_and_a_step_that_is_not_finite(partitioner, batch):
  """t5x's own trainer and state on 4 × 2 devices; NaN leaves all but the step as it was."""
  model = make_model()
  initializer = make_initializer(model, partitioner, SHAPES, TYPES)
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  trainer = t5x_trainer.Trainer(
    model,
    state,
    partitioner,
    eval_names=[],
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=lambda step: 1e-2,
    num_microbatches=None,
  )
  losses = [trainer.train(iter([batch]), 1).result()['loss'].value for _ in range(8)]
  assert losses[-1] < losses[0] - 0.5
  before = jax.device_get(trainer.train_state.state_dict())
  bad = {**batch, 'decoder_loss_weights': np.full((4, 6), np.nan, np.float32)}
  trainer.train(iter([bad]), 1).result()
  after = jax.device_get(trainer.train_state.state_dict())
  assert (before['state'].pop('step'), after['state'].pop('step')) == (8, 9)
  jax.tree.map(np.testing.assert_array_equal, after, before)
  trainer.close()


def test_what_does_not_fit_is_named():
  with pytest.raises(errors.UserError, match='input_vocabulary has 161 ids.*text_vocabulary=160'):
    make_model(input_vocabulary=seqio.PassThroughVocabulary(161))
  with pytest.raises(errors.UserError, match='depth_loss_weights.*2 numbers'):
    make_model(depth_loss_weights=(1, 2, 3))
  with pytest.raises(errors.UserError, match=r"TASK_FEATURE_LENGTHS\['targets'\]=5 is not the 6"):
    make_model().get_initial_variables(
      jax.random.key(0), SHAPES | {'decoder_target_tokens': (4, 5)}
    )
  for name, value in (('adversarial_weight', 0.1), ('revive_every', 5), ('ema', 0.9)):
    objective = tokenizer_objective.TokenizerObjective(vit_vqgan.ViTVQGANConfig(), **{name: value})
    with pytest.raises(errors.UserError, match=f'TokenizerObjective.{name}.*parti-jax train'):
      models.TokenizerModel(objective, None)


TOKENIZER = vit_vqgan.ViTVQGANConfig(
  image_size=8,
  patch_size=4,
  encoder_layers=1,
  encoder_width=16,
  encoder_mlp_width=32,
  encoder_heads=2,
  decoder_layers=1,
  decoder_width=16,
  decoder_mlp_width=32,
  decoder_heads=2,
  codebook_size=16,
  code_dim=4,
  dtype='float32',
)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def make_tokenizer():
  return models.TokenizerModel(
    tokenizer_objective.TokenizerObjective(TOKENIZER, quantize_from=2),
    optimizers.OptaxWrapper(our_optimizers.adamw),
  )


def test_microbatches_of_the_tokenizer_are_the_batch():
  model = make_tokenizer()
  variables = flax.core.unfreeze(
    jax.jit(lambda key: model.get_initial_variables(key, {'images': IMAGES.shape}))(
      jax.random.key(0)
    )
  )

  def of_parts(step, microbatches):
    state = types.SimpleNamespace(
      params=variables['params'],
      flax_mutables=flax.core.freeze({'statistics': variables['statistics'] | {'step': step}}),
    )
    gradients, metrics, _ = t5x_trainer.accumulate_grads_microbatched(
      model, state, {'images': jnp.asarray(IMAGES)}, jax.random.PRNGKey(0), microbatches
    )
    return gradients, metrics['loss'].total

  both = jax.jit(lambda step: (of_parts(step, None), of_parts(step, 2)))
  for step in (0, 2):  # Before latents are quantized, and after.
    whole, parts = both(step)
    jax.tree.map(
      lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6), parts, whole
    )


def test_tokenizer_trains_and_counts_its_codes(partitioner):
  model = make_tokenizer()
  initializer = make_initializer(
    model, partitioner, {'images': IMAGES.shape}, {'images': jnp.uint8}
  )
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  trainer = t5x_trainer.Trainer(
    model,
    state,
    partitioner,
    eval_names=['images'],
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(0),
    learning_rate_fn=lambda step: 3e-3,
    num_microbatches=None,
  )
  summaries = [trainer.train(iter([{'images': IMAGES}]), 1).result() for _ in range(6)]
  assert summaries[-1]['loss'].value < summaries[0]['loss'].value
  statistics = trainer.train_state.flax_mutables['statistics']
  assert int(statistics['step']) == 6 and 0 < np.sum(statistics['code_use']) < 16
  assert trainer.eval({'images': iter([{'images': IMAGES}])})['images']['l2'].value > 0
  batch = {'images': jnp.asarray(IMAGES)}
  tokens, aux = model.predict_batch_with_aux(trainer.train_state.params, batch)
  assert tokens.shape == (4, 4) and aux['psnr'].shape == (4,)
  np.testing.assert_allclose(model.score_batch(trainer.train_state.params, batch), -aux['l2'])
  trainer.close()
