"""Adapters are trained in place of a network, saved without it, and added to it (LoRA)."""

import dataclasses
import json

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import fingerprints
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary
from parti_jax.exported_model import adapters as adapters_lib
from parti_jax.exported_model import model_folder
from parti_jax.models import discriminator
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import lora
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import optimizers
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import lora_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import tokenizer_objective

CAPTIONS = ('red apple', 'green apple', 'blue ball', 'black cat')
TOKENIZER = dataclasses.replace(tiny_configs.TOKENIZER, codebook_size=24)
GENERATOR = dataclasses.replace(tiny_configs.GENERATOR, text_vocabulary=40)
TARGETS = ('attention/query', 'image_decoder/*/cross_attention', 'mlp', 'logits')
RANK, ALPHA = 3, 6.0


def _random(network, config, seed):
  """Random parameters for a part of a model."""
  abstract = nn.meta.unbox(model_folder.abstract(network, config))
  draw = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: 0.4 * draw.normal(size=leaf.shape).astype('f4'), abstract)


def _save(folder, config, seed=0, **more):
  path = folder / 'vocabulary.model'
  vocabulary.train_vocabulary(CAPTIONS, 20, str(path))
  return model_folder.save(
    folder / 'model',
    generator_config=config,
    generator_params=_random('generator', config, seed),
    tokenizer_config=TOKENIZER,
    tokenizer_params=_random('tokenizer', TOKENIZER, 1),
    vocabulary_path=path,
    dtype='float32',
    provenance={'generator': {'source': 'a seed'}, 'data': 'none'},
    **more,
  )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return _save(tmp_path_factory.mktemp('base'), GENERATOR)


def _objective(base, **more):
  settings = {'rank': RANK, 'alpha': ALPHA, 'targets': TARGETS} | more
  inner = generator_objective.GeneratorObjective(GENERATOR)
  return lora_objective.LoraObjective(inner, str(base), **settings)


def _batch(step=0):
  draw = np.random.default_rng(step)
  return {
    'encoder_input_tokens': draw.integers(3, 40, (8, 4)).astype(np.int32),
    'decoder_target_tokens': draw.integers(0, 24, (8, 4)).astype(np.int32),
    'decoder_loss_weights': np.ones((8, 4), np.float32),
  }


def _trainer(objective, *sizes, optimizer=None, microbatches=1):
  sizes = sizes or (1, 1, 1, 1)
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  optimizer = optimizer or optimizers.adamw(lambda step: 3e-2)
  return trainer_lib.Trainer(objective, optimizer, mesh, 5, microbatches)


def _stepped(trainer, steps=3):
  state = trainer.create_state()
  losses = []
  for step in range(steps):
    state, metrics = trainer.step(state, trainer.put(_batch(step)))
    losses.append(float(metrics['loss']))
  return state, losses


def _saved_run(base, folder, **more):
  """A run of three steps with a checkpoint; returns its trainer and its last state."""
  trainer = _trainer(_objective(base, **more))
  state, _ = _stepped(trainer)
  inputs = inputs_lib.Inputs(trainer.objective, {}, False)
  run = checkpoint_manager.Checkpoints(folder)
  run.save(3, state, inputs.state(), run_checkpoints.describe(trainer.objective))
  run.close()
  return trainer, state


@pytest.fixture(scope='module')
def trained(base, tmp_path_factory):
  """The folder of a run, its trainer and its last state."""
  folder = tmp_path_factory.mktemp('run')
  return folder, *_saved_run(base, folder)


def _loss(config, params, batch):
  objective = generator_objective.GeneratorObjective(config)
  return jax.jit(objective.evaluate)(params, batch)['loss']


@pytest.mark.parametrize('rank', [0, RANK])
def test_the_first_step_sees_the_base_bit_for_bit(base, rank):
  params = jax.tree.map(np.asarray, model_folder.load(base).generator_params)
  trainer = _trainer(_objective(base, rank=rank))
  found = trainer.evaluate(trainer.create_state().params, [_batch()])
  inner = generator_objective.GeneratorObjective(GENERATOR)
  plain = _trainer(inner)
  wanted = plain.evaluate(run_checkpoints.put_like(params, plain.abstract.params), [_batch()])
  assert found == wanted
  effective = trainer.objective.effective(trainer.create_state().params | trainer.constants)
  jax.tree.map(np.testing.assert_array_equal, effective, params)


