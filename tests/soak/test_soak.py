"""What the soak compares, with runs that are only played: a number stands for the whole state."""

import json
import pathlib
import shutil

import killed_runs
import numpy as np
import pytest
import soak

# What a mesh adds to a step: its rounding.
_ROUNDING = {
  '4 devices data=4': 1e-9,
  '1 devices': 2e-9,
  '4 devices fsdp=2 tensor=2': 3e-9,
  '2 devices tensor=2': 4e-9,
}


class _Player:
  """Plays a run: steps on a mesh from the newest whole checkpoint, killed where a moment says so.

  Args:
    folder: of the records.
    fault: changes the state of the disturbed run after a step, (state, step) -> state.
  """

  def __init__(self, folder, fault=lambda state, step: state):
    self._folder, self._fault = folder, fault
    self.damaged = set()

  def record_file(self, name):
    return self._folder / f'{name}.jsonl'

  def log_file(self, name):
    return self._folder / f'{name}.log'

  def run(self, name, arguments, devices=1, moment=None):
    flags = dict(
      each.removeprefix('--gin.').replace('--', '').split('=', 1)
      for each in arguments
      if '=' in each
    )
    steps, every = int(flags['train.steps ']), int(flags['train.checkpoint_every '])
    folder = pathlib.Path(flags['model_dir']) / 'checkpoints'
    folder.mkdir(parents=True, exist_ok=True)
    whole = [
      int(path.name)
      for path in folder.iterdir()
      if json.loads((path / 'state').read_text()) is not None
    ]
    step = max(whole, default=0)
    state = json.loads((folder / str(step) / 'state').read_text()) if step else 1.0
    for path in folder.iterdir():  # Those that are damaged.
      if int(path.name) > step:
        shutil.rmtree(path)
    mesh = killed_runs.mesh(arguments, devices)
    lines = [{'starts': 1, 'mesh': mesh}, {'begins': step}]
    while step < steps and not (moment and step >= moment.step):
      step += 1
      state = state * 1.01 + _ROUNDING[mesh]
      if 'disturbed' in name:
        state = self._fault(state, step)
      lines += [{'step': step, 'batch': str(step)}, {'step': step, 'metrics': {'loss': state}}]
      if step % every == 0:
        (folder / str(step)).mkdir()
        (folder / str(step) / 'state').write_text(json.dumps(state))
        for path in folder.iterdir():
          if int(path.name) <= step - every * int(flags['train.keep_checkpoints ']):
            shutil.rmtree(path)
    with open(self.record_file(name), 'a', encoding='utf-8') as file:
      file.write(''.join(json.dumps(line) + '\n' for line in lines))
    return 0 if step == steps else -9


@pytest.fixture(name='played')
def _played(tmp_path, monkeypatch):
  """Plays four segments; `damage` says of which starts of the disturbed run a file is damaged."""

  def read(model_dir, step):
    text = (pathlib.Path(model_dir) / 'checkpoints' / str(step) / 'state').read_text()
    return {'state': np.float64(json.loads(text)).reshape(1)}, {}

  monkeypatch.setattr(killed_runs, 'read_checkpoint', read)
  monkeypatch.setattr(killed_runs, 'scalars', lambda folder: {})

  def play(damage=(), fault=lambda state, step: state):
    played = soak.Soak(tmp_path, seed=0, kills=3)
    played._starter = _Player(tmp_path, fault)

    def damaged(model_dir, _):
      steps = played._whole_steps(model_dir)
      if played.state['starts'] in damage and len(steps) > 1:
        played.state['damaged'] = [*played.state['damaged'], steps[0]]
        played.state['damaged_checkpoints'] += 1
        (model_dir / 'checkpoints' / str(steps[0]) / 'state').write_text('null')

    monkeypatch.setattr(played, '_damage', damaged)
    monkeypatch.setattr(soak, '_DAMAGED_SHARE', 1.0)
    while played.state['segment'] < 4 and not played.state['differences']:
      played._segment()
    return played

  return play


def test_without_damage_nothing_differs(played):
  report = played().report()
  assert report['differences'] == [] and report['bits_different'] == 0
  assert report['segments'] == 4 and report['SIGKILL'] + report['SIGTERM'] == 12


def test_damage_at_the_border_of_two_meshes_is_no_difference(played):
  # Each segment has four starts. The fifth and sixth begin behind the border of the first two.
  found = played(damage=(4, 5, 12))
  report = found.report()
  assert report['damaged_checkpoints'] == 3
  begins = [
    line['begins']
    for line in killed_runs.records(found.folder / 'disturbed_tokenizer.jsonl')
    if 'begins' in line
  ]
  assert begins[4] == 20 and begins[5] == 16 and begins[12] == 68, begins
  assert report['differences'] == [] and report['bits_different'] == 0


@pytest.mark.parametrize('damage', [(), (4, 5)])
@pytest.mark.parametrize('wrong', [2, 30])
def test_one_bit_is_a_difference(played, damage, wrong):
  def flip(state, step):
    return np.nextafter(state, 2 * state).item() if step == wrong else state

  report = played(damage, flip).report()
  assert any(line.startswith(f'{wrong}/loss') for line in report['differences'])
  assert report['bits_different'] > 0 and not report['losses_equal']


def _lines(*runs):
  """A record of runs (mesh, first step, losses)."""
  lines = []
  for mesh, begins, losses in runs:
    lines += [{'starts': 1, 'mesh': mesh}, {'begins': begins}]
    for step, loss in enumerate(losses, begins + 1):
      lines += [{'step': step, 'batch': 'b'}, {'step': step, 'metrics': {'loss': loss}}]
  return lines


def test_steps_done_again_on_another_mesh_must_be_near():
  for loss, differs in ((2.0 + 1e-6, False), (2.0 + 1e-3, True), (float('nan'), True)):
    lines = _lines(('a', 0, [1.0, 2.0]), ('b', 2, [3.0]), ('b', 1, [loss, 3.0]))
    found = killed_runs.different_steps(lines, lines)
    assert [line.startswith('2/loss after 0 on a, after 1 on b') for line in found] == (
      [True] if differs else []
    )


def test_a_step_that_is_missing_or_differs_from_itself_is_a_difference():
  whole = _lines(('a', 0, [1.0, 2.0]), ('b', 2, [3.0]))
  assert killed_runs.different_steps(whole, whole) == []
  for other in (
    _lines(('a', 0, [1.0, 2.0])),
    _lines(('a', 0, [1.0]), ('b', 1, [2.0, 3.0])),
    whole + _lines(('b', 2, [3.5])),
  ):
    assert killed_runs.different_steps(whole, other)
  assert killed_runs.different_steps(whole + _lines(('b', 2, [3.5])), whole)
