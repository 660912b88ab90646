"""Trains under random kills, damaged checkpoints and changing meshes, and compares bit for bit.

  python tests/soak/soak.py --minutes=15 --work_dir=runs/soak

Trains the chain of docs/training.md on OpenMoji with the tiny models: an image tokenizer, the tokens of
all pictures, a generator. There are two runs of each. Both train in segments, each with a mesh of
its own. One is left alone. The other is killed at random moments (SIGKILL, or SIGTERM as before a
preemption), and between two starts a file of its newest checkpoint may be cut, changed or removed,
if there is an older one that is whole. At the end of each segment everything is compared:
checkpoints, every batch and metric of every step, what TensorBoard shows, and pictures.

Where damage sends the disturbed run back to a checkpoint of the segment before, it does the last
steps of that segment again on another mesh, and what follows is the same only to rounding. Then the
undisturbed run goes back to the same checkpoint too, and both are again the same bit for bit.

Ends at the first end of a segment after the given time, or at once where something differs, with
status 1. Stopped and started again with the same --work_dir, it resumes. The report is in
`report.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import signal
import sys
import time

import killed_runs
import numpy as np

# The exit status of a run that was asked to stop and has saved; SIGTERM before it listens.
TOLD_TO_STOP = (75, -signal.SIGTERM)
STEPS = 24  # Of a segment.
TOKENIZER_SEGMENTS = 4
# Devices and mesh of one segment after the other.
MESHES = {
  'tokenizer': [(4, ['data=4']), (1, []), (4, ['fsdp=2', 'tensor=2']), (2, ['tensor=2'])],
  'generator': [(1, []), (4, ['fsdp=2', 'tensor=2']), (2, ['stage=2']), (4, ['data=4'])],
}
_SCHEDULE = [
  'train.log_every = 1',
  'train.checkpoint_every = 4',
  'train.pictures_every = 9',
  'train.evaluate_every = 12',
  "train.eval_split = 'validation'",
  'train.seed = 7',
]
# The undisturbed run keeps every checkpoint that the other may be sent back to.
_KEPT = {'whole': 12, 'disturbed': 3}
_OBJECTIVE_BINDINGS = {
  'tokenizer': ["train.task = 'openmoji_images'", 'TokenizerObjective.revive_every = 5'],
  'generator': ["train.task = 'openmoji_tokens'", 'drop_text.rate = 0.1'],
}
_GIN_FILES = {
  'tokenizer': ['runs/tiny_adversarial_tokenizer.gin', 'tasks/openmoji.gin'],
  'generator': ['runs/tiny_generator.gin', 'tasks/openmoji.gin'],
}
_DAMAGE = ('cut', 'changed', 'removed')
_DAMAGED_SHARE = 0.3  # Of the starts that are killed, those before which a file is damaged.
_COUNTS = (
  'starts',
  'SIGKILL',
  'SIGTERM',
  'damaged_checkpoints',
  'segments',
  'meshes',
  'checkpoints_compared',
  'bits_compared',
  'bits_different',
)


class Soak:
  """Two runs of a chain, one of which is disturbed.

  Args:
    folder: where everything is, and from where an earlier soak resumes.
    seed: of what is done to the disturbed run.
    kills: how often each segment is disturbed.
  """

  def __init__(self, folder: pathlib.Path, seed: int, kills: int):
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self._seed, self._kills = folder.absolute(), seed, kills
    self._starter = killed_runs.Starter(self.folder)
    # `damaged` are steps whose checkpoints no start has found damaged yet.
    self.state = {
      'seconds': 0.0,
      'segment': 0,
      'killed': 0,
      'whole': 'to begin',
      'damaged': [],
      'differences': [],
      **dict.fromkeys(_COUNTS, 0),
    }
    if self._state_file.exists():
      self.state |= json.loads(self._state_file.read_text(encoding='utf-8'))

  @property
  def _state_file(self) -> pathlib.Path:
    return self.folder / 'state.json'

  def run(self, seconds: float):
    """Goes on for this many seconds of soaking, those of earlier starts with it."""
    while self.state['seconds'] < seconds and not self.state['differences']:
      self._segment()

  def report(self) -> dict:
    """What was done and found."""
    done_again, lost, most = self._lost()
    counts = {name: self.state[name] for name in _COUNTS}
    return {
      'minutes': round(self.state['seconds'] / 60, 1),
      **counts,
      'steps': self._steps_done(),
      'steps_done_again': done_again,
      'steps_lost': lost,
      'most_steps_lost_at_once': most,
      'losses_equal': not self.state['differences'],
      'differences': self.state['differences'],
    }

  def _segment(self):
    """Trains one segment undisturbed, then disturbed, and compares."""
    objective, number = self._place()
    if objective == 'generator' and number == 0:
      self._tokenize()
    if self.state['whole'] == 'begun':
      self._forget_whole(objective)
    if self.state['whole'] != 'done':
      with self._timed():
        self.state['whole'] = 'begun'
      with self._timed():
        self._expect(self._train('whole', None), (0,), 'whole')
        self.state['whole'] = 'done'
    while True:
      with self._timed():
        if self._disturbed_start():
          break
    with self._timed():
      self._follow_back(objective)
    with self._timed():
      self._compare(objective)
      self._keep_whole(objective)
      self.state |= {'segment': self.state['segment'] + 1, 'killed': 0, 'whole': 'to begin'}
      self.state['segments'] += 1
      self.state['meshes'] = min(self.state['segments'], sum(map(len, MESHES.values())))

  def _follow_back(self, objective: str):
    """Lets the undisturbed run go back over a change of mesh where the disturbed one had to.

    Its record keeps what it did before, which is what the disturbed run may have done before.
    """
    border = self._place()[1] * STEPS
    records = [
      killed_runs.records(self._starter.record_file(f'{who}_{objective}'))
      for who in ('whole', 'disturbed')
    ]
    known, wanted = (killed_runs.lineages(lines) for lines in records)
    # A run is sent back further and further, so the last lineage is the one that both end with.
    for lineage in dict.fromkeys(wanted):
      if not lineage or lineage in known or lineage[-1][0] >= border:
        continue
      step, model_dir = lineage[-1][0], self.folder / 'whole' / objective
      self._say(f'{objective}: the disturbed run was sent back to step {step}')
      self._restore_whole(objective)
      checkpoints = model_dir / 'checkpoints'
      if not (checkpoints / str(step)).is_dir():
        raise RuntimeError(f'{checkpoints}: no checkpoint of step {step}')
      for path in checkpoints.iterdir():
        if path.name.isdecimal() and int(path.name) > step:
          shutil.rmtree(path)
      self._expect(self._train('whole', None), (0,), 'whole')

  def _keep_whole(self, objective: str):
    """Keeps a copy of the undisturbed run, for when it has to go back to a segment's beginning."""
    copy, record = self.folder / 'copy' / objective, self._starter.record_file(f'whole_{objective}')
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(self.folder / 'whole' / objective, copy)
    shutil.copy(record, copy.with_suffix('.jsonl'))

  def _forget_whole(self, objective: str):
    """Puts the undisturbed run and its record back to where its last whole segment ended."""
    self._restore_whole(objective)
    record = self._starter.record_file(f'whole_{objective}')
    record.unlink(missing_ok=True)
    kept = (self.folder / 'copy' / objective).with_suffix('.jsonl')
    if kept.exists():
      shutil.copy(kept, record)

  def _restore_whole(self, objective: str):
    """Puts the undisturbed run's folder back to where its last whole segment ended."""
    copy, model_dir = (self.folder / name / objective for name in ('copy', 'whole'))
    shutil.rmtree(model_dir, ignore_errors=True)
    if copy.exists():
      shutil.copytree(copy, model_dir)

  def _disturbed_start(self) -> bool:
    """One start of the disturbed run; whether it came to the segment's end."""
    objective, number = self._place()
    model_dir = self.folder / 'disturbed' / objective
    draw = np.random.default_rng([self._seed, self.state['starts']])
    moment = None
    if self.state['killed'] < self._kills:
      if draw.random() < _DAMAGED_SHARE:
        self._damage(model_dir, draw)
      moment = killed_runs.random_moment(draw, self._whole_steps(model_dir)[0], ahead=2)
      if draw.random() < 0.25:
        moment = dataclasses.replace(moment, signal='SIGTERM')
    newest, before = self._whole_steps(model_dir)[0], len(self._begins(objective))
    status = self._train('disturbed', moment)
    begins = self._begins(objective)[before:]
    if begins:
      self.state['damaged'] = []
      if begins != [newest]:
        self._differs(
          f'{objective}: began at step {begins[0]}, and not at {newest}, its newest whole checkpoint'
        )
    if status == 0:
      return killed_runs.newest_step(model_dir) == (number + 1) * STEPS
    self._expect(status, (-signal.SIGKILL, *TOLD_TO_STOP), 'disturbed')
    self.state['killed'] += 1
    self.state['SIGKILL' if status == -signal.SIGKILL else 'SIGTERM'] += 1
    return False

  def _whole_steps(self, model_dir) -> list[int]:
    """Steps of the disturbed run's whole checkpoints, the newest first; 0 is the beginning."""
    names = [path.name for path in (model_dir / 'checkpoints').glob('*')]
    steps = {int(name) for name in names if name.isdecimal()} - set(self.state['damaged'])
    return sorted(steps, reverse=True) or [0]

  def _damage(self, model_dir, draw: np.random.Generator):
    """Damages the newest whole checkpoint, if there is an older one."""
    steps = self._whole_steps(model_dir)
    if len(steps) < 2:
      return
    with self._timed():  # It is known before it is done.
      self.state['damaged'] = [*self.state['damaged'], steps[0]]
      self.state['damaged_checkpoints'] += 1
    folder = model_dir / 'checkpoints' / str(steps[0])
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.stat().st_size)
    file, kind = files[draw.integers(len(files))], str(draw.choice(_DAMAGE))
    data = bytearray(file.read_bytes())
    if kind == 'removed':
      file.unlink()
    elif kind == 'cut':
      file.write_bytes(data[: draw.integers(len(data))])
    else:
      data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
      file.write_bytes(data)
    self._say(f'{file.relative_to(model_dir)} {kind}')

  def _tokenize(self):
    """Writes the tokens of all pictures for both runs, once killed on the way for the disturbed."""
    for who in ('whole', 'disturbed'):
      if (self.folder / who / 'tokens' / 'done').exists():
        continue
      arguments = [
        'tokenize',
        '--gin_file=gin_configs/tasks/openmoji.gin',
        f"--gin.openmoji.data_dir='{self.folder}/openmoji'",
        f'--tokenizer={self.folder}/{who}/tokenizer',
        f'--output_dir={self.folder}/{who}/tokens',
      ]
      status = -signal.SIGKILL
      if who == 'disturbed':
        moment = killed_runs.Moment('start', delay=2.0)
        status = self._starter.run(f'{who}_tokens', arguments, moment=moment)
      if status != 0:
        self._expect(self._starter.run(f'{who}_tokens', arguments), (0,), f'{who}_tokens')
      (self.folder / who / 'tokens' / 'done').touch()
    files = [
      {path.name: path.read_bytes() for path in (self.folder / who / 'tokens').iterdir()}
      for who in ('whole', 'disturbed')
    ]
    if files[0] != files[1]:
      self._differs('the image tokens differ')

  def _train(self, who: str, moment) -> int:
    """Starts one of the runs; returns its status."""
    objective, number = self._place()
    devices, mesh = MESHES[objective][number % len(MESHES[objective])]
    bindings = [
      f"openmoji.data_dir = '{self.folder}/openmoji'",
      *_SCHEDULE,
      *_OBJECTIVE_BINDINGS[objective],
      f'train.steps = {(number + 1) * STEPS}',
      f'train.keep_checkpoints = {_KEPT[who]}',
      *(f'make_mesh.{way.replace("=", " = ")}' for way in mesh),
    ]
    if objective == 'generator':
      bindings += [
        f"token_cache.path = '{self.folder}/{who}/tokens'",
        f"GeneratorObjective.tokenizer = '{self.folder}/{who}/tokenizer'",
      ]
    model_dir = self.folder / who / objective
    self.state['starts'] += who == 'disturbed'
    status = self._starter.run(
      f'{who}_{objective}',
      [
        'train',
        *(f'--gin_file=gin_configs/{file}' for file in _GIN_FILES[objective]),
        f'--model_dir={model_dir}',
        *(f'--gin.{binding}' for binding in bindings),
      ],
      devices,
      moment,
    )
    what = f', {moment.kind} {moment.step} + {moment.delay:.3f} s' if moment else ''
    self._say(
      f'{who} {objective}, segment {number}{what}: status {status}, '
      f'step {killed_runs.newest_step(model_dir)}'
    )
    return status

  def _compare(self, objective: str):
    """Compares both runs, and keeps what differs."""
    runs = [self.folder / who / objective for who in ('whole', 'disturbed')]
    records = [self._starter.record_file(f'{who}_{objective}') for who in ('whole', 'disturbed')]
    found = killed_runs.differences(*runs, *records)
    states = [killed_runs.read_checkpoint(run, killed_runs.newest_step(run))[0] for run in runs]
    self.state['checkpoints_compared'] += 1
    self.state['bits_compared'] += sum(8 * leaf.nbytes for leaf in states[0].values())
    self.state['bits_different'] += sum(
      killed_runs.different_bits(leaf, states[1][name])
      for name, leaf in states[0].items()
      if name in states[1]
    )
    self._say(f'compared: {len(found)} differences')
    self.state['differences'] += found

  def _place(self) -> tuple[str, int]:
    """The present objective, and the number of its segment."""
    number = self.state['segment']
    if number < TOKENIZER_SEGMENTS:
      return 'tokenizer', number
    return 'generator', number - TOKENIZER_SEGMENTS

  def _begins(self, objective: str) -> list[int]:
    """The steps at which the starts of the disturbed run began to train."""
    file = self._starter.record_file(f'disturbed_{objective}')
    lines = killed_runs.records(file) if file.exists() else []
    return [line['begins'] for line in lines if 'begins' in line]

  def _lost(self) -> tuple[int, int, int]:
    """Steps done again, and steps that starts began behind the furthest: their sum and the most."""
    done_again, losses = 0, [0]
    for objective in MESHES:
      file, done, furthest = self._starter.record_file(f'disturbed_{objective}'), [], 0
      for line in killed_runs.records(file) if file.exists() else []:
        if 'begins' in line:
          losses.append(max(0, furthest - line['begins']))
          furthest = line['begins']
        elif 'batch' in line:
          done.append(line['step'])
          furthest = line['step']
      done_again += len(done) - len(set(done))
    return done_again, sum(losses), max(losses)

  def _steps_done(self) -> int:
    return sum(
      killed_runs.newest_step(self.folder / 'disturbed' / objective) for objective in MESHES
    )

  def _expect(self, status: int, wanted, name: str):
    if status not in wanted:
      log = self._starter.log_file(
        name if name.endswith('tokens') else f'{name}_{self._place()[0]}'
      )
      raise RuntimeError(f'status {status}; see {log}')

  def _differs(self, what: str):
    self.state['differences'].append(what)

  def _timed(self):
    return _Timed(self.state, self._state_file)

  def _say(self, line: str):
    print(f'{self.state["seconds"] / 60:5.1f} min: {line}', flush=True)


