"""Tests a run's journal, including its contents after errors, a full disk and a torn line."""

import json
import pathlib
import re

import pytest

import parti_jax
from parti_jax.core import storage
from parti_jax.runs import environment
from parti_jax.runs import history
from parti_jax.runs import journal as journal_lib


def _records(folder):
  (file,) = sorted((folder / 'journal').iterdir())
  return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def test_each_line_is_on_the_disk_at_once(tmp_path):
  journal = journal_lib.Journal(tmp_path)
  assert not list(tmp_path.iterdir())
  journal.write('lock', 'the lock of a process that is gone was taken over', host='a', pid=3)
  assert len(_records(tmp_path)) == 1
  journal.write('odd', value=float('nan'), where=tmp_path)
  first, second = _records(tmp_path)
  assert list(first) == ['time', 'text', 'event', 'host', 'pid']
  assert first['event'] == 'lock' and first['pid'] == 3
  assert second['text'] == f'odd, value nan, where {tmp_path}'


@pytest.mark.parametrize(
  'error, reason, text',
  [
    (None, 'finished', 'ended at step 7: nothing is left to train'),
    (SystemExit(75), 'asked to stop', 'ended at step 7: asked to stop, ends with status 75'),
    (KeyboardInterrupt(), 'interrupted', 'ended at step 7: interrupted from the keyboard'),
    (ValueError('two\nlines'), 'error', 'ended at step 7: ValueError: two lines'),
  ],
)
def test_the_end_of_a_run_is_written(tmp_path, error, reason, text):
  def run():
    with journal_lib.Journal(tmp_path) as journal:
      journal.write('start')
      journal.step = 7
      if error:
        raise error

  if error:
    with pytest.raises(type(error)):
      run()
  else:
    run()
  last = _records(tmp_path)[-1]
  assert (last['event'], last['reason'], last['text'], last['step']) == ('stop', reason, text, 7)


def test_an_error_before_a_run_exists_leaves_nothing(tmp_path):
  with pytest.raises(ValueError), journal_lib.Journal(tmp_path):
    raise ValueError('a mesh that does not fit')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError), journal_lib.Journal(tmp_path):
    raise ValueError('a mesh that does not fit')
  assert 'a mesh that does not fit' in _records(tmp_path)[0]['text']


def test_a_full_disk_does_not_end_a_run(tmp_path, capsys):
  (tmp_path / 'journal').write_text('')  # Writing fails because the folder is a file.
  journal = journal_lib.Journal(tmp_path)
  journal.write('start')
  journal.write('checkpoint')
  complaint = capsys.readouterr().err
  assert complaint.count("can't be written") == 1 and journal.name in complaint
  (tmp_path / 'journal').unlink()
  journal.write('stop')
  assert [record['event'] for record in _records(tmp_path)] == ['start', 'checkpoint', 'stop']


def test_each_config_is_kept_once(tmp_path):
  names = []
  for text in ('a = 1\n', 'a = 1\n', 'a = 2\n'):
    journal = journal_lib.Journal(tmp_path)
    journal.start('starts', text, step=0)
    (line,) = (tmp_path / 'journal' / f'{journal.name}.jsonl').read_text().splitlines()
    names.append(json.loads(line)['config'])
  assert names[0] == names[1] != names[2]
  assert [(tmp_path / name).read_text() for name in names[1:]] == ['a = 1\n', 'a = 2\n']
  assert (tmp_path / 'config.gin').read_text() == 'a = 2\n'


def test_on_a_store_files_are_rewritten(tmp_path):
  folder = f'memory:///{tmp_path.name}'
  with journal_lib.Journal(folder) as journal:
    journal.start('starts', 'a = 1\n', step=3)
    journal.write('odd')
  (start,) = history.read(folder).starts
  assert [record['event'] for record in start.records] == ['start', 'odd', 'stop']
  assert (start.name, start.first_step) == (journal.name, 3)
  assert storage.names(folder) == ['config.gin', 'configs', 'journal']


def test_the_commit_of_a_checkout():
  top = pathlib.Path(parti_jax.__file__).parents[1]
  found = environment.git_revision()
  if not (top / '.git').exists():
    assert found is None
  else:
    assert re.fullmatch('[0-9a-f]{40}', found['revision'])
    assert isinstance(found['uncommitted'], bool)


def test_progress_is_written_at_intervals(tmp_path, monkeypatch):
  clock = [100.0]
  monkeypatch.setattr(journal_lib.time, 'monotonic', lambda: clock[0])
  journal = journal_lib.Journal(tmp_path)
  for step in range(20_000):
    journal.progress(step, {'loss': 1.0, 'psnr': 2.0})
    clock[0] += 5.0
  records = _records(tmp_path)
  assert [record['step'] for record in records[:4]] == [0, 2, 4, 6]
  assert records[-1]['step'] - records[-2]['step'] == 120  # Ten minutes.
  assert records[0]['loss'] == 1.0 and 'psnr' not in records[0]
  assert len(records) < 250


def test_the_environment_has_no_secrets(monkeypatch):
  monkeypatch.setenv('JAX_TRACEBACK_FILTERING', 'off')
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'hidden')
  monkeypatch.setattr(environment.sys, 'argv', ['parti-jax', 's3://me:hidden@host/a b'])
  found = environment.describe()
  assert found['environment']['JAX_TRACEBACK_FILTERING'] == 'off'
  assert 'hidden' not in json.dumps(found)
  assert found['command'] == "parti-jax 's3://***@host/a b'"
  assert {
    'parti_jax',
    'python',
    'jax',
    'jaxlib',
    'flax',
    'orbax-checkpoint',
    'numpy',
    'tensorflow',
    'seqio',
  } <= set(found['versions'])
  assert found['devices'] == {'kind': 'cpu', 'count': 8, 'platform': 'cpu'}


def test_the_last_progress_is_written_at_the_end(tmp_path):
  with journal_lib.Journal(tmp_path) as journal:
    for step in (10, 20, 30):
      journal.progress(step, {'loss': 1 / step})
  records = _records(tmp_path)
  assert [record['event'] for record in records] == ['progress', 'progress', 'stop']
  assert (records[1]['step'], records[1]['loss']) == (30, 1 / 30)
