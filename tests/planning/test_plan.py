"""Tests `parti-jax plan`: its JSON, text and exit status; search, table and remedies."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from parti_jax.cli import main
from parti_jax.cli import plan as plan_command
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.partitioning import compiler_options
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib
from parti_jax.planning import candidates
from parti_jax.planning import chips
from parti_jax.planning import least_network
from parti_jax.planning import plan as plan_lib
from parti_jax.planning import remedies
from parti_jax.planning import report
from parti_jax.planning import request as request_lib
from parti_jax.planning import search
from parti_jax.planning import steps
from parti_jax.planning import topology as topology_lib
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters

RUN = 'gin_configs/runs/parti_350m.gin'
SMALL = tuple(
  f'PartiConfig.{name}={value}'
  for name, value in {
    'width': 64,
    'heads': 4,
    'mlp_width': 128,
    'encoder_layers': 2,
    'decoder_layers': 2,
    'grid': (4, 4),
    'text_length': 8,
    'text_vocabulary': 64,
    'codebook_size': 32,
    'remat': "'dots'",
  }.items()
)
# All entries of a plan; readers may rely on them.
ENTRIES = {
  'schema',
  'what',
  'topology',
  'gin_files',
  'gin_bindings',
  'versions',
  'chip',
  'chips',
  'devices',
  'mesh',
  'batch_size',
  'settings',
  'parameters',
  'memory',
  'exhausted',
  'flops',
  'bytes',
  'collectives',
  'least_sent',
  'kernels',
  'traffic',
  'seconds',
  'mfu',
  'notes',
  'network_model',
  'fits',
  'compile_seconds',
  'compile_cpu_seconds',
  'compile_peak_bytes',
  'remedies',
}


def flags(*others, bindings=()):
  return [
    'plan',
    f'--gin_file={RUN}',
    *(f'--gin.{value}' for value in (*SMALL, *bindings)),
    *others,
  ]


@pytest.fixture(name='trained', scope='module')
def _trained(tmp_path_factory):
  """Returns status, text and JSON of a training step on 8 emulated devices."""
  file = tmp_path_factory.mktemp('plans') / 'plan.json'
  with pytest.MonkeyPatch.context() as patch:
    said = []
    patch.setattr('builtins.print', lambda *args, **_: said.append(args[0]))
    status = main.main(
      flags(
        '--topology=cpu:8',
        '--batch_size=32',
        f'--json={file}',
        bindings=(
          'make_mesh.data=2',
          'make_mesh.fsdp=2',
          'make_mesh.tensor=2',
          'train.microbatches=2',
          "folder.path='nowhere'",
          "token_cache.path='nowhere'",
        ),
      )
    )
  return status, said[-1], json.loads(file.read_text())


def test_the_training_step(trained):
  status, text, plan = trained
  assert status == 0 and set(plan) == ENTRIES and plan['schema'] == plan_lib.SCHEMA
  assert plan['mesh'] == {'stage': 1, 'data': 2, 'fsdp': 2, 'tensor': 2}
  assert plan['settings']['microbatches'] == 2 and plan['batch_size'] == 32
  # Forward, backward, and the attention scores that `dots` recomputes.
  assert 1.0 < plan['flops']['ratio'] < 1.2
  found = {(entry['kind'], tuple(entry['axes'])) for entry in plan['collectives']}
  assert {
    ('all-gather', ('fsdp',)),
    ('all-reduce', ('tensor',)),
    ('all-reduce', ('data',)),
  } <= found
  memory = plan['memory']
  assert memory['total'] > memory['arguments'] > 10 * plan['parameters'] / 4
  assert '173,888 parameters, on cpu:8: 8 chips, 8 devices' in text and 'no roofline' in text
  assert re.search(r'total +\d+\.\d\d MiB', text)


def test_the_least_that_the_network_carries():
  mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
  place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  array = lambda shape, *axes: jax.ShapeDtypeStruct(shape, 'float32', sharding=place(*axes))
  least = lambda tree, microbatches: least_network.of_parameters(
    tree, mesh, rules_lib.LOGICAL_AXIS_RULES, 'bfloat16', microbatches
  )
  # A device holds 2 × 4 of 4 × 8 values, 16 bytes; the other half of its columns is one device away.
  assert least(array((4, 8), 'fsdp', 'tensor'), 3) == {
    'parameters': 2 * 3 * 16,
    'gradients': 3 * 16 + 2 * 16 / 2,
  }
  # Whole on each device: the gradients of all four parts of the batch are added up once.
  assert least([array((8,))], 3) == {'parameters': 0.0, 'gradients': 2 * 16 * 3 / 4}


def test_the_report_compares_what_is_sent_with_the_least(trained):
  _, text, plan = trained
  total, sent = sum(plan['least_sent'].values()), 0
  for entry in plan['collectives']:
    sent += entry['bytes_sent']
  assert 0 < total < sent
  assert f'{sent / total:.3f} times as much is sent' in text
  del plan['least_sent']
  assert 'at least needed' not in report.text(plan)


def test_the_plan_is_of_the_state_and_batch_of_training(trained):
  _, _, plan = trained
  request = request_lib.Request('train', 'cpu:8', (RUN,), tuple(plan['gin_bindings']), 32)
  gin_config.parse(request.gin_files, request.gin_bindings, data=False)
  config = steps.train_config()
  from parti_jax.training import trainer as trainer_lib

  assert config.microbatches == 2
  trainer = trainer_lib.Trainer.of_config(config, mesh_lib.make_mesh(devices=jax.devices()[:8]))
  state = steps.device_parts(trainer.abstract)
  batch = (8 * 4 + 16 * 4 + 16 * 4) * 32 / 4  # Tokens and weights; four ways of data.
  assert plan['memory']['arguments'] == pytest.approx(state + batch, rel=0.01)


@pytest.mark.parametrize(
  'run, bindings',
  [
    (
      'demo_ranker',
      (
        'CoCaConfig.image_layers=1',
        'CoCaConfig.width=32',
        'CoCaConfig.heads=2',
        'CoCaConfig.mlp_width=32',
        "RankerObjective.tokenizer='nowhere'",
      ),
    ),
    (
      'demo_super_resolution',
      (
        'SuperResolutionConfig.blocks=1',
        'SuperResolutionConfig.width=16',
        "SuperResolutionObjective.tokenizer='nowhere'",
        'SuperResolutionObjective.perceptual_weight=0.1',
      ),
    ),
  ],
)
def test_the_tokenizer_of_a_step_need_not_be_trained(run, bindings):
  small = ('ViTVQGANConfig.encoder_layers=1', 'ViTVQGANConfig.decoder_layers=1')
  plan = plan_lib.make(
    request_lib.Request(
      'train', 'cpu:2', (f'gin_configs/runs/{run}.gin',), (*small, *bindings, 'make_mesh.data=2'), 8
    )
  )
  assert plan['fits'] and plan['flops']['compiled'] > 0
  assert (
    'nowhere holds no trained tokenizer yet; its sizes are those of ViTVQGANConfig in gin'
    in plan['notes']
  )


def test_the_sampling_step(capsys):
  assert (
    main.main(
      flags('--topology=cpu:4', '--what=sample', '--batch_size=8', bindings=('make_mesh.tensor=2',))
    )
    == 0
  )
  text = capsys.readouterr().out
  assert '8 images' in text and 'guided True, cache_length 16' in text
  assert 'tensor' in text and 'at least needed' in text


@pytest.mark.parametrize(
  'weights, expected',
  [
    # The kernels of two layers and of the logits, of which each device has half, and the norms.
    ('float', (2 * 40_960 * 2 + 2_048 * 4) / 2 + 2 * 3 * 64 * 4),
    # Scales too: of each layer 384 for channels that are halved, and 192 that are not.
    ('int8', (2 * 40_960 + 2_048) / 2 + 2 * 3 * 64 * 4 + (2 * (384 / 2 + 192) + 32 / 2) * 4),
  ],
)
def test_a_sampling_step_reads_a_byte_for_each_int8_weight(weights, expected):
  bindings = (*SMALL, 'make_mesh.data=2', 'make_mesh.fsdp=1', 'make_mesh.tensor=2')
  gin_config.parse((RUN,), bindings, data=False)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:4])
  request = request_lib.Request('sample', 'cpu:4', (RUN,), bindings, 8, weights=weights)
  step = steps.sampling_step(request, mesh)
  assert step.ideal_bytes['parameters'] == expected
  assert step.settings['weights'] == weights
  assert step.parameters == layers.count_parameters(
    model_folder.abstract('generator', steps.sampled_config())
  )


@pytest.mark.parametrize('cache, bytes_of_vector', [('float', 2 * 16), ('int8', 16 + 4)])
def test_a_sampling_step_reads_a_byte_for_each_number_of_an_int8_cache(cache, bytes_of_vector):
  bindings = (*SMALL, 'make_mesh.data=2', 'make_mesh.fsdp=1', 'make_mesh.tensor=2')
  gin_config.parse((RUN,), bindings, data=False)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:4])
  request = request_lib.Request('sample', 'cpu:4', (RUN,), bindings, 8, cache=cache)
  step, config = steps.sampling_step(request, mesh), steps.sampled_config()
  assert config.width // config.heads == 16
  read = sum(pattern.read(0, pattern.num_slots(16))[1] for pattern in config.patterns)
  read *= config.decoder_layers // len(config.patterns)
  read += config.decoder_layers * config.text_length
  # Keys and values of 16 sequences and all heads, of which each device has a quarter.
  assert step.ideal_bytes['cache'] == 2 * read * 16 * config.heads * bytes_of_vector / 4
  assert step.settings['cache'] == cache
  assert len(jax.tree.leaves(step.lower().out_info)) == 1 + (2 if cache == 'float' else 4) * 2


@pytest.mark.tpu_compile
def test_a_step_on_a_tpu(tpu_devices, capfd, tmp_path):
  del tpu_devices
  file = tmp_path / 'plan.json'
  assert (
    main.main(
      flags(
        '--topology=v5e:2x2',
        '--batch_size=16',
        f'--json={file}',
        bindings=('make_mesh.tensor=2', 'PartiConfig.grid=(16,16)', 'PartiConfig.width=256'),
      )
    )
    == 0
  )
  said = capfd.readouterr()
  assert said.err == 'compiling for v5e:2x2; this takes minutes for a large model\n'
  plan = json.loads(file.read_text())
  assert set(plan) == ENTRIES and plan['fits']
  assert plan['chip']['kind'] == 'v5e' and plan['memory']['capacity'] == 15.75 * 2**30
  # The attention kernel, forward and backward.
  assert set(plan['kernels']) == {'attention_forward', 'attention_backward'}
  assert plan['flops']['kernels'] > 0 and 0 < plan['mfu']['bound'] < 1
  assert plan['mfu']['without_overlap'] < plan['mfu']['bound']
  for words in ('it fits', 'MFU at most', chips.CHIPS['v5e'].source):
    assert words in said.out


def _plan(topology, *bindings):
  sizes = (*SMALL, 'train.microbatches=1', *bindings)
  return plan_lib.make(request_lib.Request('train', topology, (RUN,), sizes, 16))


@pytest.mark.tpu_compile
def test_several_slices(tpu_devices):
  del tpu_devices
  plan = _plan('2xv5e:1x2', 'make_mesh.data=2', 'make_mesh.fsdp=2')
  between = [entry for entry in plan['collectives'] if entry['dcn']]
  assert {tuple(entry['axes']) for entry in between} == {('data',)}
  # Gradients of 2 bytes or 4, of half the parameters on each device, go to the other slice.
  sent = sum(entry['bytes_sent'] for entry in between)
  assert plan['parameters'] < sent < 4 * plan['parameters'] and not plan['notes']


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_two_devices_on_a_chip(tpu_devices):
  del tpu_devices
  plan = _plan('tpu7x:1x2x1', 'make_mesh.fsdp=2', 'make_mesh.tensor=2')
  assert plan['devices'] == 4 and plan['chips'] == 2 and plan['collectives']
  assert plan['memory']['capacity'] == 94.75 * 2**30


@pytest.mark.parametrize(
  'weights, cache_dtype', [('float', 'float'), ('int8', 'float'), ('int8', 'int8')]
)
@pytest.mark.tpu_compile
def test_a_sampling_step_on_a_tpu_moves_parameters_and_cache_once(
  tpu_devices, weights, cache_dtype
):
  del tpu_devices
  sizes = (
    'PartiConfig.width=1024',
    'PartiConfig.mlp_width=4096',
    'PartiConfig.heads=16',
    'PartiConfig.grid=(32,32)',
    "PartiConfig.attention_patterns=('global',)",
    'make_mesh.tensor=4',
    'make_mesh.fsdp=1',
  )
  request = request_lib.Request(
    'sample', 'v5e:2x2', (RUN,), SMALL + sizes, 64, weights=weights, cache=cache_dtype
  )
  plan = plan_lib.make(request)
  # Heads of 64 are not padded to 128, neither in memory nor on their way.
  bytes_of_vector = 2 * 64 if cache_dtype == 'float' else 64 + 4
  cache = 2 * 2 * 128 * 16 * 1024 * bytes_of_vector / 4
  assert plan['bytes']['ideal']['cache'] == pytest.approx(cache, rel=0.01)
  assert plan['memory']['outputs'] == pytest.approx(cache, rel=0.01)
  assert plan['memory']['aliased'] == pytest.approx(cache, rel=0.01)
  # In addition, writing a position takes a tile of 128; with padded heads it would be over 2.
  # Half of the int8 caches also pass through the chip's own memory and back. All of them would, with
  # a ratio of 1.95, if the step read them after it writes.
  assert 0.9 < plan['bytes']['ratio'] < (1.5 if cache_dtype == 'float' else 1.7)


@pytest.mark.tpu_compile
def test_the_loop_over_positions_keeps_int8_weights(tpu_devices):
  del tpu_devices
  sizes = {'width': 1024, 'mlp_width': 4096, 'heads': 16, 'codebook_size': 1024, 'grid': (8, 8)}
  config = parti_config.PartiConfig(
    encoder_layers=1, decoder_layers=2, text_length=16, text_vocabulary=64, **sizes
  )
  mesh = mesh_lib.make_mesh(
    data=1, fsdp=1, tensor=4, devices=topology_lib.parse('v5e:2x2').devices()
  )
  rules = rules_lib.logical_axis_rules()
  boxed = model_folder.abstract('generator', config)
  params = steps._abstract_parameters(config, boxed, mesh, rules, 'int8')
  texts = steps._placed((16, 16), jnp.int32, ('activation_batch',), mesh, rules)

  def draw(params, texts):
    keys = decoding.image_keys(0, jnp.arange(16))
    return decoding.sample_tokens(config, params, texts, keys, decoding.Sampling(greedy=True))

  with rules_lib.partitioned(mesh, rules):
    compiled = jax.jit(draw).lower(params, texts).compile()
  weights = 2 * (6 * 1024 * 1024 + 2 * 1024 * 4096) / 4
  # A copy of them in bfloat16 would take twice as many bytes.
  assert compiled.memory_analysis().temp_size_in_bytes < weights


@pytest.mark.tpu_compile
def test_a_step_that_is_too_large(tpu_devices, capsys):
  del tpu_devices
  assert (
    main.main(
      [
        'plan',
        f'--gin_file={RUN}',
        '--topology=v5e:2x2',
        '--what=sample',
        '--batch_size=10000',
        '--gin.make_mesh.data=2',
        '--gin.make_mesh.tensor=2',
        '--gin.PartiConfig.decoder_layers=1',
        '--gin.PartiConfig.encoder_layers=1',
        "--gin.PartiConfig.attention_patterns=('global',)",
      ]
    )
    == 1
  )
  text = capsys.readouterr().out
  assert re.search(r'it does not fit by +\d+\.\d\d [GM]iB a device', text)
  assert '--batch_size=5000: half the cache' in text
  assert '--gin.make_mesh.data=1 --gin.make_mesh.tensor=4' in text


@pytest.mark.parametrize(
  'message, needed, available',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(112.92G) exceeds available HBM (30.75G).',
      112.92 * 2**30,
      30.75 * 2**30,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. '
      'Exceeded hbm capacity by 1.75G.\n\nTotal hbm usage',
      17.5 * 2**30,
      15.75 * 2**30,
    ),
    ('RESOURCE_EXHAUSTED: something new', None, 7.0),
  ],
)
def test_xlas_messages_about_too_little_memory(message, needed, available):
  found = plan_lib.exhausted(message, 7.0)
  assert (found['needed'], found['available']) == (needed, available)
  assert '\n' not in found['message']


def test_remedies_of_a_training_step(trained):
  plan = dict(trained[2], fits=False, batch_size=8192)
  lines = remedies.of(plan)
  assert lines[0].startswith('--gin.PartiConfig.remat="\'block_inputs_and_attention\'"')
  assert any(line.startswith('--gin.train.microbatches=4:') for line in lines)
  assert any(line.startswith('--gin.make_mesh.data=1 --gin.make_mesh.fsdp=4:') for line in lines)
  assert any('offload_optimizer=True' in line for line in lines)
  text = report.text(
    plan | {'exhausted': {'needed': 40 * 2**30, 'available': 32 * 2**30, 'message': 'Used 40G'}}
  )
  assert 'it does not fit by 8.00 GiB a device: XLA says: Used 40G' in text


@pytest.mark.parametrize('name', ['weights', 'cache'])
@pytest.mark.parametrize('value', ['float', 'int8'])
def test_remedies_of_a_sampling_step(name, value):
  mesh = {'stage': 1, 'data': 2, 'fsdp': 1, 'tensor': 2}
  settings = {'weights': 'int8', 'cache': 'int8', name: value}
  plan = {'what': 'sample', 'mesh': mesh, 'batch_size': 64, 'settings': settings}
  found = remedies.of(plan)
  assert any(f'--{name}=int8: ' in line for line in found) == (value == 'float')
  assert sum('=int8' in line for line in found) == (value == 'float')


def test_a_table_of_plans(trained, tmp_path, capsys):
  file = tmp_path / 'a.json'
  large = dict(trained[2], fits=False, topology='cpu:9')
  file.write_text(json.dumps(large))
  other = tmp_path / 'b.json'
  other.write_text(json.dumps(trained[2]))
  assert main.main(['plan', '--table', str(file), str(other)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4 and len({line.count('|') for line in lines}) == 1
  assert lines[2].startswith('| train 350m | cpu:9 |') and 'too large' in lines[2]
  assert 'data 2 × fsdp 2 × tensor 2' in lines[3] and 'too large' not in lines[3]


@pytest.mark.parametrize('text', ['{', '[]', '{"schema": 0}'])
def test_a_file_that_is_not_a_plan(text, tmp_path):
  file = tmp_path / 'a.json'
  file.write_text(text)
  with pytest.raises(UserError, match=r'a\.json: not a plan'):
    plan_command.read(str(file))


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['plan'], '--topology is required'),
    (['plan', '--topology=cpu:8'], 'give the gin file of a run'),
    (flags('--topology=cpu:8', '--batch_size=0'), '--batch_size=0 must be at least 1'),
    (flags('--topology=cpu:8', '--batch_size=9'), 'train.batch_size=9 is not divisible'),
    (flags('--topology=cpu:8', '--what=sample', '--batch_size=9'), '--batch_size=9 images'),
    (flags('--topology=cpu:8', '--weights=int8'), '--weights=int8 only applies to --what=sample'),
    (flags('--topology=cpu:8', '--cache=int8'), '--cache=int8 only applies to --what=sample'),
    (flags('--topology=cpu:8', bindings=('PartiConfig.widht=3',)), 'did you mean'),
    (flags('--topology=cpu:8', bindings=('make_mesh.tensor=3',)), 'make_mesh.tensor=3'),
  ],
)
def test_bad_input(arguments, message, capsys):
  assert main.main(arguments) == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith('parti-jax: error: ') and message in said


def test_candidates_fit_the_models_shapes():
  model = parti_config.PartiConfig(
    heads=4, width=64, mlp_width=128, encoder_layers=4, decoder_layers=4
  )
  found = candidates.of_training(model, 10**6, 64, chips.CHIPS['v4'], 64)
  assert found == sorted(found, key=lambda candidate: candidate.seconds)
  meshes = [dict(candidate.mesh) for candidate in found]
  assert {mesh['tensor'] for mesh in meshes} == {1, 2, 4}
  assert {mesh['stage'] for mesh in meshes} == {1, 2, 4}
  for candidate, mesh in zip(found, meshes):
    ways = mesh['stage'] * mesh['data'] * mesh['fsdp']
    assert ways * mesh['tensor'] == 64 and 64 % (ways * candidate.microbatches) == 0
  assert f"PartiConfig.remat = '{found[0].remat}'" in found[0].bindings()
  # Sampling has no stages; data parallelism spans two slices.
  sampled, smaller = (
    candidates.of_sampling(model, 128, 64, chips.CHIPS['v5e'], 16, size) for size in (2, 1)
  )
  assert {dict(candidate.mesh)['stage'] for candidate in sampled} == {1}
  assert smaller[0].seconds < sampled[0].seconds
  assert all(mesh['data'] % 2 == 0 for mesh in candidates.meshes(model, 64, 2, stages=True))


def test_candidates_split_the_heads_of_keys():
  model = parti_config.PartiConfig(heads=8, width=64, mlp_width=128)
  fewer = dataclasses.replace(model, kv_heads=2)
  sampled = [
    candidates.of_sampling(sizes, 128, 64, chips.CHIPS['v5e'], 16) for sizes in (model, fewer)
  ]
  tensor = [{dict(candidate.mesh)['tensor'] for candidate in found} for found in sampled]
  assert max(tensor[0]) == 8 and tensor[1] == {1, 2}
  bytes_of = [
    next(found.bytes for found in each if dict(found.mesh)['data'] == 16) for each in sampled
  ]
  # A quarter of the cache, which is twelve layers' of 1,024 + 128 tokens, and fewer weights.
  cache = 2 * 2 * 128 * 12 * 64 * 1152 / 16
  weights = 2 * 12 * 2 * 64 * (64 - 16)
  assert bytes_of[0] - bytes_of[1] == pytest.approx(0.75 * cache + weights)


def test_a_planned_cache_has_the_heads_of_keys():
  config = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    heads=8,
    width=64,
    mlp_width=64,
    kv_heads=2,
    text_vocabulary=16,
    text_length=4,
    codebook_size=16,
    grid=(2, 5),
  )
  init = lambda key: parti.Parti(config).init(key, *parti.example_inputs(config))['params']
  params = jax.eval_shape(
    lambda key: parameters.for_sampling(config, nn.meta.unbox(init(key))), jax.random.key(0)
  )
  place = lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype)
  of_cache = lambda cache: steps._abstract_state(config, params, 6, cache, place).caches[0][0]
  assert of_cache('float').shape == (6, 2, 10, 8)
  assert of_cache('int8').scale.shape == (6, 2, 10)


def test_a_mesh_that_is_far_too_small_is_not_a_candidate():
  model = parti_config.PartiConfig(
    heads=64, width=4096, mlp_width=16384, encoder_layers=16, decoder_layers=64
  )
  found = candidates.of_training(model, 20 * 10**9, 256, chips.CHIPS['v5e'], 8)
  assert not found  # 200 GB of parameters, gradients and moments, in 128 GB.
  found = candidates.of_training(model, 20 * 10**9, 8192, chips.CHIPS['v4'], 512)
  assert found and all(
    dict(candidate.mesh)['fsdp'] * dict(candidate.mesh)['tensor'] * dict(candidate.mesh)['stage']
    > 4
    for candidate in found
  )


def test_search_prints_what_fits_and_resumes(trained, tmp_path, capsys, monkeypatch):
  plan, compiled = trained[2], []

  def compile_in_process(request, bindings):
    del request
    compiled.append(bindings)
    if len(compiled) == 1:
      return None, 'exit status -11: no message'
    slow = {'compiled': 1000.0 - len(compiled), 'ratio': 1.0}
    return dict(plan, flops=slow, fits=len(compiled) != 2, topology=f'cpu:{len(compiled)}'), None

  monkeypatch.setattr(search, 'compile_in_process', compile_in_process)
  file = tmp_path / 'search.jsonl'
  arguments = flags('--topology=cpu:8', '--batch_size=32', '--search', f'--json={file}')
  assert main.main([*arguments, '--search_limit=4']) == 0
  said = capsys.readouterr()
  rows = said.out.splitlines()[2:]
  assert [row.split(' | ')[1] for row in rows] == ['cpu:4', 'cpu:3']  # Fastest first.
  assert 'exit status -11' in said.err and 'too large' in said.err
  assert len(file.read_text().splitlines()) == 4 and len(compiled) == 4
  assert main.main([*arguments, '--search_limit=5']) == 0
  assert len(compiled) == 5 and len(file.read_text().splitlines()) == 5
  other = [argument.replace('--batch_size=32', '--batch_size=64') for argument in arguments]
  assert main.main(other) == 2
  assert 'holds a search of another request' in capsys.readouterr().err


def test_search_tries_compiler_options_on_the_best_candidate(trained, capsys, monkeypatch):
  plan, compiled = trained[2], []

  def compile_in_process(request, bindings):
    del request
    compiled.append(bindings)
    # The third of four candidates is the fastest, and faster with XLA's defaults.
    slowness = [4.0, 3.0, 1.0, 2.0, 0.5, 5.0, 6.0][len(compiled) - 1]
    seconds = {'compute': slowness, 'hbm': 0.0, 'interconnect': 0.0, 'bound': 'compute'}
    mfu = {'bound': 0.1, 'without_overlap': 0.1}
    name = f'v4:{len(compiled)}'
    return dict(plan, seconds=seconds, mfu=mfu, topology=name), None

  monkeypatch.setattr(search, 'compile_in_process', compile_in_process)
  arguments = flags('--topology=v4:2x2x1', '--batch_size=32', '--search', '--search_limit=4')
  assert main.main(arguments) == 0
  said = capsys.readouterr()
  rows = [row.split(' | ')[1] for row in said.out.splitlines()[2:]]
  assert rows[:2] == ['v4:5', 'v4:3']
  alternatives = compiler_options.TPU_ALTERNATIVES
  assert compiled[4:] == [
    [*compiled[2], f'compiler_options.tpu = {options!r}'] for options in alternatives.values()
  ]
  for name in alternatives:
    assert f'the best with {name}: ' in said.err


def test_the_modules_that_move_most(capsys):
  bindings = ('compiler_options.cpu={}',)
  assert (
    main.main(flags('--topology=cpu:1', '--batch_size=2', '--traffic=40', bindings=bindings)) == 0
  )
  text = capsys.readouterr().out
  assert "XLA options XLA's defaults" in text
  lines = text[text.index('largest shares') :].split('\n\n')[0].splitlines()[1:]
  assert 20 < len(lines) <= 40 and all('%' in line for line in lines)
  assert any('image_decoder' in line or 'text_encoder' in line for line in lines)


def test_options_that_xla_refuses_end_a_plan_with_one_line(capsys):
  bindings = ("compiler_options.cpu={'xla_nonsense':1}",)
  assert main.main(flags('--topology=cpu:1', '--batch_size=2', bindings=bindings)) == 2
  assert "compiler_options: XLA says: No such compile option: 'xla_nonsense'" in (
    capsys.readouterr().err
  )
  assert main.main(flags('--topology=cpu:1', '--traffic=-1')) == 2
  assert '--traffic=-1 must be at least 0' in capsys.readouterr().err


def test_a_candidate_is_compiled_by_another_process():
  request = request_lib.Request('train', 'cpu:2', (RUN,), SMALL, 8)
  bindings = ['make_mesh.tensor = 2', "PartiConfig.remat = 'dots'"]
  plan, error = search.compile_in_process(request, bindings)
  assert error is None and plan['fits'] and plan['mesh']['tensor'] == 2
  plan, error = search.compile_in_process(request, ['make_mesh.tensor = 3'])
  assert plan is None and error.startswith('exit status 2: parti-jax: error: make_mesh.')
