"""Tests `parti-jax info` on runs with handwritten journals, models and other folders."""

import json
import pathlib

import pytest
from etils import epath

import parti_jax
from parti_jax.checkpoints import manifest
from parti_jax.cli import info
from parti_jax.cli import info_text
from parti_jax.cli import main
from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.runs import journal as journal_lib
from parti_jax.runs import run_lock

DEMO = pathlib.Path(parti_jax.__file__).parent / 'demo'
VERSIONS = {'parti_jax': '0.1.0', 'jax': '0.10.2'}


def _start(folder, time, *records, host='a-1', pid=7, suffix='', torn=''):
  """Writes a journal of one start; a record is (time, event, text, facts)."""
  day = time.replace('-', '').replace(':', '').replace(' ', 'T')
  path = folder / 'journal' / f'{day}.000Z-{host}-{pid}{suffix}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    json.dumps({'time': time, 'text': text, 'event': event, **facts})
    for time, event, text, facts in records
  ]
  path.write_text('\n'.join(lines) + '\n' + torn)


def _begun(step, data=8, **facts):
  return {
    'step': step,
    'steps': 1000,
    'stage': 'generator',
    'objective': 'MyObjective',
    'parameters': 4_032_576,
    'mesh': {'stage': 1, 'data': data, 'fsdp': 1, 'tensor': 1},
    'processes': 1,
    'devices': {'kind': 'cpu', 'count': data, 'platform': 'cpu'},
    'versions': VERSIONS,
    'git': {'revision': '0123456789abcdef', 'uncommitted': False},
    'batch_size': 8,
    'config': 'configs/a.gin',
    'command': 'parti-jax train',
    **facts,
  }


def _a_run_with_a_history(folder):
  """A run killed at 130 or later, resumed at 100 on another mesh, refused, then failed at 420."""
  _start(
    folder,
    '2026-01-01 10:00:00',
    ('2026-01-01 10:00:00', 'start', 'starting at step 0', _begun(0)),
    ('2026-01-01 10:01:00', 'checkpoint', 'writing a checkpoint of step 100', {'step': 100}),
    ('2026-01-01 10:01:00', 'skipped', '', {'counts': {'damaged picture': 1}}),
    ('2026-01-01 10:01:20', 'progress', 'step 130', {'step': 130, 'loss': 2.5}),
    torn='{"time": "2026-01-01 10:0',
  )
  _start(
    folder,
    '2026-01-02 08:00:00',
    ('2026-01-02 08:00:00', 'damaged', 'checkpoint 110: state/d/0 is truncated', {}),
    (
      '2026-01-02 08:00:01',
      'start',
      'resuming at step 100',
      _begun(100, 4, versions=VERSIONS | {'jax': '0.11.0'}, environment={'XLA_FLAGS': 'a'}),
    ),
    ('2026-01-02 08:00:21', 'progress', 'step 200', {'step': 200, 'loss': 2.25}),
    ('2026-01-02 08:01:05', 'progress', 'step 420', {'step': 420, 'loss': 2.0}),
    ('2026-01-02 08:01:06', 'skipped', '', {'counts': {'damaged picture': 2}}),
    (
      '2026-01-02 08:01:06',
      'stop',
      'ended',
      {'reason': 'error', 'step': 420, 'error': 'OSError: gone'},
    ),
    host='b',
    pid=8,
  )
  # By its own clock, the second process started a little before the first.
  _start(
    folder,
    '2026-01-02 07:59:58',
    (
      '2026-01-02 08:01:06',
      'skipped',
      '',
      {'counts': {'damaged picture': 1, 'no caption': 4}, 'process': 1},
    ),
    host='c',
    pid=9,
    suffix='-process1',
  )
  _start(
    folder,
    '2026-01-02 09:00:00',
    (
      '2026-01-02 09:00:00',
      'stop',
      'ended',
      {'reason': 'error', 'step': None, 'error': 'UserError: another configuration'},
    ),
  )


def test_the_history_is_shown(tmp_path, capsys):
  _a_run_with_a_history(tmp_path)
  assert main.main(['info', str(tmp_path)]) == 0
  text = capsys.readouterr().out
  lines = [' '.join(line.split()) for line in text.splitlines()]
  for line in (
    f'{tmp_path}: a run of the objective generator (MyObjective)',
    'progress step 420 of 1,000 (42.0%), 5 steps/s',
    'loss 2 at step 420, 2026-01-02 08:01:05 UTC',
    'devices 4 × cpu, mesh data 4',
    'versions parti_jax 0.1.0, jax 0.11.0',
    '2026-01-01 10:00:00 a-1, 7 0 130 2026-01-01 10:01:20 killed',
    '2026-01-02 08:00:00 b, 8 100 420 30 2026-01-02 08:01:06 OSError: gone',
    '2026-01-02 09:00:00 a-1, 7 2026-01-02 09:00:00 UserError: another configuration',
    '2026-01-02 08:00:00 new at this start: devices: 8 × cpu → 4 × cpu',
    '2026-01-02 08:00:00 new at this start: mesh: data 8 → data 4',
    '2026-01-02 08:00:00 new at this start: jax 0.10.2 → 0.11.0',
    '2026-01-02 08:00:00 new at this start: XLA_FLAGS none → a',
    '2026-01-02 08:00:00 checkpoint 110: state/d/0 is truncated',
    '3 damaged picture',
    '4 no caption',
    '1 lines of the journal are cut short or damaged',
  ):
    assert line in lines, text
  assert max(map(len, text.splitlines())) <= 120


