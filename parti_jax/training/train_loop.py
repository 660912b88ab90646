"""The training loop of all objectives: steps, and hooks between them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import jax

from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import store_retries
from parti_jax.data import datasets
from parti_jax.data import mixtures
from parti_jax.data import shared_batches
from parti_jax.partitioning import local_rows
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib
from parti_jax.runs import distributed
from parti_jax.runs import journal as journal_lib
from parti_jax.runs import preemption
from parti_jax.runs import run_lock
from parti_jax.training import config as config_lib
from parti_jax.training import device_peak
from parti_jax.training import held_out as held_out_lib
from parti_jax.training import hooks as hooks_lib
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import memory
from parti_jax.training import profiler as profiler_lib
from parti_jax.training import reporting
from parti_jax.training import run as run_lib
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base

# Maximum number of steps whose metrics stay on the devices when no hook reads them.
_MOST_UNSETTLED = 1000


def train(
  model_dir: str,
  config: config_lib.TrainConfig | None = None,
  hooks: Sequence[hooks_lib.Hook] = (),
) -> dict[str, float]:
  """Trains an objective to its last step, from the newest checkpoint in `model_dir` if any.

  Args:
    model_dir: the run's folder: checkpoints, metrics, images, journal, config.gin.
    config: the settings; None for those of gin.
    hooks: further hooks, called after the loop's own.

  Returns:
    The last metrics.

  Raises:
    UserError: if a value is out of range; if the mesh, batch size, task, a file or a checkpoint is
      missing or doesn't fit; after `max_bad_steps`; or if another run owns the folder.
    SystemExit: with `preemption.STATUS` if the run was asked to stop and a checkpoint is written.
  """
  distributed.check_connected()
  store_retries.begin()
  config = config or config_lib.configured()
  with run_lock.RunLock(model_dir) as lock, journal_lib.Journal(model_dir) as journal:
    lock.report(journal)
    return _run_steps(_prepare(config, model_dir, journal), hooks)


@dataclasses.dataclass(frozen=True)
class _Training:
  """The parts of a run, ready for its first step."""

  config: config_lib.TrainConfig
  trainer: trainer_lib.Trainer
  examples: shared_batches.SharedBatches
  held_out: held_out_lib.HeldOut
  run: run_lib.Run
  reporter: reporting.Reporter
  profiler: profiler_lib.Profiler
  journal: journal_lib.Journal


def _run_steps(training: _Training, hooks: Sequence[hooks_lib.Hook]) -> dict[str, float]:
  """Trains to the last step, or until the run is asked to stop; the result is that of `train`."""
  config, run, reporter = training.config, training.run, training.reporter
  results: dict[str, float] = {}
  meter = _meter(training)
  of_held_out = hooks_lib.show_held_out(config, training.held_out, results, reporter)
  hooks = [
    hooks_lib.log(config, training.examples, meter, results, reporter, training.journal),
    hooks_lib.save(config, reporter),  # Before the hooks that may fail.
    *of_held_out,
    *hooks,
  ]

  def call(hooks: Sequence[hooks_lib.Hook], metrics: dict[str, jax.Array]) -> None:
    due = [hook for hook in hooks if hook.is_due(run.step, config.steps)]
    if run.unsettled and (due or run.unsettled >= _MOST_UNSETTLED):
      run.settle(reporter)
    for hook in due:
      hook.function(run, metrics)
    if any(hook.pauses for hook in due):
      meter.restart(run.step)

  succeeded = False
  try:
    if training.held_out.is_missing(run.step):
      call(of_held_out, {})
    while run.step < config.steps and not run.stop_requested():
      with training.profiler.step(run):
        metrics = run.advance()
      reporter.advance(run.step)
      call(hooks, metrics)
    run.settle(reporter)
    if run.step < config.steps:
      reporter.flush()
      run.save(last=True)
    succeeded = True
  except KeyboardInterrupt:
    reporter.say(run.interrupted())
    raise
  finally:
    _close(training, succeeded)
  if run.step < config.steps:
    reporter.say(
      f'asked to stop: a checkpoint of step {run.newest_step()} is written; start again to resume'
    )
    raise SystemExit(preemption.STATUS)
  return results


def _prepare(
  config: config_lib.TrainConfig, model_dir: str, journal: journal_lib.Journal
) -> _Training:
  """Makes the parts of a run, so that anything missing is found before the first step."""
  mesh = mesh_lib.make_mesh()
  image_size = config.objective.feature_lengths().get('images', 64)
  text_features = mixtures.text_features(config.task, image_size)
  objective = config.objective.with_text_features(text_features)
  config = dataclasses.replace(config, objective=objective)
  trainer = trainer_lib.Trainer.of_config(config, mesh)
  rules_lib.check_batch(config.batch_size, mesh, trainer.rules, config.microbatches)
  # The base of adapters is as large as a network.
  memory.check((trainer.abstract, trainer.abstract_constants() if objective.lora else ()))
  disk_errors.check_room(model_dir, state_lib.num_bytes(trainer.abstract))
  check_vocabularies(objective, config.task)
  examples = shared_batches.SharedBatches(
    config.task,
    config.split,
    config.batch_size,
    objective.feature_lengths(),
    config.data_shares,
    jax.process_count(),
    local_rows.local_rows(trainer.batch_sharding, config.batch_size).tolist(),
    config.seed,
    config.restart_data,
  )
  constants = trainer.constants
  held_out = held_out_lib.HeldOut(
    trainer,
    model_dir,
    config.task,
    config.eval_split or config.split,
    config.batch_size,
    config.seed,
    evaluate=bool(config.eval_split and config.evaluate_every),
    num_pictures=config.num_pictures if config.pictures_every else 0,
  )
  inputs = inputs_lib.Inputs(
    objective,
    examples.fingerprints,
    held_out.draws or 'tokenizer' in constants,
    config.allow_mismatch,
  )
  run = run_lib.Run(
    trainer,
    model_dir,
    config.keep_checkpoints,
    examples,
    inputs,
    initial_parts(trainer, model_dir, inputs, config.initial_model),
    journal,
    config.max_bad_steps,
  )
  if text_features is not None:
    objective.check_text_features(run.state.params | constants, text_features)
  reporter = reporting.Reporter(model_dir, config.steps, run.step, config.writers)
  journal.start(
    run.beginning(),
    gin_config.operative(),
    steps=config.steps,
    batch_size=config.batch_size,
    **run.facts(),
  )
  profiler = profiler_lib.Profiler(model_dir, config.profile_steps)
  training = _Training(config, trainer, examples, held_out, run, reporter, profiler, journal)
  _announce(training, inputs.warnings)
  if text_features is not None:
    reporter.say(f'the text encoder does not run in steps: {text_features.name} has its features')
  preemption.begin(config.grace_seconds, journal, run.newest_step)
  return training


def _announce(training: _Training, warnings: Sequence[str]) -> None:
  """Prints where the run begins, its warnings, and settings that it can't follow exactly."""
  config, held_out, say = training.config, training.held_out, training.reporter.say
  for line in training.run.damaged():
    say(line)
    training.journal.write('damaged', line)
  for line in warnings:
    say(f'warning: {line}')
  for name in gin_config.unused(base.Objective):
    say(f"warning: --gin.{name} has no effect: the run's objective is {config.objective.gin_name}")
  if held_out.draws and held_out.num_pictures < config.num_pictures:
    say(
      f'pictures show {held_out.num_pictures} examples, all that '
      f'{config.eval_split or config.split} has, and not train.num_pictures={config.num_pictures}'
    )
  say(training.run.beginning())


