"""Folders saved by the Hugging Face library `datasets`, written by that library."""

import pickle

import pytest

from parti_jax.cli import own_plan
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets as our_datasets
from parti_jax.data import sources
from parti_jax.data.batches import Batches

hf = pytest.importorskip('datasets', reason='the extra hf is not installed')

IMAGES, PAIRS = {'images': 8}, {'inputs': 16, 'images': 8}


@pytest.fixture(name='dataset')
def _dataset(encode):
  """Creates a dataset of pictures whose red channel is their number."""

  def make(numbers, image=None, **columns):
    features = {'image': image or hf.Image(), 'text': hf.Value('string')}
    rows = {
      'image': [{'bytes': encode((number, 100, 200)), 'path': None} for number in numbers],
      'text': [f'woman firefighter {number}' for number in numbers],
      **columns,
    }
    return hf.Dataset.from_dict(
      rows, features=hf.Features({name: features.get(name, hf.Value('int64')) for name in rows})
    )

  return make


def _configure(path, *bindings):
  gin_config.parse(
    ['gin_configs/tasks/hf_datasets.gin'],
    [f"hf_datasets.path='{path}'", 'drop_text.rate = 0.0', *bindings],
  )


def _read(split='train', **kwargs):
  batches = Batches('pairs', split, 4, PAIRS, num_epochs=1, **kwargs)
  decode = our_datasets.get_vocabulary().decode
  read = {}
  for batch in batches:
    for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
      read[decode(ids)] = int(image[0, 0, 0])
  return read, batches


def _expected(numbers):
  return {f'woman firefighter {number}': number for number in numbers}


def test_a_dataset_is_the_split_train(dataset, tmp_path):
  dataset(range(20), label=list(range(20))).save_to_disk(tmp_path, num_shards=3)
  _configure(tmp_path)
  assert sources.configured('hf_datasets').splits == ('train',)
  assert sorted(_read()[0].values()) == list(range(20))
  ordered = Batches('images', 'train', 20, IMAGES, shuffle=False, num_epochs=1)
  assert next(ordered)['images'][:, 0, 0, 0].tolist() == list(range(20))
  halves = [set(_read(share=share, shares=2)[0].values()) for share in range(2)]
  assert len(halves[0]) == 10 and halves[0] | halves[1] == set(range(20))


def test_a_dict_has_its_splits_with_selections_and_shuffling(dataset, tmp_path):
  hf.DatasetDict(
    {
      'train': dataset(range(20)).shuffle(seed=1).select(range(5, 15)),
      'validation': dataset(range(30, 33)),
    }
  ).save_to_disk(tmp_path)
  _configure(tmp_path)
  assert sources.configured('hf_datasets').splits == ('train', 'validation')
  assert _read('validation')[0] == _expected(range(30, 33))
  assert len(_read()[0]) == 10
  with pytest.raises(UserError, match="hf_datasets .*'test'.* train, validation"):
    _read('test')
  _configure(tmp_path, "hf_datasets.splits={'train': 'validation'}")
  assert _read()[0] == _expected(range(30, 33))
  _configure(tmp_path, "hf_datasets.splits={'train': ''}")
  with pytest.raises(UserError, match='train, validation.*hf_datasets.splits='):
    _read()


def test_unusable_rows_are_counted(encode, tmp_path):
  picture = {'bytes': encode((7, 100, 200)), 'path': None}
  missing = {'bytes': None, 'path': 'not/there.png'}
  hf.Dataset.from_dict(
    {
      'image': [picture, None, {'bytes': b'<html>', 'path': None}, picture, picture],
      'caption': [['woman firefighter 7'], ['x'], ['y'], ['a', 'b'], []],
    },
    features=hf.Features({'image': hf.Image(), 'caption': hf.List(hf.Value('string'))}),
  ).save_to_disk(tmp_path / 'lists')
  _configure(tmp_path / 'lists')
  read, batches = _read()
  assert read == _expected([7])
  assert batches.skipped == {
    'row without a picture': 1,
    'unknown picture format': 1,
    'no caption': 1,
    'record with more than one caption': 1,
  }
  hf.Dataset.from_dict(
    {'image': [picture, missing], 'text': ['woman firefighter 7', 'b']}
  ).save_to_disk(tmp_path / 'paths')
  _configure(tmp_path / 'paths')
  assert _read()[1].skipped == {'row with a path in place of a picture': 1}


def test_texts_only(tmp_path):
  hf.Dataset.from_dict({'text': ['one', 'two']}).save_to_disk(tmp_path)
  _configure(tmp_path)
  assert list(sources.configured('hf_datasets').captions('train')) == ['one', 'two']
  with pytest.raises(UserError, match='image, .* text .*hf_datasets.image_key'):
    Batches('images', 'train', 1, IMAGES)


def test_worker_processes_get_their_own(dataset, tmp_path):
  dataset(range(12)).save_to_disk(tmp_path)
  _configure(tmp_path)
  opened = sources.configured('hf_datasets').open('train')
  sent = pickle.dumps(opened)
  assert len(sent) < 1000  # The table stays here.
  assert pickle.loads(sent).read([7, 0, 11]) == opened.read([7, 0, 11])


@pytest.mark.parametrize(
  'file, change',
  [
    ('data-00000-of-00001.arrow', lambda data: data[: len(data) // 2]),
    ('data-00000-of-00001.arrow', lambda data: b''),
    ('state.json', lambda data: data[:10]),
    ('dataset_info.json', lambda data: b'[]'),
  ],
)
def test_damaged_files_are_named(dataset, tmp_path, file, change):
  dataset(range(12)).save_to_disk(tmp_path)
  (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
  _configure(tmp_path)
  with pytest.raises(UserError, match=f'hf_datasets: {tmp_path}'):
    _read()


def test_folders_that_are_not_saved_datasets(dataset, tmp_path):
  _configure(tmp_path)
  with pytest.raises(UserError, match='save_to_disk.*hf_datasets.path'):
    _read()
  _configure('s3://bucket/saved')
  with pytest.raises(UserError, match='s3://bucket/saved'):
    _read()
  (tmp_path / 'dataset_dict.json').write_text('{"splits": "train"')
  _configure(tmp_path)
  with pytest.raises(UserError, match='dataset_dict.json'):
    _read()


def test_own_pictures_finds_it(dataset, tmp_path):
  dataset(range(3)).save_to_disk(tmp_path)
  assert own_plan.find_source(str(tmp_path)) == [
    "data.source = 'hf_datasets'",
    f"hf_datasets.path = '{tmp_path}'",
  ]