def test_gin_values_that_differ_between_two_starts_are_named(tmp_path, capsys):
  write = lambda name, text: storage.write(tmp_path / 'configs' / name, text)
  write(
    'a.gin',
    'import parti_jax.data.tasks\n\n# Macros:\n# ====\nSTEPS = 4\n\n'
    '# Parameters for train:\n# ====\ntrain.seed = 3\ntrain.objective = @Objective()\n'
    "train.steps = 4\nfolder.splits = \\\n    {'train': 'a.jsonl',\n     'test': 'b = c'}\n",
  )
  write(
    'b.gin',
    '# Macros:\n# ====\nSTEPS = 4\n\n# Parameters for train:\n# ====\n'
    'train.data_shares = 2\ntrain.objective = @Objective()\ntrain.steps = 6\n'
    "folder.splits = \\\n    {'train': 'a.jsonl',\n     'test': 'b = d'}\n",
  )
  # The first start crashed after writing only its 'start' event.
  for day, config in enumerate(['a', 'b', 'b', 'gone'], 1):
    time = f'2026-01-0{day} 10:00:00'
    _start(tmp_path, time, (time, 'start', '', _begun(0, config=f'configs/{config}.gin')))
  starts = info.describe(str(tmp_path))['starts']
  assert [start['changes'] for start in starts] == [
    [],
    [
      "folder.splits {'train': 'a.jsonl', 'test': 'b = c'} → {'train': 'a.jsonl', 'test': 'b = d'}",
      'import parti_jax.data.tasks set → not set',
      'train.data_shares not set → 2',
      'train.seed 3 → not set',
      'train.steps 4 → 6',
    ],
    [],
    ['config: configs/b.gin → configs/gone.gin'],
  ]
  assert main.main(['info', str(tmp_path)]) == 0
  assert '2026-01-02 10:00:00  new at this start: train.steps 4 → 6' in capsys.readouterr().out


