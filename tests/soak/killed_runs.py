"""Runs that are killed and started again, and what they are compared with.

`Starter` runs `parti-jax train` in processes of their own. They are forked from one that has
imported what training needs, so that a start takes about as long as its own work. In each process
a recorder writes down what no kill may change: every batch and every metric of every step, as
they come; and where a `Moment` says so, it kills the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np

REPOSITORY = pathlib.Path(__file__).parents[2]
# What a child imports before it knows what it is to do.
_PRELOADED = [
  'parti_jax.data.tasks',
  'parti_jax.training.configurables',
  'parti_jax.training.train_loop',
  'parti_jax.cli.train',
  'parti_jax.cli.main',
  'orbax.checkpoint',
  'tensorboard.plugins.scalar.summary_v2',
  'killed_runs',
]
_PR_SET_PDEATHSIG = 1
# Measures of time differ from run to run.
TIMES = ('examples_per_second', 'model_flops_per_second', 'share_of_peak')
# How far the loss of a step may be, relative to its value, from that of the same step on another
# mesh, as docs/training.md promises.
BETWEEN_MESHES = 1e-5
# The meshes that a state comes from: (the step after which a mesh was used, the mesh), ...
Lineage = tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a process is killed.

  Attributes:
    kind: 'start', from the process' first instruction on; 'restore', from when a checkpoint is
      being read; 'step', from when a step begins; 'writing', while Orbax writes a checkpoint;
      'written', once it is whole and before anything else is done; 'pictures', while a grid is
      drawn and written.
    step: 'step' waits for this one, and 'writing', 'written' and 'pictures' for the first of
      theirs from it on.
    delay: seconds from then on.
    signal: 'SIGKILL' or 'SIGTERM'.
  """

  kind: str
  step: int = 0
  delay: float = 0.0
  signal: str = 'SIGKILL'


KINDS = ('start', 'restore', 'step', 'writing', 'written', 'pictures')


class Starter:
  """Starts processes that train.

  Args:
    folder: what they show, and what is recorded of them, goes there: `NAME.log`, `NAME.jsonl`.
  """

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(_PRELOADED)

  def run(
    self, name: str, arguments, devices: int = 1, moment: Moment | None = None, cached: bool = True
  ) -> int:
    """Runs `parti-jax` with these arguments in a process of its own.

    Args:
      name: of the run; its record goes on where that of its last process ends.
      arguments: of the command line, 'train' and so on.
      devices: how many are emulated.
      moment: when it is killed; None for never.
      cached: whether what earlier processes have compiled may be used.

    Returns:
      Its exit status, -9 for one that was killed.
    """
    task = _Task(
      [str(each) for each in arguments],
      devices,
      moment,
      self.record_file(name),
      self.log_file(name),
      self.folder / 'compiled' if cached else None,
    )
    process = self._context.Process(target=_child, args=(task,), daemon=True)
    process.start()
    process.join()
    return process.exitcode

  def run_killed(
    self, name: str, arguments, model_dir, kills: int, draw: np.random.Generator, ahead: int = 2
  ) -> int:
    """Runs a command to its end, killed at random moments and started again.

    Args:
      name: as in `run`.
      arguments: as in `run`; it must go on where it was.
      model_dir: the run's folder.
      kills: how often it is killed, if it does not end before.
      draw: the moments.
      ahead: as in `random_moment`.

    Returns:
      How often it was killed.

    Raises:
      RuntimeError: if a process ends with another status than 0 or that of its kill.
    """
    killed = 0
    while True:
      moment = None
      if killed < kills:
        moment = random_moment(draw, newest_step(model_dir), ahead)
      status = self.run(name, arguments, moment=moment)
      if status == 0:
        return killed
      if moment is None or status != -signal.SIGKILL:
        raise RuntimeError(f'{name} ended with status {status}; see {self.log_file(name)}')
      killed += 1

  def log_file(self, name: str) -> pathlib.Path:
    """What the processes of a run have shown."""
    return self.folder / f'{name}.log'

  def record_file(self, name: str) -> pathlib.Path:
    """JSON lines of what the processes of a run have done."""
    return self.folder / f'{name}.jsonl'


