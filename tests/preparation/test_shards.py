"""Parts of a source, their shards, and the output folder, without Beam."""

import json
import os
import pickle

import pytest

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import sources
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import folder
from parti_jax.data.sources import prepared
from parti_jax.data.sources import webdataset
from parti_jax.preparation import output as output_lib
from parti_jax.preparation import report
from parti_jax.preparation import shards
from parti_jax.preparation.settings import Settings
from parti_jax.preparation.work import Work


def _tars(path):
  return webdataset.WebDatasetSource(str(path), {'train': '*.tar'}, None)


def _work(source, **settings):
  return Work(source, 'train', Settings(**settings))


def _records(path):
  return list(
    prepared.array_records.ShardStreams(
      [str(path)], prepared.functools.partial(prepared.parsed, describe=True)
    ).read(str(path))
  )


@pytest.fixture
def tars(draw, encode, write_tar):
  """Three tars of two examples each."""
  for tar in range(3):
    samples = [
      (
        f'{tar}{index}',
        f'picture {tar}{index}',
        encode(draw(2 * tar + index), 'jpeg'),
        {'clip': tar / 10},
      )
      for index in range(2)
    ]
    path = write_tar(f'{tar}.tar', samples)
  return path


def test_files_are_divided_into_parts(tars):
  work = pickle.loads(pickle.dumps(_work(_tars(tars), files_per_shard=2)))
  assert len(work) == 2
  read = list(work.read(0))
  assert [key for key, _ in read] == ['0.tar:0', '0.tar:1', '1.tar:0', '1.tar:1']
  assert [example['key'] for _, example in read] == ['00', '01', '10', '11']
  assert read[2][1]['columns'] == {'clip': 0.1}
  assert [key for key, _ in work.read(1)] == ['2.tar:0', '2.tar:1']


def test_an_index_is_divided_into_parts(tmp_path, draw, encode):
  for index in range(5):
    (tmp_path / f'{index}.png').write_bytes(encode(draw(index)))
  (tmp_path / 'captions.jsonl').write_text(
    ''.join(
      json.dumps({'file': f'{index}.png', 'caption': f'{index}'}) + '\n' for index in range(5)
    )
  )
  source = folder.FolderSource(str(tmp_path), {'train': 'captions.jsonl'}, 'file', 'caption')
  work = pickle.loads(pickle.dumps(_work(source, examples_per_shard=2)))
  read = [pair for number in range(len(work)) for pair in work.read(number)]
  assert [len(list(work.read(number))) for number in range(len(work))] == [2, 2, 1]
  assert [(key, example['key'], example['caption']) for key, example in read] == [
    (str(index), f'{index}.png', str(index).encode()) for index in range(5)
  ]


def test_columns_are_checked_beforehand(tars):
  _work(_tars(tars), columns={'clip': (0, 1)}, keep_columns=('clip',)).check_columns()
  for settings in ({'columns': {'watermark': (0, 1)}}, {'keep_columns': ('watermark',)}):
    with pytest.raises(UserError, match="'watermark'.*\\b2\\b.* clip .*prepare.columns"):
      _work(_tars(tars), **settings).check_columns()


def test_a_shard_and_the_outcome_of_its_examples(tmp_path, draw, encode):
  examples = [
    ('0', {'picture': encode(draw(0)), 'caption': b'first'}),
    ('1', Damaged('rest of a damaged tar shard', file='x.tar')),
    ('2', {'picture': encode(draw(1))[:-40], 'caption': b'broken'}),
    ('3', {'picture': encode(draw(2)), 'caption': b''}),
    ('4', {'picture': encode(draw(3)), 'caption': b'las\0t'}),
  ]
  path = str(tmp_path / 'a.array_record')
  outcome, rows = shards.write(path, 7, examples, Settings(near_duplicates=0))
  assert outcome.read == 5
  assert outcome.left_out == {
    'rest of a damaged tar shard': 1,
    'damaged picture': 1,
    'no caption': 1,
  }
  assert outcome.notes == {'control characters taken out of the caption': 1}
  assert outcome.places == ['x.tar: rest of a damaged tar shard']
  assert outcome.shard['examples'] == 2 and outcome.shard['bytes'] == os.path.getsize(path)
  assert [(row.shard, row.position, row.pixels) for row in rows] == [(7, 0, 3072), (7, 1, 3072)]
  assert rows[0].digest != rows[1].digest and rows[0].look != rows[1].look
  assert [(example['key'], example['caption']) for example in _records(path)] == [
    ('0', b'first'),
    ('4', b'las t'),
  ]