def test_json_has_the_same_content(tmp_path, capsys):
  _a_run_with_a_history(tmp_path)
  assert main.main(['info', str(tmp_path), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found['kind'], found['state'], found['step'], found['steps']) == (
    'run',
    'failed',
    420,
    1000,
  )
  assert found['skipped_examples'] == {'damaged picture': 3, 'no caption': 4}
  assert [start['reason'] for start in found['starts']] == [None, 'error', 'error']
  assert [start['redone'] for start in found['starts']] == [0, 30, 0]
  assert found['seconds_left'] is None  # It does not run.


def test_the_time_left_follows_from_the_last_rate(tmp_path):
  _start(
    tmp_path,
    '2026-01-01 10:00:00',
    ('2026-01-01 10:00:00', 'start', 'starting at step 0', _begun(0)),
    *(
      (f'2026-01-01 10:{minute:02}:00', 'progress', '', {'step': 10 * minute, 'loss': 'nan'})
      for minute in range(1, 60)
    ),
    ('2026-01-01 12:00:00', 'checkpoint', '', {'step': 900}),
  )
  found = info.describe(str(tmp_path))
  # The last hour has only the checkpoint, which gives no rate.
  assert found['steps_per_second'] is None and found['step'] == 900
  assert found['loss']['value'] == 'nan'
  (tmp_path / 'journal' / '20260101T100000.000Z-a-1-7.jsonl').write_text(
    ''.join(
      line
      for line in (tmp_path / 'journal' / '20260101T100000.000Z-a-1-7.jsonl').open()
      if '12:00' not in line
    )
  )
  found = info.describe(str(tmp_path))
  assert found['state'] == 'killed' and found['seconds_left'] is None
  # The lock of a process on another host: it may still run.
  (tmp_path / 'lock.json').write_text('{"pid": 7, "host": "a-1", "boot": "another"}')
  found = info.describe(str(tmp_path))
  assert found['state'] == 'running or killed'
  assert found['steps_per_second'] == pytest.approx(1 / 6)
  assert found['seconds_left'] == pytest.approx(410 * 6)


def test_checkpoints_are_compared_with_their_manifests(tmp_path, capsys):
  checkpoints = tmp_path / 'checkpoints'
  for step in (8, 9, 10):
    (checkpoints / str(step) / 'state').mkdir(parents=True)
    (checkpoints / str(step) / 'state' / 'd').write_bytes(bytes(1000))
    (checkpoints / str(step) / '_CHECKPOINT_METADATA').write_text(
      json.dumps({'commit_timestamp_nsecs': 1767225600_000000000, 'custom_metadata': {}})
    )
    (checkpoints / str(step) / 'commit_success.txt').write_text('written')
    manifest.write(epath.Path(checkpoints / str(step)))
    manifest.seal(epath.Path(checkpoints / str(step)))
  (checkpoints / '8').rename(checkpoints / '8.damaged')
  (checkpoints / '9' / 'state' / 'd').write_bytes(bytes(999))
  (checkpoints / '10' / 'state' / 'd').write_bytes(bytes(999) + b'a')
  main.main(['info', str(tmp_path)])
  lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
  found = [line.partition('kB ')[2] for line in lines if '2026-01-01 00:00:00' in line]
  assert found == [
    'damaged: found damaged before',
    'damaged: state/d is truncated (999 of 1000 bytes)',
    'whole by its sizes',
  ]
  *_, last = info.describe(str(tmp_path), verify=True)['checkpoints']
  assert (last['step'], last['checked']) == (10, 'digests')
  assert last['fault'] == 'state/d has other bytes than were written'


def test_a_run_of_this_host_is_known_to_run(tmp_path, capsys):
  with run_lock.RunLock(tmp_path), journal_lib.Journal(tmp_path) as journal:
    journal.write('start', 'starting at step 0', **_begun(0))
    assert info.describe(str(tmp_path))['state'] == 'running'
  assert main.main(['info', str(tmp_path)]) == 0
  assert 'state       finished' in capsys.readouterr().out


def test_frequent_events_are_shown_in_part(tmp_path, capsys):
  many = [('2026-01-01 10:00:00', 'odd', f'the event {i}.', {}) for i in range(info_text.SHOWN + 3)]
  _start(tmp_path, '2026-01-01 10:00:00', *many)
  main.main(['info', str(tmp_path)])
  text = capsys.readouterr().out
  assert text.count('the event') == info_text.SHOWN and 'the event 2.' not in text
  assert 'and 3 more before these' in text


def test_an_exported_model(tmp_path, capsys):
  assert main.main(['info', str(DEMO)]) == 0
  text = capsys.readouterr().out
  assert '64×64 pixels of 64 image tokens, 256×256 with --upscale' in text
  assert 'vocabulary  2,000 ids' in text and 'ranker: 1,764,737 parameters' in text
  assert 'missing' not in text
  (tmp_path / 'config.json').write_bytes((DEMO / 'config.json').read_bytes())
  (tmp_path / 'parti.safetensors').write_bytes(b'')
  found = info.describe(str(tmp_path))
  assert found['missing'] == [
    'tokenizer.safetensors',
    'ranker.safetensors',
    'super_resolution.safetensors',
    'vocabulary.model',
  ]


def test_an_exported_model_of_version_2(tmp_path):
  config = json.loads((DEMO / 'config.json').read_text()) | {'format_version': 2}
  for entries in (config, config['parameters']):
    entries['generator'] = entries.pop('parti')
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'generator.safetensors').write_bytes(b'')
  found = info.describe(str(tmp_path))
  assert found['vocabulary']['ids'] == 2000 and found['parts']['generator']['bytes'] == 0
  assert 'generator.safetensors' not in found['missing'] and len(found['missing']) == 4


@pytest.mark.parametrize(
  'files, message',
  [
    ([], 'neither a run .* nor an exported model'),
    (['info.json', 'train-00000.array_record'], 'image tokens, for --gin.token_cache.path'),
    (['state/d', 'model/metadata'], 'one checkpoint; give the folder of its run'),
    (['config.json'], 'config.json: damaged, or not from an exported model'),
  ],
)
def test_other_folders_are_named(tmp_path, files, message):
  for name in files:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{}')
  with pytest.raises(errors.UserError, match=message):
    info.describe(str(tmp_path))
  with pytest.raises(errors.UserError, match='nowhere: does not exist'):
    info.describe(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize(
  'path, value',
  [
    (('parameters',), None),
    (('parameters',), [1]),
    (('parameters', 'parti'), 'x'),
    (('sampling',), None),
    (('provenance',), []),
    (('tokenizer', 'patch_size'), 0),
    (('tokenizer', 'image_size'), '64'),
    (('super_resolution', 'factor'), None),
    (('parti',), None),
    (('ranker',), 5),
    ((), [1]),
  ],
)
def test_a_model_whose_config_was_edited(tmp_path, capsys, path, value):
  config = json.loads((DEMO / 'config.json').read_text())
  place = config
  for key in path[:-1]:
    place = place[key]
  if path:
    place[path[-1]] = value
  (tmp_path / 'config.json').write_text(json.dumps(config if path else value))
  assert main.main(['info', str(tmp_path)]) == 2
  line = capsys.readouterr().err
  assert 'config.json: ' in line and all(key in line for key in path) and line.count('\n') == 1
  assert 'Error' not in line and 'NoneType' not in line