@dataclasses.dataclass(frozen=True)
class _Task:
  """What a process does: the command line, on how many devices, and what becomes of it."""

  arguments: list[str]
  devices: int
  moment: Moment | None
  record: pathlib.Path
  log: pathlib.Path
  cache: pathlib.Path | None


def _child(task: _Task):
  """What a process does."""
  if sys.platform.startswith('linux'):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  shown = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(shown, 1)
  os.dup2(shown, 2)
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={task.devices}'
  os.chdir(REPOSITORY)
  import jax

  from parti_jax.cli import main

  os.environ['PARTI_JAX_CACHE'] = 'off'
  jax.config.update('jax_compilation_cache_dir', task.cache and str(task.cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  _Recorder(task.record, task.moment).install(mesh(task.arguments, task.devices))
  sys.exit(main.main(task.arguments))


class _Recorder:
  """Writes down what a process does, and kills it."""

  def __init__(self, record, moment: Moment | None):
    self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    self._moment, self._run = moment, None

  def write(self, **values):
    """One line; it is with the system when this returns."""
    os.write(self._record, f'{json.dumps(values)}\n'.encode())

  def install(self, on: str):
    """Puts the recorder into the loop's methods; `on` is the mesh."""
    from parti_jax.checkpoints import checkpoint_manager
    from parti_jax.training import reporting
    from parti_jax.training import run as run_lib
    from parti_jax.training import trainer as trainer_lib

    self.write(starts=os.getpid(), mesh=on)
    self._kill_at('start')
    init, advance, save = run_lib.Run.__init__, run_lib.Run.advance, run_lib.Run.save
    put, restore = trainer_lib.Trainer.put, checkpoint_manager.Checkpoints.restore
    metrics, pictures = reporting.Reporter.metrics, reporting.Reporter.pictures

    def recorded_init(run, trainer, model_dir, *args, **kwargs):
      self._run, self._checkpoints = run, pathlib.Path(model_dir) / 'checkpoints'
      init(run, trainer, model_dir, *args, **kwargs)
      self.write(begins=run.step)

    def recorded_advance(run, *args, **kwargs):
      self._kill_at('step', run.step)
      return advance(run, *args, **kwargs)

    def recorded_put(trainer, batch, *args, **kwargs):
      self.write(step=self._run.step + 1, batch=digest(batch))
      return put(trainer, batch, *args, **kwargs)

    def recorded_metrics(reporter, step, values):
      self.write(step=step, metrics=values)
      metrics(reporter, step, values)

    def recorded_save(run, *args, **kwargs):
      self._kill_at(
        'writing',
        run.step,
        lambda: any('checkpoint-tmp' in path.name for path in self._checkpoints.iterdir()),
      )
      self._kill_at('written', run.step, (self._checkpoints / str(run.step)).is_dir)
      save(run, *args, **kwargs)

    def killed(kind, function):
      def then(*args, **kwargs):
        self._kill_at(kind, self._run.step if kind == 'pictures' else 0)
        return function(*args, **kwargs)

      return then

    run_lib.Run.__init__, run_lib.Run.advance = recorded_init, recorded_advance
    run_lib.Run.save, trainer_lib.Trainer.put = recorded_save, recorded_put
    checkpoint_manager.Checkpoints.restore = killed('restore', restore)
    reporting.Reporter.metrics = recorded_metrics
    reporting.Reporter.pictures = killed('pictures', pictures)

  def _kill_at(self, kind: str, step: int = 0, condition=lambda: True):
    """Sets off the kill, if this is its moment."""
    moment = self._moment
    if moment is None or moment.kind != kind:
      return
    if kind not in ('start', 'restore') and step < moment.step:
      return
    self._moment = None

    def kill():
      while not condition():
        time.sleep(0.0005)
      time.sleep(moment.delay)
      self.write(killed=moment.kind, step=step)
      os.kill(os.getpid(), signal.Signals[moment.signal])

    threading.Thread(target=kill, daemon=True).start()


def digest(arrays: dict) -> str:
  """Hexadecimal digest of named arrays."""
  found = hashlib.sha256()
  for name in sorted(arrays):
    found.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
  return found.hexdigest()[:16]


def random_moment(draw: np.random.Generator, step: int, ahead: int) -> Moment:
  """A moment for a process that begins at `step`, within about `ahead` steps of it.

  Delays are drawn over what each kind takes on a slow machine, small ones as often as large ones.
  """
  # Before the first checkpoint there is none to restore.
  kind = str(draw.choice([kind for kind in KINDS if step or kind != 'restore']))
  longest = {
    'start': 3.0,
    'restore': 0.3,
    'step': 0.05,
    'writing': 0.2,
    'written': 0.02,
    'pictures': 0.05,
  }[kind]
  return Moment(kind, step + int(draw.integers(ahead + 1)), longest * float(draw.random()) ** 2)


def newest_step(model_dir) -> int:
  """Steps of a run's newest whole checkpoint; 0 without one."""
  folder = pathlib.Path(model_dir) / 'checkpoints'
  if not folder.is_dir():
    return 0
  return max([int(path.name) for path in folder.iterdir() if path.name.isdecimal()], default=0)


def records(path) -> list[dict]:
  """Lines of a record; the last one may have been cut short by a kill."""
  found = []
  for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines():
    try:
      found.append(json.loads(line))
    except ValueError:
      pass
  return found


def mesh(arguments: list[str], devices: int) -> str:
  """The devices and the mesh of a command line, as one text."""
  ways = [each.removeprefix('--gin.make_mesh.') for each in arguments if 'make_mesh.' in each]
  return ' '.join([f'{devices} devices', *(way.replace(' ', '') for way in ways)])


def lineages(lines: list[dict]) -> list[Lineage]:
  """The lineage of the state after each line of a record.

  A start continues the lineage of the checkpoint that it begins with. Where that was written on
  another mesh, a start that goes back behind the change gives its steps a lineage of their own.
  """
  found, now, on, saved = [], (), '', {}
  for line in lines:
    if 'starts' in line:
      on = line.get('mesh', '')
    elif 'begins' in line:
      now = saved.get(line['begins'], ())
      if not now or now[-1][1] != on:
        now = (*now, (line['begins'], on))
    elif 'batch' in line:
      saved[line['step']] = now
    found.append(now)
  return found


def by_step(lines: list[dict]) -> dict[tuple[int, str, Lineage], set]:
  """(step, name, lineage) -> its values in a record, as text that tells every bit of a float.

  A run that is the same whenever it is started has one value for each, however often the step was
  done.
  """
  values: dict[tuple[int, str, Lineage], set] = {}
  for line, lineage in zip(lines, lineages(lines)):
    if 'batch' in line:
      values.setdefault((line['step'], 'batch', lineage), set()).add(line['batch'])
    for name, value in line.get('metrics', {}).items():
      if name not in TIMES:
        values.setdefault((line['step'], name, lineage), set()).add(float(value).hex())
  return values


def differences(folder, other, record, other_record) -> list[str]:
  """What differs between two runs that should be the same, one line for each difference.

  Compared are the newest checkpoints' arrays and place in the data, every batch and metric of
  every step, what TensorBoard shows, and the pictures' files.

  Args:
    folder: of the undisturbed run. It has done each step on each mesh that the other has.
    other: of the disturbed run.
    record: file of what the first has done.
    other_record: of what the other has done.
  """
  found = _different_checkpoints(folder, other)
  found += different_steps(records(record), records(other_record))
  here, there = scalars(folder), scalars(other)
  found += [
    f'TensorBoard, {name}: {here.get(name)} and {there.get(name)}'
    for name in sorted(here.keys() | there.keys())
    if here.get(name) != there.get(name)
  ]
  here, there = _pictures(folder), _pictures(other)
  return found + [
    f'pictures/{name} differs'
    for name in sorted(here.keys() | there.keys())
    if here.get(name) != there.get(name)
  ]


def different_steps(lines: list[dict], other_lines: list[dict]) -> list[str]:
  """What differs between the records of an undisturbed and a disturbed run.

  Args:
    lines: of the undisturbed run.
    other_lines: of the disturbed run.
  """
  here, there = by_step(lines), by_step(other_lines)
  final = lineages(other_lines)[-1] if other_lines else ()
  led_to_it = {
    (step, name)
    for step, name, lineage in there
    if lineage == tuple(part for part in final if part[0] < step)
  }
  found = [
    f'{step}/{name} is missing' for step, name in sorted({key[:2] for key in here} - led_to_it)
  ]
  for (step, name, lineage), others in sorted(there.items()):
    values = here.get((step, name, lineage), set())
    if values != others or len(values) != 1:
      found.append(f'{step}/{name} {_words(lineage)}: {sorted(values)} and {sorted(others)}')
  return found + _different_meshes(there)


def _different_meshes(values: dict[tuple[int, str, Lineage], set]) -> list[str]:
  """Losses of the first step on another mesh that are not near enough to those on the first one."""
  found = []
  for (step, name, lineage), there in sorted(values.items()):
    here = values.get((step, name, lineage[:-1]))
    if name != 'loss' or here is None or step != lineage[-1][0] + 1:
      continue
    loss, other = (float.fromhex(next(iter(each))) for each in (here, there))
    if not abs(other - loss) <= BETWEEN_MESHES * abs(loss):
      found.append(f'{step}/{name} {_words(lineage)}: {other}, but {loss} on the mesh before')
  return found


def _words(lineage: Lineage) -> str:
  return ', '.join(f'after {step} on {on}' for step, on in lineage)


def _different_checkpoints(folder, other) -> list[str]:
  steps = newest_step(folder), newest_step(other)
  if steps[0] != steps[1] or not steps[0]:
    return [f'the newest checkpoints are of steps {steps[0]} and {steps[1]}']
  (here, place), (there, other_place) = (read_checkpoint(run, steps[0]) for run in (folder, other))
  found = []
  if place != other_place:
    found.append(f'the place in the data is {place} and {other_place}')
  if here.keys() != there.keys():
    found.append(f'only one checkpoint has {sorted(here.keys() ^ there.keys())}')
  for name in sorted(here.keys() & there.keys()):
    bits = different_bits(here[name], there[name])
    if bits:
      found.append(f'{name} differs in {bits} of {8 * here[name].nbytes} bits')
  return found


def read_checkpoint(model_dir, step: int):
  """A checkpoint's arrays by name, and its place in the data."""
  import jax
  import orbax.checkpoint as ocp

  path = (pathlib.Path(model_dir) / 'checkpoints' / str(step)).absolute()
  with ocp.PyTreeCheckpointer() as checkpointer:
    structure = checkpointer.metadata(path / 'state').item_metadata.tree
    # As numpy arrays, whatever the devices that they were saved from.
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    state = checkpointer.restore(path / 'state', restore_args=arguments)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    place = checkpointer.restore(path / 'data')
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}, place


def different_bits(array: np.ndarray, other: np.ndarray) -> int:
  """How many bits differ; all of them in arrays of another shape or dtype."""
  if array.shape != other.shape or array.dtype != other.dtype:
    return 8 * max(array.nbytes, other.nbytes)
  bytes_, others = (np.frombuffer(each.tobytes(), np.uint8) for each in (array, other))
  return int(np.unpackbits(bytes_ ^ others).sum())


def scalars(folder) -> dict[str, list[tuple[int, str]]]:
  """What TensorBoard shows of a run: tag -> (step, value) in order, without measures of time."""
  from tensorboard.backend.event_processing import plugin_event_accumulator
  from tensorboard.util import tensor_util

  events = plugin_event_accumulator.EventAccumulator(
    str(pathlib.Path(folder) / 'tensorboard'), size_guidance={plugin_event_accumulator.TENSORS: 0}
  ).Reload()
  found = {}
  for tag in events.Tags()['tensors']:
    if tag in TIMES:
      continue
    values = [
      (event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)
    ]
    found[tag] = [
      (step, value.tobytes().hex() if not value.shape else _digest_of_list(value))
      for step, value in values
    ]
  return found


def _digest_of_list(encoded: np.ndarray) -> str:
  return hashlib.sha256(b''.join(encoded.tolist())).hexdigest()[:16]


def _pictures(folder) -> dict[str, bytes]:
  return {
    path.name: path.read_bytes() for path in sorted((pathlib.Path(folder) / 'pictures').glob('*'))
  }
