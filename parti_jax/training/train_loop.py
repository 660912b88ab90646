"""The loop that trains every objective: steps, checkpoints, metrics, pictures."""

from __future__ import annotations

import inspect
import time
from typing import Any

import gin
import jax

from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import run_checkpoints as checkpoints_lib
from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import store_retries
from parti_jax.partitioning import local_rows
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib
from parti_jax.runs import distributed
from parti_jax.runs import journal as journal_lib
from parti_jax.runs import preemption
from parti_jax.runs import run_lock
from parti_jax.training import device_peak
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import memory
from parti_jax.training import reporting
from parti_jax.training import run as run_lib
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base

# Steps whose metrics may wait on the devices where nothing asks for any.
_MOST_UNSETTLED = 1000


def train(model_dir: str) -> dict[str, float]:
  """Trains as gin says, see `train_objective`, and writes a journal of it in the run's folder.

  Args:
    model_dir: the run's folder, see `train_objective`.

  Raises:
    UserError: if another run owns the folder; see `train_objective` for more.
  """
  distributed.check_connected()
  store_retries.begin()
  with run_lock.RunLock(model_dir) as lock, journal_lib.Journal(model_dir) as journal:
    lock.tell(journal)
    return train_objective(model_dir, journal)


@gin.configurable('train')
@checks.bounded(
  steps=(1, None),
  batch_size=(1, None),
  seed=(0, checks.LARGEST_INT32),
  log_every=(0, None),
  evaluate_every=(0, None),
  checkpoint_every=(0, None),
  keep_checkpoints=(1, None),
  pictures_every=(0, None),
  num_pictures=(0, 10_000),
  data_shares=(1, None),
  microbatches=(1, None),
  grace_seconds=(0, None),
  max_bad_steps=(1, None),
)
def train_objective(
  model_dir: str,
  journal: journal_lib.Journal,
  objective=gin.REQUIRED,
  task: str = gin.REQUIRED,
  steps: int = gin.REQUIRED,
  batch_size: int = gin.REQUIRED,
  optimizer=gin.REQUIRED,
  schedule=gin.REQUIRED,
  seed: int = 0,
  split: str = 'train',
  eval_split: str | None = 'validation',
  log_every: int = 50,
  evaluate_every: int = 500,
  checkpoint_every: int = 500,
  keep_checkpoints: int = 2,
  pictures_every: int = 1000,
  num_pictures: int = 16,
  initial_model: str | None = None,
  data_shares: int | None = None,
  microbatches: int = 1,
  offload_optimizer: bool = False,
  grace_seconds: float = 25,
  max_bad_steps: int | None = 10,
  allow_mismatch: bool = False,
  restart_data: bool = False,
):
  """Trains an objective until `steps`, from the newest checkpoint in `model_dir` if there is one.

  Args:
    model_dir: the run's folder: checkpoints, metrics, pictures, journal, config.gin.
    journal: of the run.
    objective: what is trained.
    task: the seqio task that gives the examples.
    steps: where training ends, counted from the run's beginning.
    batch_size: examples a step, over all devices.
    optimizer: takes the schedule, returns an optax transformation.
    schedule: learning rate by step.
    seed: of parameters, dropout and the order of the data.
    split: of the task to train on.
    eval_split: of the task to evaluate on; None for no evaluation.
    log_every: steps between metrics; 0 for none.
    evaluate_every: steps between evaluations on `eval_split`; 0 for none. The last step is
      evaluated too.
    checkpoint_every: steps between checkpoints; the last step has one in any case, with 0 alone.
    keep_checkpoints: how many stay.
    pictures_every: steps between picture grids; 0 for none. The last step has one too.
    num_pictures: examples in a grid, the first ones of `eval_split`, or of `split` without it; 0
      for no grids.
    initial_model: a model folder, as `parti-jax export` writes it, whose parameters a new run
      starts with; None for random ones. The optimiser starts anew.
    data_shares: into how many shares the examples are split, see `SharedBatches`; None for as
      many as the run has processes when it begins. They stay the same whoever resumes it.
    microbatches: parts of a batch whose gradients are computed one after the other and summed,
      for batches that do not fit the memory at once. Losses that compare examples, such as the
      ranker's, compare those of a microbatch, and the run says so; no other result changes.
    offload_optimizer: whether the optimiser's state lies in the hosts' memory between steps, on
      platforms that have it.
    grace_seconds: from SIGTERM, or the platform's notice, until the process ends, at most: what the
      platform grants, less a few seconds.
    max_bad_steps: how many steps in a row may have a loss or gradients that are not finite, and are
      not applied, see `finite`; after them training ends. None for any number.
    allow_mismatch: whether the run may go on, or start, with parameters that were trained with
      another vocabulary or another image tokenizer; then it warns.
    restart_data: whether a run that goes on begins a new pass over its data, as it must where its
      checkpoint has the place in another form or in other sources.

  Returns:
    The last metrics, a dict of floats.

  Raises:
    UserError: for a value out of its range; for a mesh, batch size, task, file or checkpoint that
      is missing or does not fit; after `max_bad_steps`.
    SystemExit: with `preemption.STATUS` if the run was told to stop and a checkpoint is written.
  """
  # Reading data takes TensorFlow; who only asks gin about a run, as planning does, needs none.
  from parti_jax.data import shared_batches
  from parti_jax.training import held_out as held_out_lib

  _check_parts(objective, optimizer, schedule)
  mesh = mesh_lib.make_mesh()
  trainer = trainer_lib.Trainer(
    objective, optimizer(schedule), mesh, seed, microbatches, offload_optimizer
  )
  rules_lib.check_batch(batch_size, mesh, trainer.rules, microbatches)
  memory.check(trainer.abstract)
  disk_errors.check_room(model_dir, state_lib.num_bytes(trainer.abstract))
  check_vocabularies(objective, task)
  training = shared_batches.SharedBatches(
    task,
    split,
    batch_size,
    objective.feature_lengths(),
    data_shares,
    jax.process_count(),
    local_rows.local_rows(trainer.batch_sharding, batch_size),
    seed,
    restart_data,
  )
  _ = trainer.constants
  held_out = held_out_lib.HeldOut(
    trainer,
    model_dir,
    task,
    eval_split or split,
    batch_size,
    seed,
    evaluate=bool(eval_split and evaluate_every),
    num_pictures=num_pictures if pictures_every else 0,
  )
  inputs = inputs_lib.Inputs(
    objective,
    training.fingerprints,
    held_out.draws or 'tokenizer' in trainer.constants,
    allow_mismatch,
  )
  run = run_lib.Run(
    trainer,
    model_dir,
    keep_checkpoints,
    training,
    inputs,
    initial_parts(trainer, model_dir, inputs, initial_model),
    journal,
    max_bad_steps,
  )
  reporter = reporting.Reporter(model_dir, steps, run.step)
  journal.start(
    run.beginning(), gin_config.operative(), steps=steps, batch_size=batch_size, **run.facts()
  )
  peak = (
    device_peak.device_peak(jax.local_devices()[0], objective.compute_dtype) * jax.device_count()
  )
  for line in run.damaged():
    reporter.say(line)
    journal.write('damaged', line)
  for line in inputs.warnings:
    reporter.say(f'warning: {line}')
  if held_out.draws and held_out.num_pictures < num_pictures:
    reporter.say(
      f'pictures show {held_out.num_pictures} examples, all that {eval_split or split} '
      f'has, and not train.num_pictures={num_pictures}'
    )
  reporter.say(run.beginning())
  preemption.begin(grace_seconds, journal, run.newest_step)
  meter = _Meter(batch_size, objective.step_flops(batch_size), peak)
  metrics: dict[str, float] = {}
  whole = False

  def due(every: int) -> bool:
    return bool(every) and (run.step % every == 0 or run.step == steps)

  def show_held_out():
    evaluates, draws = eval_split and due(evaluate_every), held_out.draws and due(pictures_every)
    if not (evaluates or draws):
      return
    run.finish_saving()  # Whatever goes wrong from here on must not cost steps.
    if evaluates:
      measured = held_out.evaluate(run.state)
      metrics.update(measured)
      reporter.metrics(run.step, measured)
      if f'{eval_split}/not_finite_examples' in measured:
        reporter.say(f'step {run.step}: the numbers of evaluation on {eval_split} are not finite')
    if draws:
      reporter.pictures(run.step, held_out.pictures(run.state))
    reporter.flush()
    held_out.done(run.step)

  try:
    if held_out.is_missing(run.step):
      show_held_out()
    while run.step < steps and not run.told_to_stop():
      values = run.advance()
      step = run.step
      saves = due(checkpoint_every) or step == steps
      intervals = log_every, evaluate_every, pictures_every
      if saves or run.unsettled >= _MOST_UNSETTLED or any(map(due, intervals)):
        run.settle(reporter)
      if due(log_every):
        metrics = {name: float(value) for name, value in values.items()}
        # The rate of the last step that was applied.
        metrics |= {
          'learning_rate': float(schedule(max(run.updates - 1, 0))),
          'skipped_steps': step - run.updates,
          'skipped_examples': sum(run.skipped().values()),
        }
        metrics |= training.by_source | meter.read(step)
        if store_retries.used():
          metrics['store_retries'] = sum(store_retries.counts().values())
        reporter.metrics(step, metrics)
        journal.progress(step, metrics)
      reporter.advance(step)
      if saves:
        reporter.flush()
        run.save(last=step == steps)
      show_held_out()
      meter.pause(step, saves or due(evaluate_every) or due(pictures_every))
    run.settle(reporter)
    if run.step < steps:
      reporter.flush()
      run.save(last=True)
    whole = True
  except KeyboardInterrupt:
    reporter.say(run.interrupted())
    raise
  finally:
    training.close()
    # The other processes may be waiting for one that failed, so that one must not wait for them.
    if whole or jax.process_count() == 1:
      run.close()
    journal.step = run.step
    journal.skipped(run.skipped())
    journal.store_retries()
    reporter.close(run.skipped())
  if run.step < steps:
    reporter.say(
      f'told to stop: a checkpoint of step {run.newest_step()} is written; start again to go on'
    )
    raise SystemExit(preemption.STATUS)
  return metrics