def _meter(training: _Training) -> hooks_lib.Meter:
  objective, batch_size = training.config.objective, training.config.batch_size
  peak = device_peak.device_peak(jax.local_devices()[0], objective.compute_dtype)
  return hooks_lib.Meter(batch_size, objective.step_flops(batch_size), peak * jax.device_count())


def _close(training: _Training, succeeded: bool) -> None:
  """Ends what runs in the background.

  Args:
    training: the parts of the run.
    succeeded: whether training ended without an error.
  """
  run, journal = training.run, training.journal
  training.profiler.close()
  training.examples.close()
  # A process that failed must not wait for the others, which may be waiting for it.
  if succeeded or jax.process_count() == 1:
    run.close()
  journal.step = run.step
  journal.skipped(run.skipped())
  journal.store_retries()
  training.reporter.close(run.skipped())


def initial_parts(
  trainer: trainer_lib.Trainer,
  model_dir: str | os.PathLike,
  inputs: inputs_lib.Inputs,
  initial_model: str | None = None,
) -> base.Params:
  """Reads the parameters that a new run starts with from an exported model and from other runs.

  The objective's `initial_parts` reads those of other runs, which take precedence.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    inputs: fingerprints of the run's vocabulary and tokenizer.
    initial_model: a model folder, or None.

  Returns:
    {name of a part: its parameters}; {} for a run that already has a checkpoint. The other parts
    start from random parameters.
  """
  if run_checkpoints.has_checkpoint(model_dir):
    return {}
  parts: base.Params = {}
  abstract = trainer.abstract.params
  if initial_model:
    parts |= run_checkpoints.read_model_folder(initial_model, trainer.objective, abstract, inputs)
  parts |= trainer.objective.initial_parts(abstract, inputs)
  if untrained := [name for name in trainer.objective.frozen if name not in parts]:
    raise errors.UserError(
      f'{type(trainer.objective).__name__}.frozen={trainer.objective.frozen!r}: nothing gives '
      f'parameters for {", ".join(untrained)}, which would stay random; '
      'set train.initial_model, or what the objective takes them from'
    )
  return parts


