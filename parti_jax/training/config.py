"""The settings of a training run: a dataclass that gin fills under the name `train`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import gin
import optax

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.training import writers as writers_lib
from parti_jax.training.objectives import base


@functools.partial(config_checks.configurable, name='train')
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
  profile_steps=(1, None),
)
@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Settings of `parti-jax train`: the objective, its data and optimizer, and all intervals.

  Attributes:
    objective: the objective to train.
    task: name of the seqio task with the examples.
    steps: total number of steps, including those before a resume.
    batch_size: global batch size, over all devices.
    optimizer: function that takes the schedule and returns an optax transformation.
    schedule: learning rate as a function of the step.
    seed: seed of the parameters, of dropout and of the order of the data.
    split: split of the task to train on.
    eval_split: split of the task to evaluate on; None for no evaluation.
    log_every: steps between metrics; 0 for none.
    evaluate_every: steps between evaluations on `eval_split`, which also follow the last step; 0
      for none.
    checkpoint_every: steps between checkpoints; 0 writes one after the last step only. The last
      step always has one.
    keep_checkpoints: number of checkpoints to keep.
    pictures_every: steps between image grids, which also follow the last step; 0 for none.
    num_pictures: number of examples in a grid: the first ones of `eval_split`, or of `split` if
      `eval_split` is None. 0 for no grids.
    initial_model: model folder written by `parti-jax export`, whose parameters a new run starts
      from; None for random parameters. The optimizer's state isn't taken from it.
    data_shares: number of shares that the examples are split into (`SharedBatches`); None for one
      per process of the new run. It stays the same when another number of processes resumes it.
    microbatches: number of parts of a batch whose gradients are computed one after the other and
      summed, for batches that don't fit in memory. Losses that compare examples, such as the
      ranker's, only compare those of a microbatch, and the run reports it. Other results don't
      change.
    offload_optimizer: whether to keep the optimizer's state in host memory between steps, on
      platforms that support it.
    grace_seconds: maximum time from SIGTERM, or from the platform's notice, until the process
      ends: what the platform grants, less a few seconds.
    max_bad_steps: number of consecutive steps with a loss or gradients that aren't finite after
      which training ends; None for no limit. These steps aren't applied.
    allow_mismatch: whether to warn, rather than fail, if the parameters to start or resume from
      were trained with another vocabulary or image tokenizer.
    restart_data: whether a resumed run begins a new pass over its data. It has to if its checkpoint
      stores the position in another format or for other sources.
    writers: functions that make the writers of metrics and images (`writers.Writer`). With none,
      metrics only go to the terminal.
    profile_steps: first and last step to trace with JAX's profiler, counted from 1; None for no
      trace.

  Raises:
    UserError: if a value has the wrong type or is out of range.
  """

  objective: base.Objective = gin.REQUIRED
  task: str = gin.REQUIRED
  steps: int = gin.REQUIRED
  batch_size: int = gin.REQUIRED
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = gin.REQUIRED
  schedule: optax.Schedule = gin.REQUIRED
  seed: int = 0
  split: str = 'train'
  eval_split: str | None = 'validation'
  log_every: int = 50
  evaluate_every: int = 500
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  pictures_every: int = 1000
  num_pictures: int = 16
  initial_model: str | None = None
  data_shares: int | None = None
  microbatches: int = 1
  offload_optimizer: bool = False
  grace_seconds: float = 25
  max_bad_steps: int | None = 10
  allow_mismatch: bool = False
  restart_data: bool = False
  writers: Sequence[Callable[[str, int], writers_lib.Writer]] = (writers_lib.TensorBoardWriter,)
  profile_steps: tuple[int, int] | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.objective, base.Objective):
      raise errors.UserError(
        f'train.objective={checks.shown(self.objective)} must be an objective, such as '
        '@GeneratorObjective()'
      )
    if not callable(self.optimizer):
      raise errors.UserError(
        f'train.optimizer={checks.shown(self.optimizer)} must be an optimizer, such '
        'as @adafactor, without parentheses'
      )
    try:
      float(self.schedule(0))
    except TypeError as error:
      raise errors.UserError(
        f'train.schedule={checks.shown(self.schedule)} must be a function of the step, such as '
        '@parti_schedule(), with parentheses'
      ) from error
    if not isinstance(self.writers, (list, tuple)) or not all(map(callable, self.writers)):
      raise errors.UserError(
        f'train.writers={checks.shown(self.writers)} must be a list of writers, such as '
        '[@TensorBoardWriter], without parentheses'
      )
    checks.check_fields(self, 'train.', checks.bounds_of(type(self)))
    if self.profile_steps and not self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
      raise errors.UserError(
        f'train.profile_steps={self.profile_steps} must be the first and the last step of a trace, '
        f'such as (1, {min(self.steps, 5)}), and the last at most train.steps={self.steps}'
      )


def configured(**others: Any) -> TrainConfig:
  """Returns the settings that gin has.

  Args:
    **others: defaults for required settings, for commands that don't need them.

  Raises:
    UserError: if gin has no value for a required setting, or a value is out of range.
  """
  bound = gin.get_bindings(TrainConfig, resolve_references=False)
  missing = [
    f'train.{field.name}'
    for field in dataclasses.fields(TrainConfig)
    if field.default is gin.REQUIRED and field.name not in bound and field.name not in others
  ]
  if missing:
    raise errors.UserError(
      f'gin: no value for {", ".join(missing)}; give the gin file of a run, such as '
      '--gin_file=gin_configs/runs/parti_20b.gin, or set it with '
      f'{" ".join(f"--gin.{name}=VALUE" for name in missing)}'
    )
  return TrainConfig(**{name: value for name, value in others.items() if name not in bound})
