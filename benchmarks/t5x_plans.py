"""Plans of t5x's training step of Parti on TPU slices, a JSON file each in benchmarks/t5x_plans/.

    python benchmarks/t5x_plans.py            makes those that are missing, one after another
    python benchmarks/t5x_plans.py --list     names them, with the command of each
    python benchmarks/t5x_plans.py 20b_v5p    makes those whose names contain the words given, again
    python benchmarks/t5x_plans.py --topology=v4:8x8x8 --gin_file=gin_configs/t5x/models/20b.gin \\
      --gin_file=gin_configs/t5x/runs/pretrain.gin --gin.BATCH_SIZE=4096   plans that run

t5x reads the gin files, and its partitioner, initial state and trainer make the step, over the
devices of a topology that is not there; the TPU's compiler compiles it, and nothing is computed.
Needs t5x (docs/t5x.md) and the extra `tpu`. A plan takes minutes and up to 6 GiB of memory. The
table of all: parti-jax plan --table benchmarks/t5x_plans/*.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import shlex
import subprocess
import sys
import time
from unittest import mock

FOLDER = pathlib.Path(__file__).parent / 't5x_plans'
_MODELS = 'gin_configs/t5x/models'
_RUN = 'gin_configs/t5x/runs/pretrain.gin'

# The 8192 × 1024 tokens of the batch, in place of the sum of their weights, which are all 1.
_MEAN_OF_ALL = '--gin.LOSS_NORMALIZING_FACTOR=8388608'

# Name -> model, topology, and overrides; the paper's lengths and batch.
PLANS = {
  '350m_v4_64': ('350m', 'v4:4x4x4', []),
  '350m_v4_128': ('350m', 'v4:4x4x8', []),
  '3b_v4_64': ('3b', 'v4:4x4x4', ['--gin.Trainer.num_microbatches=2', _MEAN_OF_ALL]),
  '3b_v4_128': ('3b', 'v4:4x4x8', []),
  '20b_v4_128': ('20b', 'v4:4x4x8', ['--gin.Trainer.num_microbatches=4', _MEAN_OF_ALL]),
  '20b_v4_256': ('20b', 'v4:8x8x4', []),
  '20b_v4_256_microbatches_2': (
    '20b',
    'v4:8x8x4',
    ['--gin.Trainer.num_microbatches=2', _MEAN_OF_ALL],
  ),
  '20b_v4_512': ('20b', 'v4:8x8x8', []),
  '20b_v4_512_partitions_8': ('20b', 'v4:8x8x8', ['--gin.PjitPartitioner.num_partitions=8']),
  '20b_v4_512_partitions_8_activations_2': (
    '20b',
    'v4:8x8x8',
    [
      '--gin.PjitPartitioner.num_partitions=8',
      '--gin.standard_logical_axis_rules.activation_partitioning_dims=2',
    ],
  ),
  '20b_v5p_128': ('20b', 'v5p:4x4x8', []),
}


def train(
  *,
  model,
  train_dataset_cfg,
  partitioner,
  trainer_cls,
  random_seed,
  use_hardware_rng=False,
  **others,
):
  """Takes the place of `t5x.train.train` in the gin files, and what it takes.

  Of the dataset's configuration it looks at the batch's size and the lengths, at `others` not at
  all.

  Returns:
    The model, the trainer, whose state is abstract, and an abstract batch.
  """
  del others
  import jax
  from t5x import utils

  if use_hardware_rng or random_seed is None:
    utils.set_hardware_rng_ops()
  batch_size = partitioner.get_data_layout(train_dataset_cfg.batch_size).batch_size
  converter = model.FEATURE_CONVERTER_CLS()
  lengths = converter.get_model_feature_lengths(train_dataset_cfg.task_feature_lengths)
  batch = {
    name: jax.ShapeDtypeStruct(
      (batch_size, length), converter.MODEL_FEATURES[name].dtype.as_numpy_dtype
    )
    for name, length in lengths.items()
  }
  initializer = utils.TrainStateInitializer(
    model.optimizer_def,
    model.get_initial_variables,
    {name: leaf.shape for name, leaf in batch.items()},
    partitioner,
    {name: leaf.dtype for name, leaf in batch.items()},
  )
  trainer = trainer_cls(
    model=model,
    train_state=initializer.global_train_state_shape,
    partitioner=partitioner,
    eval_names=[],
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.PRNGKey(random_seed or 0),
  )
  return model, trainer, batch


@contextlib.contextmanager
def as_if_there(devices):
  """A context in which t5x, which asks JAX what devices there are, finds these."""
  import jax

  of_first_host = [device for device in devices if device.process_index == 0]
  with (
    mock.patch.object(jax, 'devices', lambda *_: list(devices)),
    mock.patch.object(jax, 'local_devices', lambda *_: of_first_host),
  ):
    yield


def plan(gin_files: list[str], gin_bindings: list[str], topology_name: str) -> dict:
  """The plan of a run of t5x.train, as `parti_jax.planning.plan` makes it of a step of ours."""
  import gin
  import jax

  jax.config.update('jax_platforms', 'cpu')  # Never takes the accelerator of this machine.
  import t5x
  from t5x import gin_utils

  from parti_jax.planning import plan as plan_lib
  from parti_jax.planning import request as request_lib
  from parti_jax.planning import topology as topology_lib
  from parti_jax.training.objectives import (
    generator_objective,  # Before gin locks its configuration.
  )

  topology = topology_lib.parse(topology_name)
  sys.modules['__main__'].train = train  # Where t5x's gin files look for it.
  train_with_gin = gin.configurable(train)
  # What t5x.train requires, although no step depends on it.
  unused = ["MIXTURE_OR_TASK_NAME = 'unused'", "MODEL_DIR = 'unused'"]
  gin_utils.parse_gin_flags(
    ['.', str(pathlib.Path(t5x.__path__[0]).parent)], gin_files, unused + gin_bindings
  )
  with as_if_there(topology.devices()):
    model, trainer, batch = train_with_gin()
    objective = generator_objective.GeneratorObjective(model.module.config)
    step = _step(gin_files, objective, trainer, batch)
    request = request_lib.Request('train', topology_name, (), tuple(gin_bindings))
    made = plan_lib.of_step(request, topology, step)
    return made | {
      'remedies': []
      if made['fits']
      else [
        '--gin.Trainer.num_microbatches=2: half the activations at a time',
        '--topology=...: a larger slice, or chips with more memory',
      ]
    }


def _step(gin_files, objective, trainer, batch):
  """The trainer's step, ready to be lowered."""
  from parti_jax.models.nn import layers
  from parti_jax.planning import request as request_lib

  config, state = objective.model, trainer.train_state
  batch_size = batch['encoder_input_tokens'].shape[0]
  settings = {
    'model': f't5x {pathlib.Path(gin_files[0]).stem}',
    'config': 'PartiConfig',
    'remat': config.remat,
    'microbatches': trainer._num_microbatches or 1,
    'gin_files': gin_files,
  }
  return request_lib.Step(
    lambda: trainer._partitioned_train_step.lower(state, batch),
    trainer._partitioner.mesh,
    batch_size,
    objective.step_flops(batch_size),
    layers.count_parameters(state.params),
    settings,
  )


