"""A later start traces no network, reads only those it uses, and draws the same pictures."""

import dataclasses
import gc
import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_configs

import parti_jax
from parti_jax.core import garbage
from parti_jax.core import start_cache
from parti_jax.core import user_modules
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.models import vit_vqgan
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import kept_programs
from parti_jax.sampling import speculative

_ABSTRACT = model_folder.abstract
SETTINGS = {
  'plain': {},
  'without guidance': {'guidance_scale': 1.0},
  'early exit': {'exit_threshold': 0.5, 'guidance_skip_threshold': 0.5},
  'speculative': {'speculative_window': 2},
}


@pytest.fixture(name='cache')
def _cache(tmp_path, monkeypatch):
  """A cache in use, and empty."""
  monkeypatch.setattr(start_cache, '_IMPORTED', float('inf'))
  start_cache._environment.cache_clear()
  start_cache.use(tmp_path)
  _forget()
  yield tmp_path / 'starts'
  start_cache.use(None)
  start_cache._environment.cache_clear()
  _forget()


def _forget():
  """Forgets what a new process would not know."""
  kept_programs._programs.clear()
  _ABSTRACT.cache_clear()


def _tracing(*unused_args, **unused_kwargs):
  raise AssertionError('traced again')


@pytest.fixture(name='no_tracing')
def _no_tracing(monkeypatch):
  """Returns a function after which nothing can be traced."""

  def forbid():
    for module in (decoding, adaptive, speculative):
      monkeypatch.setattr(module, 'sample_tokens', _tracing)
    monkeypatch.setattr(vit_vqgan.ViTVQGAN, 'detokenize', _tracing)
    monkeypatch.setattr(model_folder, 'abstract', _tracing)

  return forbid


@pytest.mark.parametrize('name', SETTINGS)
def test_a_later_start_traces_nothing(name, tiny_folder, cache, no_tracing):
  def draw():
    return parti_jax.load(tiny_folder).generate('red apple', num_images=2, **SETTINGS[name])

  first = draw()
  assert len(list(cache.iterdir())) == 3  # Two networks' shapes, and a program.
  _forget()
  no_tracing()
  later = draw()
  for part in ('images', 'tokens', 'usage', 'passes'):
    jax.tree.map(np.testing.assert_array_equal, getattr(later, part), getattr(first, part))


@pytest.mark.usefixtures('cache')
def test_the_same_pictures_as_without_the_cache(tiny_folder):
  model = parti_jax.load(tiny_folder)
  kept = model.generate('red apple', num_images=2)
  assert kept_programs._programs
  start_cache.use(None)
  _forget()
  plain = model.generate('red apple', num_images=2)
  assert not kept_programs._programs
  np.testing.assert_array_equal(kept.images, plain.images)
  np.testing.assert_array_equal(kept.tokens, plain.tokens)


@pytest.mark.usefixtures('cache')
def test_what_changes_a_program_changes_its_name(tiny_folder, parts, tmp_path, monkeypatch):
  model, names = parti_jax.load(tiny_folder), []

  def program(name, *unused_args):
    names.append(name)
    raise RuntimeError('not needed')

  monkeypatch.setattr(kept_programs, '_program', program)

  def draw(of=model, **settings):
    with pytest.raises(RuntimeError, match='not needed'):
      of.generate('red apple', **{'num_images': 2} | settings)
    return names[-1]

  # Arguments that are not part of the program.
  assert len({draw(), draw(seed=3), draw(temperature=0.5), draw(top_p=0.5)}) == 1
  different = [
    draw(),
    draw(num_images=3),
    draw(temperature=0.0),
    draw(guidance_scale=1.0),
    draw(top_p=1.0),
    draw(exit_threshold=0.5),
    draw(guidance_skip_threshold=0.5),
    draw(speculative_window=2),
    draw(speculative_window=3),
    draw(speculative_window=2, speculative_rule='equal'),
    draw(speculative_window=2, speculative_drafts='above'),
    draw(parti_jax.load(tiny_folder, weights='int8')),
  ]
  for field in ('generator_config', 'tokenizer_config'):
    other = dataclasses.replace(parts[field], remat='block_inputs')
    folder = model_folder.save(tmp_path / field, dtype='float32', **parts | {field: other})
    different.append(draw(parti_jax.load(folder)))
  before = jax.config.jax_traceback_filtering
  jax.config.update('jax_traceback_filtering', 'off')
  try:
    different.append(draw())
  finally:
    jax.config.update('jax_traceback_filtering', before)
  assert not [number for number, name in enumerate(different) if different.count(name) > 1]


@pytest.mark.parametrize('content', [b'', b'no program', None])
def test_an_entry_that_is_no_program_is_replaced(content, tiny_folder, cache):
  model = parti_jax.load(tiny_folder)
  first = model.generate('red apple', num_images=2)
  (entry,) = (path for path in cache.iterdir() if path.stat().st_size > 10_000)
  whole = entry.read_bytes()
  if content is None:  # A program for other arguments.
    model.generate('red apple', num_images=3)
    (content,) = (
      path.read_bytes()[32:]
      for path in cache.iterdir()
      if path.stat().st_size > 10_000 and path != entry
    )
  start_cache.write(entry.name, content)
  _forget()
  later = model.generate('red apple', num_images=2)
  np.testing.assert_array_equal(later.images, first.images)
  assert len(entry.read_bytes()) > len(whole) // 2
  assert kept_programs.export.deserialize(bytearray(start_cache.read(entry.name)))


@pytest.mark.parametrize('content', [b'', b'3', b'{"a": 3}', b'{"a": ["x"]}'])
def test_shapes_that_are_none_are_replaced(content, tiny_folder, cache):
  model_folder.load(tiny_folder)
  whole = {path.name: path.read_bytes() for path in cache.iterdir()}
  for name in whole:
    start_cache.write(name, content)
  _forget()
  model_folder.load(tiny_folder)
  assert {path.name: path.read_bytes() for path in cache.iterdir()} == whole