def bound_arguments() -> dict[str, Any]:
  """The arguments of `train_objective` as gin binds them, with what they refer to made, or defaults.

  Raises:
    UserError: if one that has no default is not bound.
  """
  values = {
    name: parameter.default
    for name, parameter in inspect.signature(train_objective).parameters.items()
  }
  values |= gin.get_bindings(train_objective)
  missing = [
    name
    for name in ('objective', 'optimizer', 'schedule', 'batch_size')
    if values[name] is gin.REQUIRED
  ]
  if missing:
    raise errors.UserError(
      f'gin: no value for {", ".join(f"train.{name}" for name in missing)}; give the gin file '
      'of a run, such as --gin_file=gin_configs/runs/parti_20b.gin'
    )
  _check_parts(values['objective'], values['optimizer'], values['schedule'])
  return values


def _check_parts(objective, optimizer, schedule):
  """Raises UserError unless these are what `train_objective` says."""
  if not isinstance(objective, base.Objective):
    raise errors.UserError(
      f'train.objective={checks.shown(objective)} must be an objective, such as @GeneratorObjective()'
    )
  if not callable(optimizer):
    raise errors.UserError(
      f'train.optimizer={checks.shown(optimizer)} must be an optimizer, such '
      'as @adafactor, without parentheses'
    )
  try:
    float(schedule(0))
  except TypeError as error:
    raise errors.UserError(
      f'train.schedule={checks.shown(schedule)} must be a function of the step, such as '
      '@parti_schedule(), with parentheses'
    ) from error