def test_duplicates_can_be_removed_repeatedly(tmp_path, draw, encode):
  examples = [(str(index), {'picture': encode(draw(index)), 'caption': b'a'}) for index in range(4)]
  staged, place = str(tmp_path / 'staged'), str(tmp_path / 'x.array_record')
  outcome, _ = shards.write(staged, 0, examples, Settings())
  drops = {0: 'duplicate picture', 2: 'duplicate picture'}
  found = shards.finish(staged, place, outcome, drops)
  assert found.left_out == {'duplicate picture': 2} and found.read == 4
  assert [example['key'] for example in _records(place)] == ['1', '3']
  # A runner may repeat the step if it missed the result.
  assert shards.finish(staged, place, outcome, drops) == found
  assert not os.path.exists(staged) and found.shard['bytes'] == os.path.getsize(place)


def test_a_shard_without_duplicates_is_moved(tmp_path, draw, encode):
  examples = [('0', {'picture': encode(draw(0)), 'caption': b'a'})]
  staged, place = str(tmp_path / 'staged'), str(tmp_path / 'x.array_record')
  outcome, _ = shards.write(staged, 0, examples, Settings())
  for _ in range(2):
    assert shards.finish(staged, place, outcome, {}) == outcome
  assert len(_records(place)) == 1


def _finish(output, draw, encode, counts=(2, 0, 1)):
  """Writes shards with the given numbers of examples and publishes them."""
  outcomes = []
  for number, count in enumerate(counts):
    examples = [
      (f'{number}:{index}', {'picture': encode(draw(index)), 'caption': b'a'})
      for index in range(count)
    ]
    outcome, _ = shards.write(output.staging_place(number), number, examples, Settings())
    outcomes.append(shards.finish(output.staging_place(number), output.place(number), outcome, {}))
  output.publish([outcome.shard for outcome in outcomes], report.make(outcomes, 'here', Settings()))
  output.release(finished=any(counts))


def test_a_finished_split_is_a_source(tmp_path, draw, encode):
  where = str(tmp_path / 'out')
  output = pickle.loads(pickle.dumps(output_lib.Output(where, 'train', True)))
  output.claim(False)
  with pytest.raises(UserError, match=f'{where} .*parti-jax prepare.*prepared.path'):
    prepared.read_info(where)
  _finish(output, draw, encode)
  assert sorted(os.listdir(where)) == [
    'info.json',
    'report.json',
    *(f'train-0000{number}.array_record' for number in range(3)),
  ]
  source = prepared.PreparedSource(where)
  examples = list(source.examples('train'))
  assert [example['caption'] for example in examples] == [b'a'] * 3
  assert examples[0].keys() == {'picture', 'caption'}
  described = source.open_described('train')
  assert [example['key'] for example in described.read(range(len(described)))] == [
    '0:0',
    '0:1',
    '2:0',
  ]
  digest = source.open('train').digest()
  # A second split joins the first, and can be replaced.
  other = output_lib.Output(where, 'validation', True)
  other.claim(False)
  _finish(other, draw, encode, (1,))
  assert prepared.PreparedSource(where).splits == ('train', 'validation')
  with pytest.raises(UserError, match="--output_dir=.*'train'.*--overwrite"):
    output.claim(False)
  output.claim(True)
  assert prepared.PreparedSource(where).splits == ('validation',)
  assert prepared.PreparedSource(where).open('validation').digest() not in (digest, None)
  assert not [name for name in os.listdir(where) if name.startswith('train')]
  assert set(json.loads(storage.read(f'{where}/report.json', 2**20))['splits']) == {
    'train',
    'validation',
  }


def test_one_run_at_a_time_uses_the_folder(tmp_path):
  output = output_lib.Output(str(tmp_path / 'out'), 'train', True)
  output.claim(False)
  owner = tmp_path / 'out' / '.train.unfinished' / 'owner.json'
  assert json.loads(owner.read_text())['pid'] == os.getpid()
  for other in (
    {'host': 'elsewhere', 'pid': 1, 'since': 'today'},
    {'host': output_lib.socket.gethostname(), 'pid': 1, 'since': 'today'},
  ):
    owner.write_text(json.dumps(other))
    with pytest.raises(UserError, match=f'\\b1\\b.*{other["host"]}.*today.*--overwrite'):
      output.claim(False)
  owner.write_text('{')
  with pytest.raises(UserError, match='--overwrite'):
    output.claim(False)
  output.claim(True)
  output.release(finished=False)
  assert not (tmp_path / 'out').exists()


def test_leftovers_of_a_killed_run_are_replaced(tmp_path, monkeypatch):
  output = output_lib.Output(str(tmp_path), 'train', True)
  output.claim(False)
  (tmp_path / '.train.unfinished' / 'shard-00000.array_record').write_bytes(b'x')
  (tmp_path / 'train-00009.array_record').write_bytes(b'x')
  owner = tmp_path / '.train.unfinished' / 'owner.json'
  owner.write_text(json.dumps(json.loads(owner.read_text()) | {'pid': 2**22 + 1}))
  output.claim(False)
  assert os.listdir(tmp_path / '.train.unfinished') == ['owner.json']
  assert os.listdir(tmp_path) == ['.train.unfinished']