def test_only_adapters_change_have_moments_and_are_saved(base, trained):
  folder, trainer, state = trained
  jax.tree.map(
    np.testing.assert_array_equal, trainer.constants, dict(model_folder.load(base).generator_params)
  )
  first = jax.device_get(trainer.create_state().params)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, jax.device_get(state.params))
  assert list(first) == ['adapters'] and all(jax.tree.leaves(moved))
  saved = run_checkpoints.saved_shapes(run_checkpoints.latest_checkpoint(folder))
  names = [name.split('/')[-1] for name in saved if len(saved[name])]
  assert set(names) == {'lora_a', 'lora_b'}
  layer = 'params/adapters/image_decoder/decoder/layers'
  assert saved[f'{layer}/attention/query/lora_a'] == (2, 16, RANK)
  assert saved[f'{layer}/attention/query/lora_b'] == (2, RANK, 4, 4)
  assert saved[f'{layer}/cross_attention/project_out/lora_a'] == (2, 4, 4, RANK)
  assert not any('attention/key' in name for name in saved if '/attention/' in name)


def test_adapters_have_the_effect_of_the_product(base):
  objective = _objective(base)
  params = dict(model_folder.load(base).generator_params)
  adapters = nn.meta.unbox(objective.init(jax.random.key(0)))['adapters']
  draw = np.random.default_rng(3)
  adapters = jax.tree.map(lambda leaf: jnp.array(draw.normal(size=leaf.shape), 'f4'), adapters)
  params = jax.tree.map(np.asarray, params)
  found = flax.traverse_util.flatten_dict(
    jax.device_get(objective.effective(params | {'adapters': adapters})), sep='/'
  )
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  of = flax.traverse_util.flatten_dict(adapters, sep='/')
  layers = 'image_decoder/decoder/layers'
  changed = {name for name in flat if np.any(found[name] != flat[name])}
  assert changed == {
    f'{stack}/layers/{name}/kernel'
    for stack in ('image_decoder/decoder', 'text_encoder/encoder')
    for name in ('attention/project_in', 'mlp/project_in', 'mlp/project_out')
  } | {
    f'{layers}/cross_attention/{name}/kernel'
    for name in ('project_query', 'project_memory', 'project_out')
  } | {'image_decoder/logits/kernel'}
  scale = ALPHA / RANK
  for layer in range(2):
    at = lambda name, layer=layer: of[f'{layers}/{name}'][layer]
    query = np.einsum('er,rhd->ehd', at('attention/query/lora_a'), at('attention/query/lora_b'))
    moved = (
      found[f'{layers}/attention/project_in/kernel'] - flat[f'{layers}/attention/project_in/kernel']
    )
    np.testing.assert_allclose(moved[layer, :, 0], scale * query, atol=1e-5)
    np.testing.assert_array_equal(moved[layer, :, 1:], 0)
    value = np.einsum(
      'er,rhd->ehd', at('cross_attention/value/lora_a'), at('cross_attention/value/lora_b')
    )
    name = f'{layers}/cross_attention/project_memory/kernel'
    np.testing.assert_allclose((found[name] - flat[name])[layer, :, 1], scale * value, atol=1e-5)
    out = np.einsum(
      'hdr,re->hde',
      at('cross_attention/project_out/lora_a'),
      at('cross_attention/project_out/lora_b'),
    )
    name = f'{layers}/cross_attention/project_out/kernel'
    np.testing.assert_allclose((found[name] - flat[name])[layer], scale * out, atol=1e-5)


def test_info_says_what_is_adapted(base, trained, capsys):
  assert main.main(['info', str(trained[0])]) == 0
  shown = ' '.join(capsys.readouterr().out.split())
  assert f'rank 3, alpha 6.0, of {", ".join(TARGETS)}; base {base}' in shown


