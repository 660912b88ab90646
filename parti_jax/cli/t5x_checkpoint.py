"""`parti-jax t5x_checkpoint`: converts a run's checkpoint to t5x, or a t5x checkpoint to a run."""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.runs import distributed
from parti_jax.runs import run_lock
from parti_jax.t5x import checkpoints as t5x_checkpoints
from parti_jax.t5x import inputs
from parti_jax.training import config as config_lib
from parti_jax.training import trainer as trainer_lib

# The networks, and objectives, that t5x supports too.
_NETWORKS = ('generator', 'tokenizer')


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax t5x_checkpoint`."""
  parser.add_argument(
    '--model_dir',
    metavar='RUN',
    help='folder of the run to convert to t5x or, with --from_t5x, of the new run',
  )
  group = parser.add_argument_group('for t5x')
  group.add_argument(
    '--output_dir',
    metavar='FOLDER',
    help='output folder of checkpoint_<step>, which may become the MODEL_DIR of '
    't5x; a path or a gs:// URL',
  )
  group.add_argument('--step', type=int, help="step of the run's checkpoint (default: the newest)")
  group.add_argument(
    '--model',
    metavar='FOLDER',
    help='an exported model instead of a run: only parameters, at step 0',
  )
  group.add_argument(
    '--network',
    choices=_NETWORKS,
    default='generator',
    help='the network of the exported model (default: %(default)s)',
  )
  group = parser.add_argument_group('from t5x')
  group.add_argument(
    '--from_t5x',
    metavar='CHECKPOINT',
    help='the folder checkpoint_<step> in the MODEL_DIR of t5x; the gin files give '
    'objective and optimizer, like those of `train`',
  )
  group.add_argument(
    '--parameters_only',
    action='store_true',
    help='convert only the step and the parameters, and reset the optimizer',
  )
  gin_config.add_gin_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Converts a checkpoint; returns the exit status."""
  distributed.check_connected()
  if args.from_t5x:
    _check_flags(args, needed=('model_dir', 'gin_file'), others=('output_dir', 'step', 'model'))
    from parti_jax.training import configurables  # noqa: F401

    gin_config.parse(args.gin_file, args.gin_bindings, data=False)
    print(to_run(args.from_t5x, args.model_dir, _bound_trainer(), args.parameters_only))
    return 0
  _check_flags(args, needed=('output_dir',), others=('parameters_only', 'gin_file', 'gin_bindings'))
  if (args.model is None) == (args.model_dir is None):
    raise errors.UserError(
      'give --model_dir=RUN or --model=FOLDER to convert to t5x, or --from_t5x=CHECKPOINT to '
      'convert from t5x'
    )
  if args.model is not None:
    _check_flags(args, needed=(), others=('step',))
    print(model_to_t5x(args.model, args.network, args.output_dir))
  else:
    print(run_to_t5x(args.model_dir, args.output_dir, args.step))
  return 0


def _check_flags(args: argparse.Namespace, needed: tuple[str, ...], others: tuple[str, ...]):
  missing = [f'--{flag}' for flag in needed if not getattr(args, flag)]
  if missing:
    raise errors.UserError(
      f'{" and ".join(missing)} not given; see parti-jax t5x_checkpoint --help'
    )
  for flag in others:
    if getattr(args, flag) not in (None, False, []):
      name = flag.replace('gin_bindings', 'gin.NAME=VALUE')
      which = '--from_t5x' if args.from_t5x else '--model' if args.model else 'a run'
      raise errors.UserError(f"--{name} can't be combined with {which}; omit it")


def run_to_t5x(model_dir, folder, step: int | None = None) -> str:
  """Writes a checkpoint of a run for t5x.

  Args:
    model_dir: folder of a run of GeneratorObjective or TokenizerObjective.
    folder: output folder of `checkpoint_<step>`.
    step: step of the checkpoint; None for the newest whole one.

  Returns:
    A line that says what was written and how to use it in t5x.

  Raises:
    UserError: if the checkpoint doesn't exist, is damaged or has another objective; if the output
      exists already, or can't be written.
  """
  path = (
    run_checkpoints.latest_checkpoint(model_dir)
    if step is None
    else run_checkpoints.checkpoint_of(model_dir, step)
  )
  described = run_checkpoints.read_model(path)
  objective = described['stage']
  if 'lora' in described:
    raise errors.UserError(
      f'{path} has adapters of a network (LoRA), which t5x does not know; `parti-jax export` adds them '
      'to their base, and --model takes the folder that it writes'
    )
  if objective not in _NETWORKS:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {objective!r}, which t5x has no model for; give a '
      f'run of {" or ".join(_NETWORKS)}'
    )
  t5x_checkpoints.target(folder, int(path.name))
  inputs.write(folder, run_checkpoints.read_place(path))
  written = t5x_checkpoints.write(folder, t5x_checkpoints.read_run(path))
  return (
    f'{written}: step {path.name} of {model_dir}, with the state of its optimizer; use it '
    f'in t5x with --gin.INITIAL_CHECKPOINT_PATH="\'{written}\'", or continue with '
    f'--gin.MODEL_DIR="\'{folder}\'"'
  )


def model_to_t5x(model, network: str, folder) -> str:
  """Writes the parameters of an exported model for t5x, as a checkpoint of step 0.

  Args:
    model: the model folder.
    network: 'generator' or 'tokenizer'.
    folder: output folder of `checkpoint_0`.

  Returns:
    A line that says what was written and how to use it in t5x.

  Raises:
    UserError: if the model folder doesn't exist or is damaged; if the output exists already, or
      can't be written.
  """
  from parti_jax.exported_model import model_folder

  t5x_checkpoints.target(folder, 0)
  part = model_folder.load(model).networks[network]
  if network == 'generator':
    inputs.write(folder, part.made_with)
  tree = {
    'target': jax.tree.map(np.asarray, part.params),
    'state': {'step': jnp.zeros((), jnp.int32)},
  }
  abstract = t5x_checkpoints.in_host_memory(tree)
  written = t5x_checkpoints.write(folder, run_checkpoints.put_like(tree, abstract))
  return (
    f'{written}: the {network} of {model}, without optimizer state; evaluate and '
    f'infer in t5x with --gin.CHECKPOINT_PATH="\'{written}\'", finetune with '
    f'--gin.INITIAL_CHECKPOINT_PATH="\'{written}\'" --gin.PARAMETERS_ONLY=True'
  )


def to_run(path, model_dir, trainer, parameters_only: bool = False) -> str:
  """Makes the folder of a run that continues from a t5x checkpoint.

  Args:
    path: the checkpoint, `.../checkpoint_<step>`.
    model_dir: the run's folder.
    trainer: a Trainer of the objective and the optimizer, on any mesh of this process's devices.
    parameters_only: whether to reset the optimizer and the statistics.

  Returns:
    A line that says what was written.

  Raises:
    UserError: if the run has begun already; if the checkpoint doesn't exist, is damaged, or doesn't
      fit the trainer; if t5x has no model for the objective; if the run's folder can't be written.
  """
  objective, abstract = trainer.objective, trainer.abstract
  if objective.name not in _NETWORKS:
    raise errors.UserError(
      f'train.objective is {objective.name!r}, which t5x has no model for; give the gin '
      f'file of a run of {" or ".join(_NETWORKS)}'
    )
  if objective.lora is not None:
    raise errors.UserError(
      'train.objective is LoraObjective, whose adapters t5x does not know; set it to the objective of '
      'the network'
    )
  _check_new(model_dir)
  state = (
    _parameters(path, trainer)
    if parameters_only
    else t5x_checkpoints.train_state(
      t5x_checkpoints.read(path, t5x_checkpoints.state_dict(abstract)), abstract
    )
  )
  step = int(state.step)
  with run_lock.RunLock(model_dir):
    _check_new(model_dir)
    writer = checkpoint_manager.Checkpoints(model_dir)
    try:
      writer.save(
        step,
        state,
        {'from_t5x': str(path)} | inputs.of_checkpoint(path),
        run_checkpoints.describe(objective),
        t5x_checkpoints.CHUNK_BYTES,
      )
    finally:
      writer.close()
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
  optimizer = 'starts again' if parameters_only else 'continues'
  return (
    f'{model_dir}: a run of the objective {objective.name!r} at step {step}, {count / 1e6:.1f}M '
    f'parameters; in `parti-jax train` the optimizer {optimizer}, and the data start from '
    'the beginning'
  )


def _bound_trainer() -> trainer_lib.Trainer:
  """A trainer of what gin says, in the host's memory."""
  config = config_lib.configured(task='', steps=checks.LARGEST_INT32)
  mesh = mesh_lib.make_mesh(1, 1, 1, 1, [t5x_checkpoints.host_device()])
  return trainer_lib.Trainer(config.objective, config.optimizer(config.schedule), mesh)


def _check_new(model_dir):
  if run_checkpoints.has_checkpoint(model_dir):
    raise errors.UserError(f'{model_dir}: has checkpoints already; choose another --model_dir')


def _parameters(path, trainer):
  """Returns the state of a new run with the step and parameters of a t5x checkpoint."""
  abstract = trainer.abstract
  wanted = t5x_checkpoints.state_dict(abstract)
  tree = t5x_checkpoints.read(
    path, {'target': wanted['target'], 'state': {'step': abstract.step}}, within=('target/',)
  )
  placed = t5x_checkpoints.train_state(tree, abstract.replace(optimizer_state={}, statistics={}))
  statistics = trainer.objective.initial_statistics()
  if 'average' in statistics:
    statistics = statistics | {
      'average': {
        name: jax.tree.map(jnp.copy, placed.params[name]) for name in statistics['average']
      }
    }
  optimizer_state = jax.jit(
    trainer.optimizer.init,
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer_state),
  )(placed.params)
  return placed.replace(optimizer_state=optimizer_state, statistics=statistics)
