"""Files by path and by URL: local, in fsspec's memory, and on object stores on the loopback."""

import contextlib
import pathlib
import socket

import numpy as np
import pytest

from parti_jax.core import errors
from parti_jax.core import optional_packages
from parti_jax.core import storage
from parti_jax.data import token_cache


@pytest.fixture(params=['local', 'memory', 's3', 'gs'])
def folder(request, tmp_path):
  """A folder on a disk, in memory and in stores, as a path or URL."""
  if request.param == 'local':
    return str(tmp_path)
  if request.param == 'memory':
    return f'memory:///{tmp_path.name}'
  return storage.join(request.getfixturevalue(f'{request.param}_bucket'), tmp_path.name)


@contextlib.contextmanager
def _new_file_systems(kind):
  """Makes fsspec read the environment again, before and after."""
  import fsspec

  kind = fsspec.get_filesystem_class(kind)
  kind.clear_instance_cache()
  yield
  kind.clear_instance_cache()


def test_written_files_are_read_and_listed(folder):
  path = storage.join(folder, 'run', 'config.gin')
  assert not storage.exists(path) and not storage.exists(folder + '/run')
  storage.write(path, 'a = "ä"\n')
  storage.write(path, 'b = "ä"\n')
  storage.write(storage.join(folder, 'run', 'another'), b'')
  assert storage.read(path, 9) == 'b = "ä"\n'.encode()
  assert storage.read(storage.join(folder, 'run', 'another'), 0) == b''
  assert storage.exists(path) and not storage.is_folder(path) and storage.size(path) == 9
  assert storage.exists(folder + '/run') and storage.is_folder(folder + '/run')
  # Nothing remains of the first content.
  assert storage.glob(folder + '/run/*') == [folder + '/run/another', path]
  assert storage.glob(folder + '/*/c*.gin') == [path]
  assert storage.glob(folder + '/nothing/*') == []
  assert storage.names(folder + '/run') == ['another', 'config.gin']
  assert storage.names(folder) == ['run'] and storage.names(folder + '/nothing') == []
  assert storage.sizes(folder) == {'run/another': 0, 'run/config.gin': 9}
  with storage.open_file(path, 'rt') as file:
    assert list(file) == ['b = "ä"\n']
  with storage.open_file(path) as file:
    assert file.read(2) == b'b '
  with storage.local_copy(path) as copy:
    assert pathlib.Path(copy).read_text(encoding='utf-8') == 'b = "ä"\n'
  storage.remove(path)
  assert storage.glob(folder + '/run/*') == [folder + '/run/another']


def test_missing_and_too_large_files(folder):
  path = storage.join(folder, 'file')
  with pytest.raises(FileNotFoundError) as caught:
    storage.read(path, 10)
  assert caught.value.filename == path
  with pytest.raises(FileNotFoundError), storage.open_file(path):
    pass
  storage.write(path, b'12345')
  with pytest.raises(
    errors.UserError, match=r'file: has 5 bytes, but such a file may have at most 4;'
  ):
    storage.read(path, 4)


def test_errors_of_the_caller_pass_through(folder):
  path = storage.join(folder, 'file')
  storage.write(path, b'12345')
  with pytest.raises(OSError, match='disk full'), storage.open_file(path):
    raise OSError('disk full')


def test_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / 'config.gin'
  storage.write(path, 'b = 2\n')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr('os.replace', fail)
  monkeypatch.setattr('os.rename', fail)
  with pytest.raises(OSError, match='disk full'):
    storage.write(path, 'c = 3\n')
  assert path.read_text() == 'b = 2\n'
  assert [p.name for p in tmp_path.iterdir()] == ['config.gin']


def test_unwritable_paths_are_detected_early(tmp_path, monkeypatch):
  storage.check_can_write('--output_dir=x', tmp_path / 'not' / 'there' / 'yet')
  storage.check_can_write('--output_dir=x', f'file://{tmp_path}/new')
  assert not (tmp_path / 'not').exists()
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    errors.UserError, match=r'--output_dir=x: .*/file is not a folder; choose another'
  ):
    storage.check_can_write('--output_dir=x', tmp_path / 'file' / 'below')
  storage.check_can_write('--output=x', tmp_path / 'file')
  monkeypatch.setattr(storage.os, 'access', lambda path, mode: False)  # Root may write anywhere.
  with pytest.raises(
    errors.UserError, match='--output_dir=x: .* is not writable; make it writable'
  ):
    storage.check_can_write('--output_dir=x', tmp_path / 'new')


def test_upload(s3_bucket, tmp_path):
  (tmp_path / 'file').write_bytes(b'12345')
  storage.upload(tmp_path / 'file', s3_bucket + '/uploaded')
  assert storage.read(s3_bucket + '/uploaded', 5) == b'12345'


