"""Patterns with braces: their expansion, on disks and at URLs, and missing files."""

import fsspec
import gin
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import sources
from parti_jax.data.batches import Batches
from parti_jax.data.readers import file_patterns
from parti_jax.data.readers import tar_shards


@pytest.mark.parametrize(
  'pattern, expected',
  [
    ('{0..2}.tar', ['0.tar', '1.tar', '2.tar']),
    ('{008..011}', ['008', '009', '010', '011']),
    ('{2..0}', ['2', '1', '0']),
    ('{0..10..5}', ['0', '5', '10']),
    ('{-1..1}', ['-1', '0', '1']),
    ('{c..a}', ['c', 'b', 'a']),
    ('{a,b}/{0..1}', ['a/0', 'a/1', 'b/0', 'b/1']),
    ('x{a,b{1..2},}', ['xa', 'xb1', 'xb2', 'x']),
    ('{{a,b},c}', ['a', 'b', 'c']),
    ('{{0..1},{5..6}}', ['0', '1', '5', '6']),
    ('a', ['a']),
    ('{a}', ['{a}']),
    ('{}', ['{}']),
    ('{a', ['{a']),
    ('a}', ['a}']),
    ('{a,{b', ['{a,{b']),
    ('{x{0..1}}', ['{x0}', '{x1}']),
    ('{0...2}', ['{0...2}']),
    ('[{]a,b[}]', ['[{]a,b[}]']),
    ('{a..3}', ['{a..3}']),
  ],
)
def test_expanded(pattern, expected):
  assert file_patterns.expanded(pattern) == expected


@pytest.mark.parametrize(
  'pattern', ['{0..9999999}', '{0..999}{0..999}{0..9}', '{0..9' + '9' * 15 + '}']
)
def test_too_many_files(pattern):
  with pytest.raises(UserError, match='1,000,000'):
    file_patterns.expanded(pattern)


@pytest.fixture(name='place', params=['path', 'url'])
def _place(request, tmp_path):
  """A folder with files, on a disk or at a URL."""
  names = [f'{folder}/{i:03d}.tar' for folder in ('a', 'b') for i in range(12)]
  if request.param == 'path':
    for name in names:
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).touch()
    yield str(tmp_path)
    return
  system = fsspec.filesystem('memory')
  for name in names:
    system.pipe_file(f'/patterns/{name}', b'')
  yield 'memory://patterns'
  system.rm('/patterns', recursive=True)


def _found(place, pattern):
  files = file_patterns.files(file_patterns.join(place, pattern))
  assert all(file.startswith(place.split('://')[0]) for file in files)
  return [file.split('/', file.count('/') - 1)[-1] for file in files]


@pytest.mark.parametrize(
  'pattern, count',
  [
    ('a/{000..011}.tar', 12),
    ('{a,b}/{000..011}.tar', 24),
    ('{a,b}/*.tar', 24),
    ('{a,b}/01{0,1}.tar', 4),
    ('a/{002..004}.{tar,tar}', 3),
    ('*/{000,001}.tar', 4),
    ('a/00?.tar', 10),
    ('b/{*}.tar', 0),
    ('c/*', 0),
  ],
)
def test_files(place, pattern, count):
  found = _found(place, pattern)
  assert len(found) == len(set(found)) == count and found == sorted(found)


def test_a_missing_file_is_named(place):
  with pytest.raises(
    UserError,
    match=r"\b14\b.*'.*/a/\{000\.\.013\}\.tar' 2 .*: .*/a/012\.tar, .*/a/013\.tar$",
  ):
    _found(place, 'a/{000..013}.tar')
  with pytest.raises(UserError, match=r' 100 .*: .*/c/000.tar, .*002.tar.*\b97\b'):
    _found(place, '{a,c}/{000..099}.tar'.replace('a,', '').replace('{c}', 'c'))
  with pytest.raises(UserError, match=r' 1 .*: .*/c/\*\.tar$'):
    _found(place, '{a,c}/*.tar')


@pytest.mark.parametrize('name', ['photos [2020]', '{a,b}', 'a*', 'what?', '[{]'])
def test_a_folders_name_is_not_a_pattern(tmp_path, name):
  (tmp_path / name).mkdir()
  for i in range(3):
    (tmp_path / name / f'{i}.tar').touch()
  for pattern in ('*.tar', '{0..2}.tar'):
    assert file_patterns.files(file_patterns.join(tmp_path / name, pattern)) == [
      str(tmp_path / name / f'{i}.tar') for i in range(3)
    ]


def test_sources_read_all_files_of_a_range(tmp_path, write_tar, encode):
  for i in range(4):
    write_tar(tmp_path / f'{i:03d}.tar', [('0.png', encode((i, i, i)))])
  gin.parse_config(
    f"webdataset.path = '{tmp_path}'\nwebdataset.splits = {{'train': '{{000..002}}.tar'}}"
  )
  batches = Batches('webdataset_images', 'train', 3, {'images': 8}, num_epochs=1)
  assert sorted(next(batches)['images'][:, 0, 0, 0]) == [0, 1, 2]
  (tmp_path / '001.tar').unlink()
  with pytest.raises(
    UserError,
    match=r'webdataset: .* 1 .*/001.tar \(gin: webdataset.path, webdataset.splits\)',
  ):
    Batches('webdataset_images', 'train', 3, {'images': 8}, num_epochs=1)


@pytest.mark.parametrize('name', ['tfrecord', 'text'])
def test_other_sources_support_braces(tmp_path, name):
  gin.parse_config(f"{name}.path = '{tmp_path}'\n{name}.splits = {{'train': '{{a,b}}.x'}}")
  (tmp_path / 'a.x').touch()
  with pytest.raises(UserError, match=f'{name}: .* 1 .*: .*/b.x'):
    sources.configured(name).files('train')
  (tmp_path / 'b.x').touch()
  assert len(sources.configured(name).files('train')) == 2


def test_shards_at_a_url(write_tar, tmp_path):
  data = write_tar(tmp_path / '0.tar', [('0.jpg', b'1'), ('0.txt', b'a dog')]).read_bytes()
  system = fsspec.filesystem('memory')
  for i in range(2):
    system.pipe_file(f'/shards/{i}.tar', data)
  files = file_patterns.files('memory://shards/{0..1}.tar')
  assert [list(tar_shards.samples(file, None)) for file in files] == [
    [{'picture': b'1', 'caption': b'a dog'}]
  ] * 2
  system.rm('/shards', recursive=True)
