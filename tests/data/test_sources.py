"""User data: a folder, TFRecords and tar shards, end to end to batches."""

import io
import json
import re
import tarfile

import gin
import numpy as np
import pytest
import tfrecord_files

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import sources
from parti_jax.data.batches import Batches

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
LENGTHS = {'inputs': 16, 'images': 8}


def _pairs():
  """Reads the pairs of the configured source once and returns {caption: picture}."""
  with gin.unlock_config():
    gin.parse_config('drop_text.rate = 0.0')
  batches = Batches('pairs', 'train', 4, LENGTHS, seed=3, num_epochs=1)
  vocabulary = datasets.get_vocabulary()
  read = {}
  for batch in batches:
    for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
      read[vocabulary.decode(ids)] = image
  return read, batches


def _check_colors(read):
  assert set(read) == {'red circle', 'green circle', 'blue circle'}
  for caption, color in zip(('red circle', 'green circle', 'blue circle'), (RED, GREEN, BLUE)):
    assert np.abs(read[caption].astype(int) - color).max() <= 3


def _examples(encode):
  """Captions and pictures: three good ones, and one for each reason to skip."""
  return [
    ('red circle', encode(RED)),
    ('broken', encode(BLUE, (50, 50))[:60]),
    ('green circle', encode(GREEN, (30, 20), 'jpeg', quality=100)),
    ('a page', b'<html>not found</html>'),
    ('', encode(BLUE)),
    ('blue circle', encode(BLUE, (20, 30), 'webp', lossless=True)),
  ]


SKIPPED = {'damaged picture': 1, 'unknown picture format': 1, 'no caption': 1}


@pytest.fixture
def tfrecords(tmp_path):

  def write(examples, image_key='image', caption_key='caption', path='train-0.tfrecord'):
    records = [
      tfrecord_files.example(**{image_key: picture, caption_key: caption.encode()})
      for caption, picture in examples
    ]
    (tmp_path / path).write_bytes(tfrecord_files.framed(records))
    gin_config.parse(['gin_configs/tasks/tfrecord.gin'], [f"tfrecord.path='{tmp_path}'"])
    return tmp_path

  return write


@pytest.fixture
def tars(tmp_path):

  def write(samples, path='00000.tar'):
    with tarfile.open(tmp_path / path, 'w') as shard:
      for name, files in samples.items():
        for ending, content in files.items():
          member = tarfile.TarInfo(f'{name}.{ending}')
          member.size = len(content)
          shard.addfile(member, io.BytesIO(content))
    gin_config.parse(['gin_configs/tasks/webdataset.gin'], [f"webdataset.path='{tmp_path}'"])
    return tmp_path

  return write


def test_folder(folder, encode, caplog):
  path = folder(_examples(encode))
  gin_config.parse(['gin_configs/tasks/folder.gin'], [f"folder.path='{path}'"])
  read, batches = _pairs()
  _check_colors(read)
  assert batches.skipped == SKIPPED
  assert '1 damaged picture' in caplog.text and re.search(r'\b0\b.*\b3\b', caplog.text)


def test_folder_with_other_columns_and_splits(tmp_path, encode):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'a.png').write_bytes(encode(RED))
  row = {'file_name': 'sub/a.png', 'text': 'red circle'}
  (tmp_path / 'held_out.jsonl').write_text(json.dumps(row) + '\n\n')
  gin_config.parse(
    ['gin_configs/tasks/folder.gin'],
    [
      f"folder.path='{tmp_path}'",
      "folder.splits={'test': 'held_out.jsonl'}",
      "folder.file_key='file_name'",
      "folder.caption_key='text'",
    ],
  )
  ((caption, image),) = datasets.pictures_and_captions('pairs', 'test', 8)
  assert caption == 'red circle' and (image == RED).all()
  with pytest.raises(UserError, match="folder .*'train'.* test .*folder.splits"):
    Batches('images', 'train', 1, {'images': 8})


@pytest.mark.parametrize(
  'line, message',
  [
    (
      '{"caption": "a", "name": "b"}',
      "line 2: .*'file'.* caption, name .*folder.file_key",
    ),
    ('{"file": "none.png", "caption": "a"}', 'line 2: .*none.png'),
    ('000.img a dog', 'line 2: .*JSON'),
    ('["000.img", "a dog"]', 'line 2: .*JSON'),
  ],
)
@pytest.mark.parametrize('times', [1, 3])
def test_folder_with_bad_lines(folder, encode, line, message, times):
  path = folder([('red circle', encode(RED))])
  with open(path / 'captions.jsonl', 'a', encoding='utf-8') as file:
    file.write(f'{line}\n' * times)
  with pytest.raises(UserError, match=f'captions.jsonl, {message}') as error:
    Batches('folder_images', 'train', 1, {'images': 8})
  assert bool(re.search(r' 2 [^2]*$', str(error.value))) == (times == 3)


def test_folder_without_captions_file_or_rows(tmp_path):
  gin.parse_config(f"folder.path = '{tmp_path}'")
  missing = r'captions.jsonl does not exist .*folder.path, folder.splits.*if each .*\*\*/\*\.txt'
  with pytest.raises(UserError, match=missing):
    Batches('folder_images', 'train', 1, {'images': 8})
  (tmp_path / 'captions.jsonl').write_text('\n')
  with pytest.raises(UserError, match='captions.jsonl'):
    Batches('folder_images', 'train', 1, {'images': 8})