def test_merged_equals_unmerged(base, trained, tmp_path, capsys):
  folder, trainer, state = trained
  export = ['export', f'--base={base}', f'--generator={folder}', f'--output_dir={tmp_path / "new"}']
  assert main.main(export) == 0
  shown = capsys.readouterr().out
  assert 'adding its adapters of rank 3' in shown and 'rounded' not in shown
  model = model_folder.load(tmp_path / 'new')
  merged = _loss(GENERATOR, jax.tree.map(np.asarray, model.generator_params), _batch(9))
  unmerged = trainer.evaluate(state.params, [_batch(9)])['loss']
  np.testing.assert_allclose(np.mean(merged), unmerged, rtol=1e-6)
  plain = _loss(
    GENERATOR, jax.tree.map(np.asarray, model_folder.load(base).generator_params), _batch(9)
  )
  assert abs(np.mean(plain) - unmerged) > 1e-2
  kept = model.provenance['generator_lora']
  assert kept['rank'] == RANK and kept['steps'] == 3 and model.provenance['data'] == 'none'
  assert model.provenance['generator'] == {'source': 'a seed'}
  # Without --base, the base is read where the run had it.
  vocabulary_path = base / 'vocabulary.model'
  export = [*export[:1], *export[2:3], f'--tokenizer={base}', f'--vocabulary={vocabulary_path}']
  assert main.main([*export, f'--output_dir={tmp_path / "half"}']) == 0
  assert 'rounded to float16; --dtype=float32 keeps them' in capsys.readouterr().out
  assert main.main([*export, f'--output_dir={tmp_path / "other"}', '--dtype=float32']) == 0
  other = model_folder.load(tmp_path / 'other')
  jax.tree.map(
    np.testing.assert_array_equal, dict(other.generator_params), dict(model.generator_params)
  )


def test_adapters_alone_are_added_when_sampling(base, trained, tmp_path, capsys):
  folder = trained[0]
  export = ['export', f'--generator={folder}', f'--output_dir={tmp_path}', '--no-merge']
  assert main.main(export) == 0
  file = tmp_path / 'generator_lora.safetensors'
  assert str(file) in capsys.readouterr().out
  assert file.stat().st_size < (base / 'generator.safetensors').stat().st_size
  assert main.main(export) == 2  # Replaces nothing unless it is told to.
  assert '--overwrite' in capsys.readouterr().err
  assert main.main([*export, '--overwrite']) == 0
  merge = ['export', f'--base={base}', f'--generator={folder}', f'--output_dir={tmp_path / "m"}']
  assert main.main(merge) == 0
  sample = lambda model: model.generate(['red apple', 'blue ball'], num_images=8).tokens
  plain = sample(text_to_image.load(base))
  merged = sample(text_to_image.load(tmp_path / 'm'))
  adapted = text_to_image.load(base, lora=str(file))
  np.testing.assert_array_equal(sample(adapted), merged)
  assert adapted.model_name == 'model + generator_lora.safetensors' and np.any(merged != plain)
  # A factor of 0 is the base, and several files add up.
  np.testing.assert_array_equal(sample(text_to_image.load(base, lora=[f'{file}:0'])), plain)
  twice = text_to_image.load(base, lora=[f'{file}:0.25', f'{file}:0.75'])
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(near, twice.generator_params, adapted.generator_params)
  command = ['generate', 'red apple', f'--model={base}', f'--lora={file}:1']
  assert main.main([*command, '--num_images=1', f'--output_dir={tmp_path / "drawn"}']) == 0
  assert len(list((tmp_path / 'drawn').glob('*.png'))) == 2
  # On a mesh each device reads its own part.
  meshed = text_to_image.load(base, mesh_lib.make_mesh(data=4, tensor=2), lora=str(file))
  assert np.mean(sample(meshed) == merged) > 0.9


def _damaged(file, folder, change):
  """Writes a changed copy of a file of adapters; `change` gets arrays and metadata."""
  with safetensors.safe_open(file, 'np') as opened:
    arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    metadata = opened.metadata()
  change(arrays, metadata)
  path = folder / 'damaged.safetensors'
  path.write_bytes(safetensors.numpy.save(arrays, metadata))
  return path


FIRST = 'image_decoder/decoder/layers/attention/query'


