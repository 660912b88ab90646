"""The settings of a training run, one dataclass that gin fills under the name `train`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence

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
  """What `parti-jax train` does: the objective, its data and optimizer, and when what happens.

  Attributes:
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
      starts with; None for random ones. The optimizer starts from its beginning.
    data_shares: into how many shares the examples are split, see `SharedBatches`; None for as
      many as the run has processes when it begins. They stay the same whoever resumes it.
    microbatches: parts of a batch whose gradients are computed one after the other and summed,
      for batches that do not fit the memory at once. Losses that compare examples, such as the
      ranker's, compare those of a microbatch, and the run says so; no other result changes.
    offload_optimizer: whether the optimizer's state lies in the hosts' memory between steps, on
      platforms that have it.
    grace_seconds: from SIGTERM, or the platform's notice, until the process ends, at most: what the
      platform grants, less a few seconds.
    max_bad_steps: how many steps in a row may have a loss or gradients that are not finite, and are
      not applied; after them training ends. None for any number.
    allow_mismatch: whether the run may go on, or start, with parameters that were trained with
      another vocabulary or another image tokenizer; then it warns.
    restart_data: whether a run that goes on begins a new pass over its data, as it must where its
      checkpoint has the place in another form or in other sources.
    writers: make the writers of metrics and pictures, see `writers.Writer`; without any there are
      the lines on the terminal alone.
    profile_steps: the first and the last step of a trace by JAX's profiler, counted from 1; None
      for no trace.

  Raises:
    UserError: for a value of another type or out of its range.
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

  def __post_init__(self):
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


def configured(**others) -> TrainConfig:
  """The settings that gin has.

  Args:
    **others: values of required settings, for commands that can do without them; those that gin
      has win.

  Raises:
    UserError: if gin has no value of a required one, or one is out of its range.
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