class _Timed:
  """Adds the time that is spent within to the state, and writes it."""

  def __init__(self, state: dict, file: pathlib.Path):
    self._state, self._file = state, file

  def __enter__(self):
    self._start = time.monotonic()

  def __exit__(self, *error):
    self._state['seconds'] += time.monotonic() - self._start
    if error[0] is None:
      unfinished = self._file.with_suffix('.unfinished')
      unfinished.write_text(json.dumps(self._state, indent=2), encoding='utf-8')
      unfinished.replace(self._file)


def main() -> int:
  """Soaks; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--minutes', type=float, default=15, help='how long (default: %(default)s)')
  parser.add_argument(
    '--work_dir',
    required=True,
    type=pathlib.Path,
    help='folder of both runs; an earlier soak in it resumes',
  )
  parser.add_argument(
    '--kills',
    type=int,
    default=6,
    help='how often each segment is disturbed (default: %(default)s)',
  )
  parser.add_argument('--seed', type=int, default=0, help='of what is done to the disturbed run')
  args = parser.parse_args()
  soak = Soak(args.work_dir, args.seed, args.kills)
  soak.run(args.minutes * 60)
  report = soak.report()
  print(json.dumps(report, indent=2))
  (args.work_dir / 'report.json').write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
  return 1 if report['differences'] or report['bits_different'] else 0


if __name__ == '__main__':
  sys.exit(main())