def _without_first(arrays, metadata):
  del arrays[f'{FIRST}/lora_a'], arrays[f'{FIRST}/lora_b']


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda arrays, metadata: arrays.pop(f'{FIRST}/lora_b'), 'query/lora_b is missing'),
    (
      lambda arrays, metadata: arrays.update({f'{FIRST}/lora_a': np.ones((2, 16, 4), 'f4')}),
      r'has the shape \[2, 16, 4\] instead of \[2, 16, 3\]',
    ),
    (
      lambda arrays, metadata: arrays.update({'elsewhere/lora_a': np.ones((2, 3), 'f4')}),
      'elsewhere/lora_a is not of a projection',
    ),
    (lambda arrays, metadata: arrays[f'{FIRST}/lora_a'].fill(np.nan), 'finite'),
    (lambda arrays, metadata: arrays.clear(), 'has no adapters'),
    (_without_first, f'{FIRST} does not have adapters as the targets say; write it again'),
    (lambda arrays, metadata: metadata.update(targets='["mlp"]'), 'as the targets say, nor do'),
    (lambda arrays, metadata: metadata.update(targets='["none"]'), 'none. chooses no projection'),
    (lambda arrays, metadata: metadata.update(rank='many'), 'metadata is damaged'),
    (lambda arrays, metadata: metadata.update(alpha='nan'), 'metadata is damaged'),
    (lambda arrays, metadata: metadata.update(network='other'), 'metadata is damaged'),
    (lambda arrays, metadata: metadata.update(version='9'), 'format version 9'),
    (lambda arrays, metadata: metadata.clear(), 'not a file of adapters'),
    (lambda arrays, metadata: metadata.update(base='0' * 16), 'trained on the base 0000'),
    (lambda arrays, metadata: metadata.update(network='ranker'), 'which model does not have'),
  ],
)
def test_files_that_do_not_fit_are_refused(base, trained, tmp_path, change, message):
  file = tmp_path / 'generator_lora.safetensors'
  export = ['export', f'--generator={trained[0]}', f'--output_dir={tmp_path}', '--no-merge']
  assert main.main(export) == 0
  with pytest.raises(UserError, match=message):
    text_to_image.load(base, lora=str(_damaged(file, tmp_path, change)))


def test_what_is_no_file_of_adapters_is_refused(base, tmp_path):
  (tmp_path / 'text').write_bytes(b'not safetensors')
  for given, message in {
    str(tmp_path / 'text'): 'is damaged, or not a file of safetensors',
    str(tmp_path / 'nowhere'): 'file not found',
    str(tmp_path): 'is a folder; give the file',
    f'{tmp_path}/text:inf': 'the factor inf must be a finite number',
    f'{tmp_path}/text:much': "the factor 'much' after the file is not a number",
  }.items():
    with pytest.raises(UserError, match=message):
      text_to_image.load(base, lora=given)


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--dtype=float16'], 'takes no --dtype; leave it out'),
    (['--guidance_scale=3', '--allow_mismatch'], 'no --allow_mismatch, no --guidance_scale'),
    ([], 'file is a file; choose a folder'),
  ],
)
def test_adapters_alone_have_no_other_settings(trained, tmp_path, capsys, flags, message):
  (tmp_path / 'file').write_text('mine')
  export = ['export', f'--generator={trained[0]}', '--no-merge', *flags]
  assert main.main([*export, f'--output_dir={tmp_path / "file"}']) == 2
  assert message in capsys.readouterr().err
  assert (tmp_path / 'file').read_text() == 'mine'


def test_kernels_that_overflow_are_named(base, trained, tmp_path, capsys):
  folder, trainer, state = trained
  export = ['export', f'--generator={folder}', f'--output_dir={tmp_path}', '--no-merge']
  assert main.main(export) == 0
  file = tmp_path / 'generator_lora.safetensors'
  with pytest.raises(UserError, match='the kernel is not finite in float32; give a smaller factor'):
    text_to_image.load(base, lora=f'{file}:1e42')
  # Finite in float32, but not in float16.
  wide = jax.tree.map(lambda leaf: 0 * leaf + 300.0, state.params)
  run = checkpoint_manager.Checkpoints(tmp_path / 'run')
  inputs = inputs_lib.Inputs(trainer.objective, {}, False)
  state = dataclasses.replace(state, params=wide)
  run.save(3, state, inputs.state(), run_checkpoints.describe(trainer.objective))
  run.close()
  export = ['export', f'--base={base}', f'--generator={tmp_path / "run"}']
  export += [f'--output_dir={tmp_path / "merged"}', '--dtype=float16']
  assert main.main(export) == 2
  assert 'float16' in capsys.readouterr().err and not (tmp_path / 'merged').exists()


