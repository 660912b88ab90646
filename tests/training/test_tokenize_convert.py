"""Tests `parti-jax tokenize --convert`, from version 1 (TFRecords) to version 2."""

import json
import os

import pytest
import tensorflow as tf

from parti_jax.cli import main
from parti_jax.core import storage
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.tokenization import tokenize_jobs  # noqa: F401

INFO = {'codebook_size': 70_000, 'image_tokens': 4, 'tokenizer': 'abc', 'image_size': 16}
SPLITS = {'train': (3, 2, 1), 'validation': (2,)}


def _record(number, caption=None, tokens=None):
  caption = f'नंबर {number}' if caption is None else caption
  tokens = [number, 69_999, 0, 3] if tokens is None else tokens
  return tf.train.Example(
    features=tf.train.Features(
      feature={
        'caption': tf.train.Feature(bytes_list=tf.train.BytesList(value=[caption.encode()])),
        'targets': tf.train.Feature(int64_list=tf.train.Int64List(value=tokens)),
      }
    )
  ).SerializeToString()


def _write_shard(path, records):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      writer.write(record)


@pytest.fixture(name='old')
def _old(tmp_path):
  folder, entries = tmp_path / 'old', {}
  folder.mkdir()
  for split, counts in SPLITS.items():
    for shard, count in enumerate(counts):
      _write_shard(
        folder / f'{split}-{shard:05d}.tfrecord',
        [_record(10 * shard + number) for number in range(count)],
      )
    entries[split] = {
      'examples': sum(counts),
      'shards': len(counts),
      'bytes': [
        os.path.getsize(folder / f'{split}-{shard:05d}.tfrecord') for shard in range(len(counts))
      ],
    }
  (folder / 'info.json').write_text(json.dumps({**INFO, 'splits': entries}))
  return folder


def _convert(old, new, *flags):
  return main.main(['tokenize', f'--convert={old}', f'--output_dir={new}', *flags])


def _read(folder, split):
  records = token_cache.TokenCacheSource(str(folder)).open(split)
  return [
    (example['caption'].decode(), example['tokens'].tolist())
    for example in records.read(range(len(records)))
  ]


def test_examples_and_their_order_stay(old, tmp_path, capsys):
  assert _convert(old, tmp_path / 'new') == 0
  info = token_cache_info.read_info(str(tmp_path / 'new'))
  assert {key: info[key] for key in (*INFO, 'version')} == {**INFO, 'version': 2}
  for split, counts in SPLITS.items():
    numbers = [10 * shard + number for shard, count in enumerate(counts) for number in range(count)]
    assert _read(tmp_path / 'new', split) == [
      (f'नंबर {number}', [number, 69_999, 0, 3]) for number in numbers
    ]
    assert [shard['examples'] for shard in info['splits'][split]['shards']] == list(counts)
  out = capsys.readouterr().out
  assert f'the token cache {old} has the splits train, validation; use --splits' in out
  assert 'train: 6 pictures, 4 tokens each\n' in out


def test_by_several_workers(old, tmp_path):
  assert _convert(old, tmp_path / 'one') == 0
  for worker in (2, 0, 1):
    assert _convert(old, tmp_path / 'three', f'--worker={worker}/3') == 0
  found = [
    {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    for name in ('one', 'three')
  ]
  assert found[0] == found[1]


def test_to_and_from_a_store(old, tmp_path, s3_bucket):
  for path in old.iterdir():
    storage.upload(path, f'{s3_bucket}/old/{path.name}')
  assert _convert(f'{s3_bucket}/old', f'{s3_bucket}/new', '--splits', 'train') == 0
  assert _convert(old, tmp_path / 'new', '--splits', 'train') == 0
  assert (
    storage.read(f'{s3_bucket}/new/info.json', 10**6)
    == (tmp_path / 'new' / 'info.json').read_bytes()
  )
  assert list(token_cache_info.read_info(f'{s3_bucket}/new')['splits']) == ['train']


def test_damaged_records_are_counted(old, tmp_path, capsys):
  bad = [
    _record(0),
    _record(1, tokens=[1, 2, 3]),
    _record(2, tokens=[0, 0, 0, 70_000]),
    b'none',
    _record(3),
  ]
  _write_shard(old / 'train-00001.tfrecord', bad)
  content = bytearray((old / 'train-00001.tfrecord').read_bytes())
  content[-5] ^= 1  # The last byte of the last record.
  (old / 'train-00001.tfrecord').write_bytes(content)
  info = json.loads((old / 'info.json').read_text())
  info['splits']['train']['bytes'][1] = len(content)
  (old / 'info.json').write_text(json.dumps(info))
  assert _convert(old, tmp_path / 'new') == 0
  assert [example[1][0] for example in _read(tmp_path / 'new', 'train')] == [0, 1, 2, 0, 20]
  split = token_cache_info.read_info(str(tmp_path / 'new'))['splits']['train']
  assert split['skipped'] == {
    'record of another token cache': 2,
    'record of something else': 1,
    'record with a wrong checksum': 1,
  }
  assert 'train: 5 pictures, 4 tokens each; skipped: 2 record of another' in (
    capsys.readouterr().out
  )


def test_the_oldest_caches_have_no_sizes(old, tmp_path):
  info = json.loads((old / 'info.json').read_text())
  for split in info['splits'].values():
    del split['bytes']
  (old / 'info.json').write_text(json.dumps(info))
  assert _convert(old, tmp_path / 'new') == 0
  assert len(_read(tmp_path / 'new', 'train')) == 6


def _cut(old):
  with open(old / 'train-00001.tfrecord', 'r+b') as file:
    file.truncate(50)


@pytest.mark.parametrize(
  'harm, message',
  [
    (_cut, 'train-00001.tfrecord is damaged: it has 50 bytes, but was written with'),
    (lambda old: (old / 'train-00001.tfrecord').unlink(), 'train-00001.tfrecord is missing'),
    (lambda old: (old / 'info.json').unlink(), 'is not a token cache'),
    (lambda old: (old / 'info.json').write_text('{'), 'info.json is damaged'),
    (lambda old: (old / 'info.json').write_text('[]'), 'info.json is damaged'),
    (lambda old: (old / 'info.json').write_text('{"splits": {}}'), 'info.json is damaged'),
    (lambda old: (old / 'info.json').write_text('{"version": 2}'), 'already has version 2'),
  ],
)
def test_invalid_caches(old, tmp_path, harm, message, capsys):
  harm(old)
  assert _convert(old, tmp_path / 'new') == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_a_missing_split(old, tmp_path, capsys):
  assert _convert(old, tmp_path / 'new', '--splits', 'test') == 2
  assert "has no split 'test'; it has train, validation" in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--views=2', '--dtype=float32', '--gin.folder.path="a"'])
def test_flags_that_would_change_tokens(old, tmp_path, flag, capsys):
  assert _convert(old, tmp_path / 'new', flag) == 2
  name = '--gin' if flag.startswith('--gin') else flag.partition('=')[0]
  assert f'--convert keeps the tokens unchanged; omit {name}\n' in capsys.readouterr().err


def test_into_the_folder_itself(old, capsys):
  before = {path.name: path.read_bytes() for path in old.iterdir()}
  assert _convert(old, old) == 2
  assert 'has version 1; convert it to version 2 with: ' in capsys.readouterr().err
  assert {path.name: path.read_bytes() for path in old.iterdir()} == before