def test_kept_shapes_are_compared_with_the_file(parts, cache, tmp_path):
  folder = model_folder.save(tmp_path / 'model', dtype='float32', **parts)
  model_folder.load(folder)
  params = parts['tokenizer_params'] | {'more': np.zeros(3, np.float32)}
  parameter_files.write(folder / 'tokenizer.safetensors', params, 'float32', {})
  _forget()
  assert list(cache.iterdir())
  with pytest.raises(UserError, match='more is not part of the network'):
    model_folder.load(folder)


class _Theirs(nn.Module):
  config: vit_vqgan.ViTVQGANConfig
  by: int


def test_functions_and_configs_of_other_code_are_not_kept(cache):
  assert kept_programs.call(jax.jit(lambda x: x + 1), (np.float32(1),), {}) == 2
  other = kept_programs.keep(jax.jit(lambda x, config: x + config.by, static_argnames='config'))
  config = dataclasses.make_dataclass('Theirs', [('by', int)], frozen=True)(2)
  assert kept_programs.call(other, (np.float32(1),), {'config': config}) == 3
  theirs = _Theirs(tiny_configs.TOKENIZER, 4)
  assert kept_programs.call(other, (np.float32(1),), {'config': theirs}) == 5
  assert not cache.exists()


@pytest.mark.parametrize('more', [False, True])
def test_a_module_is_kept_if_its_config_determines_it(cache, more):
  function = kept_programs.keep(jax.jit(lambda x, module: x + 1, static_argnames='module'))
  module = vit_vqgan.ViTVQGAN(tiny_configs.TOKENIZER)
  module = module.clone(name='other') if more else module
  assert kept_programs.call(function, (np.float32(1),), {'module': module}) == 2
  assert cache.exists() != more


def test_linear_algebra_is_loaded_for_programs_that_use_it():
  matrix = np.eye(3, dtype=np.float32)
  of = lambda function: kept_programs.export.export(jax.jit(function))(matrix)
  solved, added = of(jax.numpy.linalg.cholesky), of(lambda x: x + 1)
  assert kept_programs._without_lapack(solved) is solved
  assert 'cpu' not in kept_programs._without_lapack(added).platforms


def test_networks_are_read_when_they_are_used(parts, enlarger, tmp_path, monkeypatch):
  folder = model_folder.save(tmp_path / 'model', parts={'super_resolution': enlarger}, **parts)
  opened, read = [], parameter_files.read
  monkeypatch.setattr(
    parameter_files, 'read', lambda path, *args: opened.append(path.stem) or read(path, *args)
  )
  model = parti_jax.load(folder)
  model.generate('red apple', num_images=1)
  assert opened == ['generator', 'tokenizer']
  model.generate('red apple', num_images=1, upscale=True)
  model.generate('red apple', num_images=1, upscale=True)
  assert opened == ['generator', 'tokenizer', 'super_resolution']
  assert model.ranker is None


@pytest.mark.process
def test_two_starts_of_the_command(tiny_folder, tmp_path):
  """The later one traces nothing of ours and compiles nothing; with a user's module, nothing is kept."""
  code = (
    'import sys\n'
    'import jax\n'
    'counts = {}\n'
    'def count(event, *unused, **also):\n'
    '  counts[event] = counts.get(event, 0) + 1\n'
    'jax.monitoring.register_event_listener(count)\n'
    'jax.monitoring.register_event_duration_secs_listener(count)\n'
    'from parti_jax.cli import main\n'
    'sys.argv[1:1] = ["generate", "red apple", "--num_images=1"]\n'
    'status = main.main()\n'
    'of = lambda name: sum(n for event, n in counts.items() if event.endswith(name))\n'
    'unused = {"tensorflow", "orbax.checkpoint", "optax", "tensorstore", "scipy.linalg"}\n'
    'loaded = unused & set(sys.modules)\n'
    'print(status, of("/cache_hits"), of("/cache_misses"), of("jaxpr_trace_duration"), loaded)\n'
  )
  (tmp_path / 'mine.py').write_text('')
  flags = {name: '' for name in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')}
  settings = {'PARTI_JAX_CACHE': str(tmp_path / 'cache'), 'PYTHONPATH': os.pathsep.join(sys.path)}

  def start(*more):
    command = [sys.executable, '-c', code, f'--model={tiny_folder}', *more]
    done = subprocess.run(
      command, cwd=tmp_path, env=os.environ | flags | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split(maxsplit=4)

  _, _, misses, first, _ = start()
  assert int(misses) > 0
  status, hits, misses, later, loaded = start()
  assert (status, misses, loaded) == ('0', '0', 'set()') and int(hits) >= 1
  assert int(later) <= 2 < int(first)  # The exported program itself.
  *_, with_module, _ = start('--import=mine')
  assert int(with_module) > 2


def test_the_search_for_garbage_resumes(monkeypatch):
  monkeypatch.setattr(garbage, '_process_is_ours', False)
  frozen = gc.get_freeze_count()
  garbage.resume()
  garbage.end()
  assert gc.isenabled() and gc.get_freeze_count() <= frozen
  garbage.pause()
  try:
    assert not gc.isenabled()
    garbage.resume()
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    garbage.end()
  finally:
    gc.enable()
    gc.unfreeze()
    # As conftest.py does.
    gc.collect()
    gc.freeze()


def test_modules_of_the_user_are_known(monkeypatch):
  monkeypatch.setattr(user_modules, '_loaded', [])
  assert not user_modules.loaded()
  user_modules.load('json')
  assert user_modules.loaded()