def test_runs_share_no_unfinished_shards(tmp_path):
  places = {output_lib.Output(str(tmp_path), 'train', True).staging_place(0) for _ in range(2)}
  assert len(places) == 2
  output = pickle.loads(pickle.dumps(output_lib.Output(str(tmp_path), 'train', True)))
  assert output.staging_place(0) == pickle.loads(pickle.dumps(output)).staging_place(0)


def test_shards_of_other_splits_are_not_touched(tmp_path):
  for name in ('train-00000.array_record', 'train-00000.tfrecord', 'train-a.array_record'):
    (tmp_path / name).write_bytes(b'x')
  output = output_lib.Output(str(tmp_path), 'train', True)
  with pytest.raises(UserError, match='train-00000.array_record.*--overwrite'):
    output.claim(False)
  output.claim(True)
  assert sorted(os.listdir(tmp_path)) == [
    '.train.unfinished',
    'train-00000.tfrecord',
    'train-a.array_record',
  ]


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'info.json').write_text('{"codebook_size": 5}')
  with pytest.raises(UserError, match='info.json.*prepared.path'):
    output_lib.Output(str(tmp_path), 'train', True).claim(True)
  with pytest.raises(UserError, match="'a/b'"):
    output_lib.Output(str(tmp_path), 'a/b', True)


def test_workers_that_wrote_elsewhere(tmp_path):
  with pytest.raises(UserError, match="report.json.*'train'"):
    output_lib.Output(str(tmp_path), 'train', True).report()


def test_nothing_is_left(tmp_path, draw, encode):
  output = output_lib.Output(str(tmp_path / 'out'), 'train', True)
  output.claim(False)
  _finish(output, draw, encode, (0,))
  assert os.listdir(tmp_path / 'out') == ['report.json']
  assert output.report()['written'] == 0


def test_a_report_adds_up():
  outcomes = [
    shards.Outcome(
      number,
      10,
      shards.collections.Counter(small=number),
      shards.collections.Counter(cut=1),
      [f'{number}.tar: damaged'],
      {'examples': 10 - number, 'bytes': 5, 'digest': 'x'},
    )
    for number in range(3)
  ]
  found = report.make(outcomes, 'tars', Settings(size=8))
  assert found['read'] == found['written'] + sum(found['left_out'].values()) == 30
  assert found['left_out'] == {'small': 3} and found['ignored_or_cut'] == {'cut': 3}
  assert found['bytes'] == 15 and found['shards'] == 3 and found['settings']['size'] == 8
  assert found['damaged'] == ['0.tar: damaged', '1.tar: damaged', '2.tar: damaged']
  assert report.table(found).split() == '30 read -3 small 27 written 3 cut'.split()
  json.dumps(found)


def test_prepared_pictures_by_gin(tmp_path, draw, encode):
  output = output_lib.Output(str(tmp_path / 'out'), 'train', True)
  output.claim(False)
  _finish(output, draw, encode)
  import gin

  gin.parse_config(f"prepared.path = '{tmp_path}/out'")
  assert len(list(sources.configured('prepared').examples('train'))) == 3
  with pytest.raises(UserError, match="prepared.shuffle='none'.* global, window"):
    prepared.configured(shuffle='none')


@pytest.mark.parametrize('shuffle', ['global', 'window'])
def test_damaged_prepared_pictures(tmp_path, draw, encode, shuffle):
  where = str(tmp_path / 'out')
  output = output_lib.Output(where, 'train', True)
  output.claim(False)
  _finish(output, draw, encode)
  path = output.place(2)
  content = storage.read(path, 2**30)
  storage.write(path, content[:-1])
  with pytest.raises(UserError, match=f'train-00002.array_record.*{len(content):,}'):
    prepared.PreparedSource(where, shuffle).open('train')
  os.remove(path)
  with pytest.raises(UserError, match='train-00002.array_record.*parti-jax prepare'):
    prepared.PreparedSource(where, shuffle).open('train')
  storage.write(path, content)
  first = output.place(0)
  storage.write(first, bytes(os.path.getsize(first)))
  with pytest.raises(UserError, match='train-00000.array_record.*parti-jax prepare'):
    prepared.PreparedSource(where, shuffle).open('train')
  with pytest.raises(UserError, match="'test'.* train;.*parti-jax prepare"):
    prepared.PreparedSource(where, shuffle).open('test')


@pytest.mark.parametrize(
  'record',
  [
    b'',
    b'\0' * 7,
    b'\xff' * 20,
    prepared.serialized(b'', 'a', {}),
    prepared.serialized(b'x', 'a', {}),
  ],
)
def test_records_of_something_else(record):
  assert isinstance(prepared.parsed(record, describe=True), Damaged)


def test_a_changing_source_is_refused(tars):
  work = _work(_tars(tars))
  assert len(work) == 3
  sent = pickle.dumps(work)
  assert b'0.tar' not in sent and len(pickle.loads(sent)) == 3
  (tars / '3.tar').write_bytes((tars / '2.tar').read_bytes())
  with pytest.raises(UserError, match=str(tars)):
    len(pickle.loads(sent))