def _plan_one(gin_files, flags, topology_name, file) -> int:
  """Prints and writes one plan; returns 0 if the step fits, 1 if not."""
  strange = [flag for flag in flags if not flag.startswith('--gin.') or '=' not in flag]
  if strange or not topology_name:
    raise SystemExit(f'not known: {shlex.join(strange)}' if strange else '--topology is needed')
  made = plan(gin_files, [flag.removeprefix('--gin.') for flag in flags], topology_name)
  from parti_jax.planning import report

  print(report.text(made), flush=True)
  if file:
    pathlib.Path(file).write_text(json.dumps(made, indent=2) + '\n', encoding='utf-8')
  return 0 if made['fits'] else 1


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('words', nargs='*')
  parser.add_argument('--list', action='store_true')
  parser.add_argument('--gin_file', action='append')
  parser.add_argument('--topology')
  parser.add_argument('--json')
  args, flags = parser.parse_known_args()
  if args.gin_file:
    return _plan_one(args.gin_file, flags, args.topology, args.json)
  failed = 0
  FOLDER.mkdir(exist_ok=True)
  for name, (model, topology, overrides) in PLANS.items():
    file = FOLDER / f'{name}.json'
    command = [
      f'--topology={topology}',
      f'--gin_file={_MODELS}/{model}.gin',
      f'--gin_file={_RUN}',
      *overrides,
    ]
    if args.list:
      print(f'{name}: python benchmarks/t5x_plans.py {shlex.join(command)}')
    elif any(word in name for word in args.words) or (not args.words and not file.exists()):
      start = time.perf_counter()
      file.unlink(missing_ok=True)
      done = subprocess.run(
        [sys.executable, __file__, *command, f'--json={file}'],
        capture_output=True,
        text=True,
        check=False,
      )
      made = file.exists()
      fits = 'does not fit' if done.returncode else 'fits'
      said = fits if made else done.stderr.strip()[-300:]
      print(f'{name}: {said}, {time.perf_counter() - start:.0f} s', flush=True)
      failed += not made
  return failed


if __name__ == '__main__':
  sys.exit(main())
