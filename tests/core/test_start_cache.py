"""What starts keep for later ones: only entries that are whole and the user's own are read."""

import dataclasses
import os

import jax
import pytest
import tiny_configs

import parti_jax
from parti_jax.cli import main
from parti_jax.core import compilation_cache
from parti_jax.core import errors
from parti_jax.core import start_cache
from parti_jax.core import user_modules
from parti_jax.sampling import text_to_image


@pytest.fixture(name='folder')
def _folder(tmp_path, monkeypatch):
  """The entries' folder of a cache in use; the sources count as older than this process."""
  monkeypatch.setattr(start_cache, '_IMPORTED', float('inf'))
  start_cache._environment.cache_clear()
  start_cache.use(tmp_path)
  yield tmp_path / 'starts'
  start_cache.use(None)
  start_cache._environment.cache_clear()


def test_an_entry_is_read_as_it_was_written(folder):
  key = start_cache.key('a', 1)
  assert start_cache.read(key) is None
  start_cache.write(key, b'content')
  assert start_cache.read(key) == b'content'
  start_cache.write(key, b'other')
  assert start_cache.read(key) == b'other'
  assert os.listdir(folder) == [key]


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
  def interrupted(*unused_args):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', interrupted)
  with pytest.raises(KeyboardInterrupt):
    start_cache.write(start_cache.key('a'), b'content')
  assert not os.listdir(folder)


def test_what_was_not_used_for_longest_is_removed(folder, monkeypatch):
  keys = [start_cache.key(name) for name in 'abcd']
  for age, key in enumerate(reversed(keys[:3])):
    start_cache.write(key, b'content')
    os.utime(folder / key, (1e9 - age, 1e9 - age))
  (folder / 'unfinished').write_bytes(b'of a process that was killed')
  os.utime(folder / 'unfinished', (0, 0))
  assert start_cache.read(keys[0]) == b'content'
  monkeypatch.setattr(start_cache, '_MOST_BYTES', 3 * (32 + len(b'content')))
  start_cache.write(keys[3], b'content')
  assert set(os.listdir(folder)) == {keys[0], keys[2], keys[3]}


@pytest.mark.parametrize('modules', [[], ['mine']])
@pytest.mark.parametrize(
  'arguments',
  [['generate', 'red apple'], ['prompts', 'prompts.tsv'], ['evaluate', '--dataset=openmoji']],
  ids=lambda arguments: arguments[0],
)
def test_commands_use_the_cache_unless_the_user_has_modules(
  tmp_path, monkeypatch, arguments, modules
):
  def stop(*unused_args, **unused_kwargs):
    raise errors.UserError('the end of the test')

  monkeypatch.chdir(tmp_path)
  (tmp_path / 'prompts.tsv').write_text('Prompt\tCategory\tChallenge\tNote\na\tb\tc\td\n')
  monkeypatch.setattr(compilation_cache, 'enable', lambda: tmp_path)
  monkeypatch.setattr(user_modules, '_loaded', modules)
  monkeypatch.setattr(start_cache, '_folder', None)
  for module in (parti_jax, text_to_image):
    monkeypatch.setattr(module, 'load', stop)
  assert main.main([*arguments, '--output_dir=out']) == 2
  assert start_cache._folder == (None if modules else tmp_path / 'starts')


def test_nothing_is_kept_without_a_folder(folder):
  key = start_cache.key('a')
  start_cache.use(None)
  assert start_cache.key('a') is None
  start_cache.write(key, b'content')
  assert start_cache.read(key) is None and not folder.exists()
  start_cache.use(folder / 'no' / 'such')
  start_cache.write(key, b'content')
  assert start_cache.read(key) is None


@pytest.mark.parametrize('position', [0, 31, 32, 38])
def test_a_damaged_entry_is_none(folder, position):
  key = start_cache.key('a')
  start_cache.write(key, b'content')
  content = bytearray((folder / key).read_bytes())
  content[position] ^= 1
  (folder / key).write_bytes(content)
  assert start_cache.read(key) is None
  (folder / key).write_bytes(content[:position])
  assert start_cache.read(key) is None