def test_the_adapters_of_another_base_are_refused(base, trained, tmp_path, capsys):
  other = _save(tmp_path, GENERATOR, seed=7)
  folder, trainer, _ = trained
  place = run_checkpoints.read_place(run_checkpoints.latest_checkpoint(folder))
  assert place['base'] == trainer.objective.base_fingerprint
  objective = _objective(other)
  inputs = inputs_lib.Inputs(objective, {}, False)
  with pytest.raises(UserError, match='made with the base .*set LoraObjective.base to the one'):
    inputs.check('the run', place, 'or train in another --model_dir')
  # The base that the run had has changed, and --base is another one, too.
  moved = tmp_path / 'moved'
  _saved_run(other, moved)
  (other / 'generator.safetensors').write_bytes((base / 'generator.safetensors').read_bytes())
  export = ['export', f'--base={base}', f'--generator={moved}', f'--output_dir={tmp_path / "new"}']
  assert main.main(export) == 2
  assert 'by now; give --base, the model folder whose generator has' in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_a_run_of_adapters_is_not_taken_for_a_network(base, trained, tmp_path):
  folder = trained[0]
  taken = generator_objective.GeneratorObjective(GENERATOR, text_encoder=str(folder))
  trainer = _trainer(taken)
  with pytest.raises(UserError, match='has adapters of a network'):
    taken.initial_parts(trainer.abstract.params, inputs_lib.Inputs(taken, {}, False))
  checkpoint = run_checkpoints.latest_checkpoint(folder)
  saved = run_checkpoints.read_model(checkpoint)
  for objective, message in (
    (generator_objective.GeneratorObjective(GENERATOR), 'a checkpoint of adapters'),
    (_objective(base, rank=4), 'LoraObjective.rank is 3 there and 4 here'),
    (_objective(base, alpha=1.0), 'LoraObjective.alpha is 6.0 there and 1.0 here'),
    (_objective(base, targets=('mlp',)), 'LoraObjective.targets is'),
  ):
    with pytest.raises(UserError, match=message):
      run_checkpoints.check_same_model('run', saved, run_checkpoints.describe(objective))
  run_checkpoints.check_same_model('run', saved, run_checkpoints.describe(_objective(base)))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'targets': ('attention/nothing',)}, "'attention/nothing' chooses no projection; choose from"),
    ({'targets': ()}, 'has no pattern'),
    ({'targets': ('',)}, 'chooses no projection'),
    ({'rank': -1}, 'LoraObjective.rank'),
    ({'alpha': float('nan')}, 'LoraObjective.alpha'),
    ({'alpha': 0}, 'LoraObjective.alpha=0 multiplies the adapters by 0'),
    ({'base': ''}, 'LoraObjective.base is empty'),
    ({'objective': None}, 'must be an objective'),
  ],
)
def test_bad_settings_are_refused(base, change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(_objective(base), **change)


def test_objectives_that_adapters_cannot_follow_are_refused(base):
  generator = generator_objective.GeneratorObjective(GENERATOR)
  tokenizer = tokenizer_objective.TokenizerObjective(TOKENIZER)
  for objective, message in (
    (dataclasses.replace(generator, ema=0.9), 'GeneratorObjective.ema'),
    (dataclasses.replace(generator, text_encoder='run'), 'GeneratorObjective.text_encoder'),
    (dataclasses.replace(tokenizer, revive_every=5), 'TokenizerObjective.revive_every=5'),
    (dataclasses.replace(tokenizer, first_phase='run'), 'TokenizerObjective.first_phase'),
  ):
    with pytest.raises(UserError, match=message):
      lora_objective.LoraObjective(objective, str(base))
  other = dataclasses.replace(GENERATOR, mlp_width=8)
  objective = lora_objective.LoraObjective(generator_objective.GeneratorObjective(other), str(base))
  with pytest.raises(UserError, match='mlp_width is 32 there and 8 here'):
    objective.constants()
  trainer = _trainer(_objective(base))
  inputs = inputs_lib.Inputs(trainer.objective, {}, False)
  with pytest.raises(UserError, match='adapters start from LoraObjective.base'):
    train_loop.initial_parts(trainer, 'nowhere', inputs, str(base))


def test_frozen_parts_get_no_adapters(base):
  frozen = generator_objective.GeneratorObjective(GENERATOR, frozen=('text_encoder',))
  objective = dataclasses.replace(_objective(base), objective=frozen)
  adapters = objective.init(jax.random.key(0))['adapters']
  assert list(adapters) == ['image_decoder']


@pytest.mark.parametrize(
  'sizes',
  [
    pytest.param((8, 1, 1, 1), marks=pytest.mark.slow),
    pytest.param((2, 2, 2, 1), marks=pytest.mark.slow),
    (1, 2, 2, 2),
  ],
)
def test_a_mesh_of_eight_devices_gives_the_same(base, sizes):
  # Gradient descent with steps so large that the result shows the gradients at their own scale.
  objective = _objective(base)
  alone, losses = _stepped(_trainer(objective, optimizer=optax.sgd(0.3)))
  trainer = _trainer(objective, *sizes, optimizer=optax.sgd(0.3))
  there, losses_there = _stepped(trainer)
  np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
  near = lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
  jax.tree.map(near, jax.device_get(alone.params), jax.device_get(there.params))
  kernel = trainer.constants['image_decoder']['decoder']['layers']['mlp']['project_in']['kernel']
  ways = np.prod(sizes[1:])
  assert kernel.addressable_shards[0].data.size * ways == kernel.size
  text = trainer.lower(8).as_text()  # Plans lower the step without the base's file.
  assert 'stablehlo' in text or 'module' in text


def test_microbatches_give_the_same(base):
  whole, losses = _stepped(_trainer(_objective(base), optimizer=optax.sgd(0.3)))
  parts, in_parts = _stepped(_trainer(_objective(base), optimizer=optax.sgd(0.3), microbatches=4))
  np.testing.assert_allclose(in_parts, losses, rtol=1e-5)
  near = lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
  jax.tree.map(near, jax.device_get(whole.params), jax.device_get(parts.params))


def _images(step):
  draw = np.random.default_rng(step)
  return draw.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)