def test_paths_and_urls():
  assert storage.is_url('gs://bucket/a') and storage.is_url('s3://bucket')
  assert not storage.is_url('/a/b') and not storage.is_url('file:///a/b')
  assert not storage.is_url(pathlib.Path('a/b')) and not storage.is_url('/a/b://c')
  assert storage.join('gs://bucket/a', 'b', 'c') == 'gs://bucket/a/b/c'
  assert storage.name('gs://bucket/a/') == 'a' and storage.name(pathlib.Path('a/b')) == 'b'


def test_file_urls_are_local(tmp_path):
  (tmp_path / 'file').write_text('1')
  assert storage.glob(f'file://{tmp_path}/*') == [str(tmp_path / 'file')]
  assert storage.read(f'file://{tmp_path}/file', 1) == b'1'


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_a_token_cache_is_written_to_and_read_from_a_store(kind, request):
  info = {'codebook_size': 8, 'image_tokens': 4, 'tokenizer': 'none'}
  examples = [(f'words {i}', np.arange(4) + i) for i in range(3)]
  url = request.getfixturevalue(f'{kind}_bucket') + '/tokens'
  token_cache.write_token_cache(url, examples, info)
  assert storage.names(url) == ['info.json', 'train-00000.array_record']
  read = token_cache.TokenCacheSource(url).examples('train')
  for example, (caption, tokens) in zip(read, examples, strict=True):
    assert example['caption'].decode() == caption
    np.testing.assert_array_equal(example['tokens'], tokens)


def test_missing_files_cannot_be_moved(tmp_path, s3_bucket):
  for folder in (str(tmp_path), s3_bucket + '/moving'):
    storage.write(storage.join(folder, 'a'), b'1')
    storage.move(storage.join(folder, 'a'), storage.join(folder, 'b'))
    assert storage.names(folder) == ['b']
    with pytest.raises(FileNotFoundError):
      storage.move(storage.join(folder, 'a'), storage.join(folder, 'b'))
    assert storage.read(storage.join(folder, 'b'), 1) == b'1'


def test_sizes_of_a_folder_in_which_another_process_moves_files(tmp_path, monkeypatch):
  for name in 'abc':
    (tmp_path / name).write_text(name)
  is_file = pathlib.Path.is_file

  def moved(path):
    found = is_file(path)
    if path.name == 'b':
      path.unlink()
    return found

  monkeypatch.setattr(pathlib.Path, 'is_file', moved)
  assert storage.sizes(tmp_path) == {'a': 1, 'c': 1}


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_missing_bucket(kind, request):
  request.getfixturevalue(f'{kind}_bucket')
  assert not storage.exists(f'{kind}://no-such-bucket/file')
  with pytest.raises(FileNotFoundError):
    storage.read(f'{kind}://no-such-bucket/file', 10)
  with pytest.raises(errors.UserError, match='no-such-bucket/file: the bucket .* create it first'):
    storage.write(f'{kind}://no-such-bucket/file', 'a')


def test_unknown_scheme_and_missing_package(monkeypatch):
  with pytest.raises(errors.UserError, match='abc://bucket/file: .*abc'):
    storage.read('abc://bucket/file', 10)
  missing = optional_packages.missing_extra(ModuleNotFoundError("No module named 's3fs'"))
  assert missing.endswith('pip install "parti_jax[s3]"')

  def fail(*_):
    raise ImportError('Install s3fs') from ModuleNotFoundError("No module named 's3fs'")

  monkeypatch.setattr('fsspec.core.url_to_fs', fail)
  with pytest.raises(errors.UserError, match=r's3://b/a: .*pip install "parti_jax\[s3\]"'):
    storage.exists('s3://b/a')


def test_no_credentials(s3_bucket, monkeypatch, tmp_path):
  for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
    monkeypatch.delenv(name)
  monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'none'))
  monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
  with _new_file_systems('s3'), pytest.raises(errors.UserError, match='no credentials .*AWS_ACC'):
    storage.write(s3_bucket + '/file', 'a')


def test_refused_connection(s3_bucket, monkeypatch):
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))  # It never listens.
    monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:{unused.getsockname()[1]}')
    monkeypatch.setenv('PARTI_JAX_STORE_SECONDS', '2')
    with (
      _new_file_systems('s3'),
      pytest.raises(errors.UserError, match='file: the store cannot be reached .*AWS_ENDPOINT_URL'),
    ):
      storage.write(s3_bucket + '/file', 'a')


@pytest.mark.parametrize('end', [b'\r', b'\n', b'\r\n', b'\0', b' '])
def test_content_may_end_with_anything(gs_bucket, end):
  content = b'--x\r\n\r\n' + end
  storage.write(f'{gs_bucket}/ends/{end.hex()}', content)
  assert storage.read(f'{gs_bucket}/ends/{end.hex()}', 100) == content