@pytest.mark.parametrize('mode', [0o777, 0o770, 0o722])
@pytest.mark.parametrize('of', ['folder', 'file'])
def test_what_others_may_write_is_not_read(folder, mode, of):
  key = start_cache.key('a')
  start_cache.write(key, b'content')
  os.chmod(folder if of == 'folder' else folder / key, mode)
  assert start_cache.read(key) is None
  os.chmod(folder if of == 'folder' else folder / key, 0o700)
  assert start_cache.read(key) == b'content'


@pytest.mark.parametrize('whose', ['folder', 'file'])
def test_what_others_own_is_not_read(folder, whose, monkeypatch):
  key = start_cache.key('a')
  start_cache.write(key, b'content')
  stat = {'folder': 'lstat', 'file': 'fstat'}[whose]
  real = getattr(os, stat)

  def of_another(*args, **kwargs):
    values = list(real(*args, **kwargs))
    values[4] += 1  # st_uid
    return os.stat_result(values)

  monkeypatch.setattr(os, stat, of_another)
  assert start_cache.read(key) is None


def test_a_link_in_place_of_the_folder_is_not_followed(folder, tmp_path):
  key = start_cache.key('a')
  start_cache.write(key, b'content')
  folder.rename(tmp_path / 'elsewhere')
  folder.symlink_to(tmp_path / 'elsewhere')
  assert start_cache.read(key) is None


@pytest.mark.usefixtures('folder')
def test_the_key_depends_on_parts_versions_settings_and_sources(tmp_path, monkeypatch):
  keys = [start_cache.key('a', 1), start_cache.key('a', 2), start_cache.key('b', 1)]
  assert start_cache.key('a', 1) == keys[0]
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', '') + ' ')
  keys.append(start_cache.key('a', 1))
  monkeypatch.undo()
  monkeypatch.setattr(start_cache, '_IMPORTED', float('inf'))
  with monkeypatch.context() as changed:
    changed.setattr(jax, '__version__', '0.0')
    start_cache._environment.cache_clear()
    keys.append(start_cache.key('a', 1))
  for text in ('x = 1\n', 'x = 2\n'):
    (tmp_path / 'package' / 'models').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'package' / 'models' / 'net.py').write_text(text)
    with monkeypatch.context() as changed:
      changed.setattr(start_cache, '_SOURCES', ('models',))
      changed.setattr(start_cache.parti_jax, '__file__', str(tmp_path / 'package' / '__init__.py'))
      start_cache._environment.cache_clear()
      keys.append(start_cache.key('a', 1))
  assert len(set(keys)) == len(keys) and None not in keys
  with monkeypatch.context() as changed:  # A package whose sources can't be found.
    changed.setattr(start_cache.parti_jax, '__file__', str(tmp_path / 'archive.zip' / 'of.py'))
    start_cache._environment.cache_clear()
    assert start_cache.key('a', 1) is None


@pytest.mark.usefixtures('folder')
def test_no_key_if_a_source_has_changed_since_its_import(monkeypatch):
  assert start_cache.key('a')
  monkeypatch.setattr(start_cache, '_IMPORTED', 0.0)
  start_cache._environment.cache_clear()
  assert start_cache.key('a') is None


def test_configs_of_other_code_are_told_apart():
  @dataclasses.dataclass(frozen=True)
  class Theirs:
    inner: object = None

  assert start_cache.is_package_code(tiny_configs.TOKENIZER)
  assert not start_cache.is_package_code(Theirs())
  ours = dataclasses.replace(tiny_configs.TOKENIZER)
  for theirs in (Theirs(), (1, Theirs()), object(), len):
    object.__setattr__(ours, 'dtype', theirs)
    assert not start_cache.is_package_code(ours)
  object.__setattr__(ours, 'dtype', (1, 'a', None, (0.5, tiny_configs.VQGAN)))
  assert start_cache.is_package_code(ours)