@pytest.mark.parametrize('task', ['folder_images', 'folder_pairs'])
def test_folder_with_nothing_usable(folder, task):
  folder([('a dog', b'nothing'), ('a cat', b'at all')])
  lengths = {'images': 8} if task == 'folder_images' else LENGTHS
  with pytest.raises(UserError, match=f'{task}, train: .*folder .*2 unknown picture'):
    next(Batches(task, 'train', 1, lengths))
  with pytest.raises(UserError, match="folder .*'train'.*2 unknown picture"):
    next(datasets.pictures_and_captions('folder', 'train', 8))


def test_tfrecords(tfrecords, encode):
  examples = _examples(encode)
  tfrecords(examples[:2])
  tfrecords(examples[2:], path='train-1.tfrecord')
  read, batches = _pairs()
  _check_colors(read)
  assert batches.skipped == SKIPPED


def test_tfrecords_with_other_keys(tfrecords, encode):
  tfrecords([('red circle', encode(RED))], 'image/encoded', 'text')
  with pytest.raises(
    UserError,
    match=r"'image' .*image/encoded, text \(gin: tfrecord.image_key\)",
  ):
    Batches('images', 'train', 1, {'images': 8})
  with gin.unlock_config():
    gin.parse_config("tfrecord.image_key = 'image/encoded'\ntfrecord.caption_key = 'text'")
  ((caption, image),) = datasets.pictures_and_captions('tfrecord', 'train', 8)
  assert caption == 'red circle' and (image == RED).all()


def test_files_without_tfrecords(tmp_path):
  gin_config.parse(['gin_configs/tasks/tfrecord.gin'], [f"tfrecord.path='{tmp_path}'"])
  (tmp_path / 'train-0.tfrecord').write_bytes(b'no records at all')
  with pytest.raises(UserError, match='train-0.tfrecord.*tf.train.Example'):
    Batches('images', 'train', 2, {'images': 8})


def test_tar_shards(tars, encode, caplog):
  examples = _examples(encode)
  samples = {
    f'{i:05d}': {'jpg': picture, 'txt': caption.encode(), 'json': b'{}'}
    for i, (caption, picture) in enumerate(examples)
  }
  samples['00000'] = {'png': examples[0][1], 'json': b'{"caption": "red circle"}'}
  samples['00009'] = {'txt': b'without a picture', 'json': b'not json'}
  samples['00010'] = {'jpg': examples[0][1], 'json': b'not json'}
  first = dict(list(samples.items())[:3])
  tars(first)
  tars({name: files for name, files in samples.items() if name not in first}, '00001.tar')
  read, batches = _pairs()
  _check_colors(read)
  assert batches.skipped == {**SKIPPED, 'no caption': 2, 'no picture': 1}


def test_order_of_many_shards_is_decided_by_the_seed(tars, encode):
  for shard in range(5):
    samples = {f'{shard}{i}': {'png': encode((10 * shard + i, 0, 0))} for i in range(6)}
    tars(samples, f'{shard}.tar')
  read = []
  for seed in (1, 1, 2):
    batches = Batches('images', 'train', 30, {'images': 8}, seed=seed, num_epochs=2)
    read.append([batch['images'][:, 0, 0, 0].tolist() for batch in batches])
  assert read[0] == read[1] != read[2]
  every = [10 * shard + i for shard in range(5) for i in range(6)]
  assert sorted(read[0][0]) == sorted(read[0][1]) == every
  parts = [
    [
      i
      for batch in Batches(
        'images', 'train', 30, {'images': 8}, num_epochs=1, share=index, shares=count
      )
      for i in batch['images'][:, 0, 0, 0].tolist()
    ]
    for count in (2, 8)
    for index in range(count)
  ]
  assert sorted(sum(parts[:2], [])) == sorted(sum(parts[2:], [])) == every


@pytest.mark.parametrize('source', ['tfrecord', 'webdataset'])
def test_no_files(tmp_path, source):
  with pytest.raises(UserError, match=f'--gin.{source}.path='):
    Batches(f'{source}_images', 'train', 1, {'images': 8})
  gin.parse_config(f"{source}.path = '{tmp_path}'")
  with pytest.raises(UserError, match=f'{source}: .*{source}.path, {source}.splits'):
    Batches(f'{source}_images', 'train', 1, {'images': 8})


def test_unknown_source():
  gin.parse_config("data.source = 'foldr'")
  with pytest.raises(UserError, match="data.source = 'foldr'.* openmoji, folder"):
    Batches('images', 'train', 1, {'images': 8})


def test_tfrecords_are_described_by_their_other_features(tmp_path):
  record = tfrecord_files.example(
    image=b'1',
    caption=b'one',
    key=b'12',
    clip=[0.5],
    width=[7],
    several=[1.0, 2.0],
    long=b'a' * (2**16 + 1),
    none=[],
    bytes=b'\xff',
  )
  (tmp_path / 'train-0.tfrecord').write_bytes(tfrecord_files.framed([record]))
  gin_config.parse(['gin_configs/tasks/tfrecord.gin'], [f"tfrecord.path='{tmp_path}'"])
  source = sources.configured('tfrecord')
  described = source.open_described('train')
  assert list(described.read(described.files[0])) == [
    {
      'picture': b'1',
      'caption': b'one',
      'key': '12',
      'columns': {'key': '12', 'clip': 0.5, 'width': 7, 'bytes': '\ufffd'},
    }
  ]
  assert list(source.examples('train')) == [{'picture': b'1', 'caption': b'one'}]