def check_vocabularies(objective: base.Objective, task: str) -> None:
  """Compares the number of ids in a task's features, and the grid, with the model's.

  A lookup outside of an embedding table would not fail but return its last row.

  Args:
    objective: the objective to train.
    task: name of a seqio task.

  Raises:
    UserError: if a feature has more ids than the model's table has rows, or if the number of image
      tokens, or their grid, differs.
  """
  sizes = mixtures.vocabulary_sizes(task, objective.feature_lengths().get('images', 64))
  for feature, (key, size) in objective.vocabulary_sizes().items():
    found = sizes.get(feature, size)
    way_out = f'set --gin.{key}={found}'
    if feature == 'inputs' and 'text_encoder' in objective.sources():  # Its table is imported.
      way_out = 'set vocabulary.path to the folder of the text encoder'
    if found > size or (feature == 'targets' and found != size):
      raise errors.UserError(
        f'{key}={size}, but the task {task!r} has {found} ids in {feature!r}; '
        f'{way_out}, or choose the vocabulary or the token '
        'cache that the model is for'
      )
  if datasets.is_ours(task) or mixtures.is_one(task):
    objective.check_vocabulary(datasets.get_vocabulary())
    if (grid := objective.grid()) is not None:
      for dataset in mixtures.get(task, objective.feature_lengths().get('images', 64)):
        if 'targets' in dataset.features:
          _check_grid(*grid, dataset)


def _check_grid(key: str, grid: tuple[int, int], dataset: datasets.Dataset) -> None:
  """Raises UserError unless pictures have this grid of image tokens, or an unknown one as large."""
  tokens, theirs = dataset.source.info['image_tokens'], dataset.grid
  if theirs == grid or (theirs is None and tokens == math.prod(grid)):
    return
  shown, way_out = f'{tokens}', f'set {key}'
  if theirs is not None:
    shown, way_out = f'{theirs[0]}×{theirs[1]}', f'set --gin.{key}="{theirs}"'
  raise errors.UserError(
    f'{key}={grid}, but {dataset.source.name} has {shown} image tokens of a picture; {way_out}, or '
    'choose the token cache that the model is for'
  )