RANKER = dataclasses.replace(tiny_configs.RANKER, text_vocabulary=16)


@pytest.mark.parametrize(
  'network, objective, targets',
  [
    ('tokenizer', tokenizer_objective.TokenizerObjective(TOKENIZER), lora.TARGETS),
    (
      'tokenizer',
      tokenizer_objective.TokenizerObjective(tiny_configs.VQGAN, logit_laplace_weight=0.0),
      ('decoder/*/conv_*',),
    ),
    ('ranker', ranker_objective.RankerObjective(RANKER), lora.TARGETS),
  ],
)
def test_other_networks_are_adapted(tmp_path, network, objective, targets):
  part = model_folder.Part(objective.model, _random(network, objective.model, 0))
  folder = model_folder.save_part(tmp_path / 'part', network, part, {})
  adapted = lora_objective.LoraObjective(objective, str(folder), targets=targets)
  trainer = _trainer(adapted)
  state = trainer.create_state()
  batch = {'images': _images(0)}
  if network == 'ranker':
    batch['encoder_input_tokens'] = _batch()['encoder_input_tokens'] % 16
  first = trainer.evaluate(state.params, [batch])
  for _ in range(4):
    state, metrics = trainer.step(state, trainer.put(batch))
  assert np.isfinite(metrics['loss']) and trainer.evaluate(state.params, [batch]) != first
  assert list(state.params) == ['adapters']
  # What is exported is the network with the adapters.
  found = adapters_lib.Adapters(
    network, adapted.settings, jax.device_get(state.params['adapters']), adapted.base_fingerprint
  )
  merged = adapters_lib.merged(model_folder.load_part(network, folder), found)
  effective = jax.device_get(adapted.effective(state.params | trainer.constants))
  near = lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-6)
  jax.tree.map(near, merged.params, effective)


def test_a_discriminator_is_trained_as_a_whole(tmp_path):
  judge = discriminator.DiscriminatorConfig(channels=32, max_channels=4, minibatch_group=1)
  objective = tokenizer_objective.TokenizerObjective(
    TOKENIZER,
    adversarial_weight=0.1,
    adversarial_from=0,
    discriminator=judge,
    discriminator_optimizer=optimizers.adamw(1e-3),
  )
  part = model_folder.Part(TOKENIZER, _random('tokenizer', TOKENIZER, 0))
  folder = model_folder.save_part(tmp_path / 'part', 'tokenizer', part, {})
  trainer = _trainer(lora_objective.LoraObjective(objective, str(folder)))
  state = trainer.create_state()
  assert set(state.params) == {'adapters', 'discriminator'}
  before = jax.device_get(state.params['discriminator'])
  state, _ = trainer.step(state, trainer.put({'images': _images(0)}))
  moved = jax.tree.map(
    lambda a, b: np.any(a != b), before, jax.device_get(state.params['discriminator'])
  )
  assert any(jax.tree.leaves(moved))