def initial_parts(
  trainer: trainer_lib.Trainer,
  model_dir,
  inputs: inputs_lib.Inputs,
  initial_model: str | None = None,
):
  """Parameters that a new run starts with, from an exported model or from other runs.

  The objective's `initial_parts` say the latter. They come before those of `initial_model`.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    inputs: what the run is trained with.
    initial_model: a model folder, or None.

  Returns:
    {name of a part: its parameters}; nothing for a run that has begun. Other parts are random.
  """
  if checkpoints_lib.has_checkpoint(model_dir):
    return {}
  parts, abstract = {}, trainer.abstract.params
  if initial_model:
    parts |= checkpoints_lib.read_model_folder(initial_model, trainer.objective, abstract, inputs)
  return parts | trainer.objective.initial_parts(abstract, inputs)


def check_vocabularies(objective, task: str):
  """Compares the ids in a task's features with what the model has room for.

  Args:
    objective: what is trained.
    task: name of a seqio task.

  Raises:
    UserError: if there are more ids than the model's table has rows, or, among image tokens,
      another number. A look-up outside a table would not fail but take its last row.
  """
  from parti_jax.data import mixtures

  sizes = mixtures.vocabulary_sizes(task, objective.feature_lengths().get('images', 64))
  for feature, (key, size) in objective.vocabulary_sizes().items():
    found = sizes.get(feature, size)
    if found > size or (feature == 'targets' and found != size):
      raise errors.UserError(
        f'{key}={size}, but the task {task!r} has {found} ids in {feature!r}; '
        f'set --gin.{key}={found}, or choose the vocabulary or the token '
        'cache that the model is for'
      )


class _Meter:
  """Examples/s and model FLOP/s since the last reading, without pauses for other work."""

  def __init__(self, batch_size: int, flops: int, peak: float):
    self._batch_size, self._flops, self._peak = batch_size, flops, peak
    self._start, self._step = time.perf_counter(), None

  def read(self, step: int) -> dict[str, float]:
    now = time.perf_counter()
    seconds, self._start = now - self._start, now
    before, self._step = self._step, step
    if before is None or before >= step:
      return {}  # The first steps compile.
    rate = (step - before) / seconds
    return {
      'examples_per_second': rate * self._batch_size,
      'model_flops_per_second': rate * self._flops,
      'share_of_peak': rate * self._flops / self._peak,
    }

  def pause(self, step: int, paused: bool):
    if paused:
      self._start, self._step = time.perf_counter(), step
