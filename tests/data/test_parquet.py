"""Parquet files: formats of img2dataset and the Hugging Face hub, damage, shuffling, resuming."""

import errno
import json
import pickle
import threading

import fsspec
import gin
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parti_jax.cli import own_plan
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import sources
from parti_jax.data.batches import Batches
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import parquet_files
from parti_jax.data.sources import parquet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
IMAGES, PAIRS = {'images': 8}, {'inputs': 16, 'images': 8}


@pytest.fixture(name='write')
def _write(tmp_path):
  """Writes columns to a file and configures the source."""

  def write(columns, name='00000.parquet', bindings=(), **kwargs):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    try:
      pq.write_table(pa.table(columns), path, **kwargs)
    except pa.ArrowNotImplementedError as error:
      pytest.skip(f'this version of pyarrow writes no such file: {error}')
    gin_config.parse(
      ['gin_configs/tasks/parquet.gin'],
      [f"parquet.path='{tmp_path}'", 'drop_text.rate = 0.0', *bindings],
    )
    return path

  return write


@pytest.fixture(name='numbered')
def _numbered(write, encode):
  """Writes files of pictures whose red channel is their number."""

  def numbered(count, files=1, bindings=(), **kwargs):
    per_file = -(-count // files)
    for index in range(files):
      numbers = range(index * per_file, min(count, (index + 1) * per_file))
      path = write(
        {
          'image': [encode((number, 100, 200)) for number in numbers],
          'caption': [f'woman firefighter {number}' for number in numbers],
        },
        f'{index:05d}.parquet',
        bindings,
        **kwargs,
      )
    return path

  return numbered


def _numbers(batch):
  return batch['images'][:, 0, 0, 0].tolist()


def _pairs(split='train'):
  """Reads the pairs once, and returns {caption: color}."""
  batches = Batches('pairs', split, 4, PAIRS, num_epochs=1)
  decode = datasets.get_vocabulary().decode
  read = {
    decode(ids): tuple(image[0, 0].tolist())
    for batch in batches
    for ids, image in zip(batch['encoder_input_tokens'], batch['images'])
  }
  return read, batches


@pytest.mark.parametrize('shuffle', ['global', 'window'])
def test_files_of_img2dataset(write, encode, shuffle):
  rows = [
    ('red circle', encode(RED), 'success'),
    ('gone', None, 'failed_to_download'),
    ('too big', None, 'failed_to_resize'),
    (None, encode(BLUE), 'success'),
    ('green circle', encode(GREEN), 'success'),
    ('who knows', None, 'odd'),
    ('a page', b'<html>', 'success'),
  ]
  captions, pictures, statuses = zip(*rows)
  write(
    {
      'url': ['http://x'] * 7,
      'key': [f'{i:09d}' for i in range(7)],
      'status': statuses,
      'error_message': [None] * 7,
      'width': [8] * 7,
      'caption': captions,
      'jpg': pictures,
    },
    bindings=[f"parquet.shuffle='{shuffle}'"],
  )
  read, batches = _pairs()
  assert read == {'red circle': RED, 'green circle': GREEN}
  assert batches.skipped == {
    'img2dataset: failed_to_download': 1,
    'img2dataset: failed_to_resize': 1,
    'no caption': 1,
    'row without a picture': 1,
    'unknown picture format': 1,
  }


@pytest.mark.parametrize(
  'layout',
  ['{}-00000-of-00001.parquet', 'data/{}-00000-of-00001.parquet', '{}/0000.parquet', '{}.parquet'],
)
def test_files_of_the_hub(write, encode, layout):
  struct = pa.struct({'bytes': pa.binary(), 'path': pa.string()})
  for split, color in (('train', RED), ('validation', GREEN), ('test', BLUE)):
    pictures = pa.array(
      [{'bytes': encode(color), 'path': 'a.png'}, {'bytes': None, 'path': 'b.png'}, None], struct
    )
    write(
      {'image': pictures, 'text': [f'{split} circle'] * 3, 'label': [0] * 3}, layout.format(split)
    )
  assert sources.configured('parquet').splits == ('train', 'validation', 'test')
  read, batches = _pairs('validation')
  assert read == {'validation circle': GREEN}
  assert batches.skipped == {'row with a path in place of a picture': 1, 'row without a picture': 1}


@pytest.mark.parametrize(
  'kind',
  [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.list_(pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.string(), 1),
  ],
  ids=str,
)
def test_captions_of_all_kinds(write, encode, kind):
  values = ['red circle', None, 'blue circle']
  if hasattr(kind, 'value_field'):
    values = [value and [value] for value in values]
  write(
    {
      'image': pa.array([encode(RED), encode(GREEN), encode(BLUE)], pa.large_binary()),
      'caption': pa.array(values, kind) if 'list' in str(kind) else pa.array(values).cast(kind),
    }
  )
  read, batches = _pairs()
  assert read == {'red circle': RED, 'blue circle': BLUE} and batches.skipped == {'no caption': 1}


def test_short_names_of_splits(numbered, tmp_path):
  path = numbered(3)
  for name in ('train-0', 'val-0', 'other'):
    (tmp_path / f'{name}.parquet').write_bytes(path.read_bytes())
  assert parquet.found_splits(str(tmp_path)) == {
    'train': 'train[-._0-9]*parquet',
    'validation': 'val[-._0-9]*parquet',
  }


@pytest.mark.parametrize(
  'names', [('train_00000', 'validation_00000', 'test_00000'), ('train00', 'val00', 'test00')]
)
def test_no_split_is_trained_on_by_mistake(numbered, tmp_path, names):
  path = numbered(3)
  content = path.read_bytes()
  path.unlink()
  for name in names:
    (tmp_path / f'{name}.parquet').write_bytes(content)
  assert list(parquet.found_splits(str(tmp_path))) == ['train', 'validation', 'test']
  (tmp_path / f'{names[0]}.parquet').rename(tmp_path / 'data.parquet')
  with pytest.raises(UserError, match='00.parquet.* train.*parquet.splits'):
    parquet.found_splits(str(tmp_path))


def test_unusable_captions(write, encode):
  write({'image': [encode(RED)] * 5, 'captions': [['a dog'], [], None, ['a', 'b'], [None]]})
  read, batches = _pairs()
  assert read == {'a dog': RED}
  assert batches.skipped == {'no caption': 3, 'record with more than one caption': 1}
  write({'image': [encode(RED)] * 2, 'caption': pa.array([b'a dog', b'\xff\xfe\xff'])})
  assert _pairs()[1].skipped == {'caption not UTF-16': 1}


@pytest.mark.parametrize(
  'columns, bindings, message',
  [
    (
      {'a': ['x'], 'b': ['y']},
      [],
      r'00000.parquet .*caption, .* a, b \(gin: parquet.caption_key\)',
    ),
    (
      {'a': ['x'], 'b': ['y']},
      ["parquet.caption_key='c'"],
      r"00000.parquet .*'c'.* a, b \(gin: parquet.caption_key\)",
    ),
    ({'text': ['x'], 'b': [b'y']}, [], r'image, .* text, b \(gin: parquet.image_key\)'),
    ({'text': [1], 'image': [b'y']}, [], "'text'.*00000.parquet .*int64.*caption_key"),
    ({'text': [['x']], 'image': [[1, 2]]}, [], "'image'.*00000.parquet .*list<.*image_key"),
    ({'text': ['x'], 'image': ['a.png']}, [], "'image'.*00000.parquet .*string.*image_key"),
  ],
)
def test_missing_columns(write, columns, bindings, message):
  write(columns, bindings=bindings)
  with pytest.raises(UserError, match=message):
    Batches('pairs', 'train', 1, PAIRS)


def test_columns_by_name_and_a_file_with_others(write, encode, tmp_path):
  keys = ["parquet.image_key='b'", "parquet.caption_key='a'"]
  write({'a': ['x y'], 'b': [encode(RED)], 'caption': ['z'], 'image': [b'']}, bindings=keys)
  assert _pairs()[0] == {'x y': RED}
  write({'a': ['x y'], 'c': [encode(RED)]}, '00001.parquet', bindings=keys)
  with pytest.raises(UserError, match="00001.parquet .*'b'.* a, c"):
    Batches('pairs', 'train', 1, PAIRS)


@pytest.mark.parametrize('content', [b'', b'PAR1', b'no Parquet at all', None])
def test_a_file_without_a_footer_is_named(numbered, content):
  path = numbered(10, files=2)
  path.write_bytes(path.read_bytes()[:-20] if content is None else content)
  with pytest.raises(UserError, match='00001.parquet .*: .*parquet.splits'):
    Batches('parquet_images', 'train', 1, IMAGES)


def _damage(path, group, share, column='image'):
  """Overwrites a column in a row group, from a relative position on."""
  metadata = pq.ParquetFile(path).metadata.row_group(group)
  (place,) = (i for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == column)
  chunk = metadata.column(place)
  start = chunk.dictionary_page_offset or chunk.data_page_offset
  first = start + int(share * chunk.total_compressed_size)
  content = bytearray(path.read_bytes())
  content[first : start + chunk.total_compressed_size] = b'\xff' * (
    start + chunk.total_compressed_size - first
  )
  path.write_bytes(content)


@pytest.mark.parametrize('shuffle', ['global', 'window'])
def test_damaged_rows_are_counted_and_the_others_read(numbered, caplog, shuffle):
  path = numbered(
    60,
    bindings=[f"parquet.shuffle='{shuffle}'"],
    row_group_size=20,
    data_page_size=1,
    write_batch_size=1,
    use_dictionary=False,
  )
  _damage(path, 1, 0.5)
  batches = Batches('parquet_images', 'train', 7, IMAGES, num_epochs=1)
  read = sum((_numbers(batch) for batch in batches), [])
  ((reason, lost),) = batches.skipped.items()
  assert reason == 'unreadable row of a Parquet file' and 8 <= lost <= 12
  assert sorted(read) == [number for number in range(60) if not 40 - lost <= number < 40]
  assert "00000.parquet, 'row group 1': " in caplog.text
  # All captions can be read, since the column of pictures isn't.
  texts = sources.configured('parquet').captions('train')
  assert list(texts) == [f'woman firefighter {number}' for number in range(60)]


def test_only_footers_are_read_at_the_beginning(numbered):
  path = numbered(40, row_group_size=10)
  for group in range(4):
    _damage(path, group, 0)
    _damage(path, group, 0, 'caption')
  opened = sources.configured('parquet').open('train')
  assert len(opened) == 40
  assert all(isinstance(found, Damaged) for found in opened.read(range(40)))


@pytest.mark.parametrize('seed', range(8))
def test_all_rows_are_accounted_for_after_any_damage(numbered, seed):
  path = numbered(
    30, row_group_size=7, compression='snappy' if seed % 2 else 'none', write_page_checksum=True
  )
  whole, rng = path.read_bytes(), np.random.default_rng(seed)
  kept = 0
  for _ in range(25):
    content = bytearray(whole)
    for place in rng.integers(len(whole), size=rng.integers(1, 6)):
      content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    try:
      opened = sources.configured('parquet').open('train')
    except UserError as error:
      assert '00000.parquet' in str(error)
      continue
    if not isinstance(opened, parquet._Rows):
      continue  # The footer claims large row groups.
    found = opened.read(range(len(opened)))
    assert len(found) == len(opened) and None not in found
    kept += sum(not isinstance(example, Damaged) for example in found)
  assert kept > 100


@pytest.mark.parametrize(
  'bindings', [["parquet.shuffle='global'"], ["parquet.shuffle='window'", 'shuffle.buffer_size=64']]
)
@pytest.mark.parametrize('taken', [0, 3, 9])
def test_resumes_as_if_uninterrupted_in_every_share(numbered, monkeypatch, bindings, taken):
  monkeypatch.setattr(parquet, '_PART', 4)
  numbered(45, files=3, bindings=bindings, row_group_size=4)
  epoch = []
  for share in range(2):
    arguments = {'seed': 5, 'share': share, 'shares': 2}
    whole, resumed = (Batches('parquet_pairs', 'train', 3, PAIRS, **arguments) for _ in range(2))
    first = [_numbers(next(whole)) for _ in range(taken)]
    state = json.loads(json.dumps(whole.state()))
    next(resumed)
    resumed.restore(state)
    for _ in range(4):
      batch, again = next(whole), next(resumed)
      assert all((batch[name] == again[name]).all() for name in batch)
    assert whole.state() == resumed.state()
    once = Batches('parquet_pairs', 'train', 3, PAIRS, num_epochs=1, **arguments)
    read = sum((_numbers(batch) for batch in once), [])
    assert sum(first, [])[: len(read)] == read[: 3 * taken]
    assert read != sorted(read)
    epoch += read
  assert sorted(epoch) == list(range(45))


def test_large_row_groups_are_not_read_for_one_row(numbered, monkeypatch):
  numbered(40, row_group_size=20)
  assert len(sources.configured('parquet').open('train')) == 40  # All rows fit into memory.
  monkeypatch.setattr(parquet, '_SMALL', 100)
  monkeypatch.setattr(parquet, '_KEPT', 100)
  monkeypatch.setattr(parquet, '_PART', 15)
  opened = sources.configured('parquet').open('train')
  assert [name.rpartition(', ')[2] for name in opened.files] == [
    'row groups 0 to 0',
    'row groups 1 to 1',
  ]
  assert len(sources.configured('parquet').open('train', pictures=False).files) == 2
  with gin.unlock_config():
    gin.parse_config("parquet.shuffle='global'")
  assert len(sources.configured('parquet').open('train')) == 40
  monkeypatch.setattr(parquet, '_LARGEST', 100)
  with pytest.raises(UserError, match="parquet.shuffle='window'"):
    sources.configured('parquet').open('train')


def test_parameters(write, encode):
  write({'image': [encode(RED)], 'caption': ['a']}, bindings=["parquet.shuffle='all'"])
  with pytest.raises(UserError, match="parquet.shuffle='all'.* global, window"):
    Batches('parquet_images', 'train', 1, IMAGES)
  write({'image': [encode(RED)], 'caption': ['a']}, bindings=["parquet.splits={'train': '*.pq'}"])
  with pytest.raises(UserError, match=r'parquet: .*\*.pq'):
    Batches('parquet_images', 'train', 1, IMAGES)
  write({'image': pa.array([], pa.binary()), 'caption': pa.array([], pa.string())})
  with pytest.raises(UserError, match='parquet_images, train: .*parquet '):
    next(Batches('parquet_images', 'train', 1, IMAGES))


def test_a_file_that_disappears_later(numbered):
  path = numbered(20, files=2)
  batches = Batches('parquet_images', 'train', 5, IMAGES, num_epochs=1)
  path.unlink()
  assert sorted(sum((_numbers(batch) for batch in batches), [])) == list(range(10))
  assert batches.skipped == {'file that is gone or cannot be read': 10}


def test_worker_processes_get_their_own(numbered):
  numbered(12, row_group_size=5)
  opened = sources.configured('parquet').open('train')
  copy = pickle.loads(pickle.dumps(opened))
  assert copy.read([7, 0, 11]) == opened.read([7, 0, 11])


def test_urls_are_read_in_windows(numbered, tmp_path):
  numbered(30, files=3, row_group_size=4)
  store = fsspec.filesystem('memory')
  for path in tmp_path.glob('*.parquet'):
    store.pipe(f'/bucket/{path.name}', path.read_bytes())
  gin_config.parse(['gin_configs/tasks/parquet.gin'], ["parquet.path='memory://bucket'"])
  batches = Batches('parquet_images', 'train', 6, IMAGES, num_epochs=1, shares=2)
  read = sum((_numbers(batch) for batch in batches), [])
  assert {number // 10 for number in read} in ({0, 2}, {0, 1}, {1, 2}) and len(read) == 20
  table = pa.table({'image': [b'x'] * 3, 'other': ['y'] * 3})
  with store.open('/bucket/00001.parquet', 'wb') as file:
    pq.write_table(table, file)
  store.pipe('/bucket/00002.parquet', b'cut')
  batches = Batches('parquet_images', 'train', 6, IMAGES, num_epochs=1)
  assert sorted(sum((_numbers(batch) for batch in batches), [])) == list(range(10))
  assert batches.skipped == {
    'Parquet file with other columns than the first': 1,
    'file that is gone or cannot be read': 1,
  }
  with gin.unlock_config():
    gin.parse_config("parquet.shuffle='global'")
  with pytest.raises(UserError, match="parquet.shuffle='global'.*memory://.*00000.parquet"):
    Batches('parquet_images', 'train', 6, IMAGES)


def test_a_failing_store_is_not_mistaken_for_damage(numbered, monkeypatch):
  path = numbered(30)
  store = fsspec.filesystem('memory')
  store.pipe('/failing/00000.parquet', path.read_bytes())
  gin_config.parse(['gin_configs/tasks/parquet.gin'], ["parquet.path='memory://failing'"])
  opened = sources.configured('parquet').open('train')

  def failing(*_, **__):
    raise OSError(errno.EIO, 'the store has failed')

  monkeypatch.setattr(type(store), 'cat_file', failing)
  with pytest.raises(UserError, match='00000.parquet: .*the store has failed'):
    list(opened.read(opened.files[0]))


def test_cached_values_are_made_once_and_bounded():

  class Thing:
    nbytes = 10

  cache, made = parquet_files.Cache(25), []
  barrier = threading.Barrier(4)

  def get():
    barrier.wait()
    cache.get('a', lambda: made.append('a') or Thing())

  threads = [threading.Thread(target=get) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == ['a']
  for key in 'bcbd':
    cache.get(key, lambda key=key: made.append(key) or Thing())
  assert made == list('abcd')
  cache.get('b', lambda: made.append('b again') or Thing())
  cache.get('a', lambda: made.append('a again') or Thing())
  assert made == [*'abcd', 'a again']
  with pytest.raises(ValueError):
    cache.get('e', lambda: int('x'))
  assert isinstance(cache.get('e', Thing), Thing)


def test_own_pictures_finds_them(numbered, tmp_path):
  numbered(3)
  assert own_plan.find_source(str(tmp_path)) == [
    "data.source = 'parquet'",
    f"parquet.path = '{tmp_path}'",
  ]


def test_own_pictures_ignores_tables_without_pictures(write, tmp_path):
  write({'url': ['http://x'], 'caption': ['a dog']})
  (tmp_path / '0.txt').write_text('a dog')
  assert own_plan.find_source(str(tmp_path))[0] == "data.source = 'folder'"