def _gin(tokens_folder, base, *more):
  gin_config.parse(
    ['gin_configs/runs/tiny_generator.gin'],
    [
      f"token_cache.path = '{tokens_folder}'",
      f"vocabulary.path = '{base / 'vocabulary.model'}'",
      'train.objective = @LoraObjective()',
      'LoraObjective.objective = @GeneratorObjective()',
      f"LoraObjective.base = '{base}'",
      'LoraObjective.rank = 2',
      "LoraObjective.targets = ('mlp', 'attention/query')",
      'PartiConfig.text_vocabulary = 40',
      'PartiConfig.width = 16',
      'PartiConfig.text_length = 8',
      'train.checkpoint_every = 2',
      'train.writers = []',
      *more,
    ],
  )


def test_resumed_equals_uninterrupted_bit_for_bit(tokens_folder, tmp_path):
  config = dataclasses.replace(
    GENERATOR, width=16, mlp_width=64, text_length=8, codebook_size=64, grid=(4, 4), dropout=0.1
  )
  path = tmp_path / 'vocabulary.model'
  vocabulary.train_vocabulary(CAPTIONS, 20, str(path))
  part = model_folder.Part(config, _random('generator', config, 0))
  base = model_folder.save_part(tmp_path / 'base', 'generator', part, {}, dtype='float16')
  (base / 'vocabulary.model').write_bytes(path.read_bytes())
  # The folder has the network alone; a model's vocabulary would be in it by another way.
  (tmp_path / 'alone').mkdir()
  for name in ('config.json', 'generator.safetensors'):
    (tmp_path / 'alone' / name).write_bytes((base / name).read_bytes())
  alone = f"LoraObjective.base = '{tmp_path / 'alone'}'"
  _gin(tokens_folder, base, alone, 'train.steps = 4')
  train_loop.train(str(tmp_path / 'whole'))
  for steps in (2, 4):
    _gin(tokens_folder, base, alone, f'train.steps = {steps}')
    train_loop.train(str(tmp_path / 'parts'))
  arrays = []
  for name in ('whole', 'parts'):
    checkpoint = run_checkpoints.latest_checkpoint(tmp_path / name)
    assert checkpoint.name == '4'
    described = run_checkpoints.read_model(checkpoint)
    assert described['lora']['rank'] == 2
    abstract = {
      name.removeprefix('params/'): jax.ShapeDtypeStruct(
        shape, 'float32', sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
      )
      for name, shape in run_checkpoints.saved_shapes(checkpoint).items()
      if name.startswith('params/')
    }
    tree = flax.traverse_util.unflatten_dict(abstract, sep='/')
    arrays.append(run_checkpoints.read_parts(checkpoint, tree))
  jax.tree.map(np.testing.assert_array_equal, *arrays)
  # Another base is refused before the first step.
  other = model_folder.Part(config, _random('generator', config, 5))
  changed = model_folder.save_part(tmp_path / 'changed', 'generator', other, {})
  _gin(tokens_folder, base, f"LoraObjective.base = '{changed}'", 'train.steps = 6')
  with pytest.raises(UserError, match='set LoraObjective.base to the one that its adapters'):
    train_loop.train(str(tmp_path / 'parts'))


def test_the_fingerprint_is_of_values_not_of_how_they_are_stored(base, tmp_path):
  part = model_folder.load_part('generator', base)
  values = jax.tree.map(lambda leaf: np.asarray(leaf).astype('f2').astype('f4'), dict(part.params))
  half = model_folder.save_part(
    tmp_path / 'half', 'generator', part._replace(params=values), {}, dtype='float16'
  )
  read = model_folder.load_part('generator', half).params
  assert fingerprints.of_parameters(read) == fingerprints.of_parameters(values)
  assert fingerprints.of_parameters(values) != fingerprints.of_parameters(part.params)
  config = json.loads((half / 'config.json').read_text())
  assert config['parameters']['stored_as'] == 'float16'


def test_kinds_of_networks_from_elsewhere_have_the_projections_of_the_default():
  for kinds, network in ((generators.KINDS, 'generator'), (image_tokenizers.KINDS, 'tokenizer')):
    for kind in kinds.configs.values():
      known = adapters_lib.projections(network, kind())
      assert lora.select(known, lora.TARGETS), kind
