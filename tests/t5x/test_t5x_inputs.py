"""What t5x's checkpoints were trained with is kept beside them, and compared."""

import gin
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import tasks as data_tasks
from parti_jax.data import token_cache
from parti_jax.t5x import inputs
from parti_jax.t5x import tasks

VOCABULARY = data_tasks.get_vocabulary().fingerprint


@pytest.fixture(autouse=True)
def _lazy_tasks():
  tasks.register()
  yield
  gin.clear_config()
  tasks.register()


@pytest.fixture(name='caches', scope='module')
def _caches(tmp_path_factory):
  """Token caches of two tokenizers, by their fingerprints."""
  folder = tmp_path_factory.mktemp('caches')
  for name in ('aaaa', 'bbbb'):
    token_cache.write_token_cache(
      str(folder / name),
      [('apple', np.zeros(4, np.int32))],
      {'codebook_size': 32, 'image_tokens': 4, 'tokenizer': name},
    )
  return folder


def _settle(cache, *bindings):
  """Settles the task again, as a new process of t5x would."""
  gin.clear_config()
  gin.parse_config([f"token_cache.path = '{cache}'", *bindings])
  tasks.register()
  return tasks.seqio.get_mixture_or_task('cached_tokens').output_features['targets']


def test_a_run_keeps_what_it_is_trained_with_and_goes_on_with_nothing_else(caches, tmp_path):
  run = f"MODEL_DIR = '{tmp_path}'"
  _settle(caches / 'aaaa', run)
  assert inputs.of_checkpoint(tmp_path / 'checkpoint_7') == {
    'vocabulary': VOCABULARY,
    'tokenizer': 'aaaa',
  }
  _settle(caches / 'aaaa', run)
  with pytest.raises(
    UserError,
    match=f'{tmp_path} was made with the tokenizer aaaa, but the token '
    'cache .*/bbbb has bbbb; set token_cache.path',
  ):
    _settle(caches / 'bbbb', run)
  assert inputs.of_checkpoint(tmp_path)['tokenizer'] == 'aaaa'
  assert _settle(caches / 'bbbb', run, 'check_inputs.allow_mismatch = True')
  assert inputs.of_checkpoint(tmp_path)['tokenizer'] == 'aaaa'


@pytest.mark.parametrize('macro', ['INITIAL_CHECKPOINT_PATH', 'CHECKPOINT_PATH'])
def test_a_checkpoint_is_used_with_its_own_tokens_alone(caches, tmp_path, macro):
  _settle(caches / 'aaaa', f"MODEL_DIR = '{tmp_path / 'first'}'")
  checkpoint = f"{macro} = '{tmp_path / 'first' / 'checkpoint_7'}'"
  _settle(caches / 'aaaa', checkpoint)
  with pytest.raises(UserError, match='checkpoint_7 was made with the tokenizer aaaa'):
    _settle(caches / 'bbbb', checkpoint, f"MODEL_DIR = '{tmp_path / 'second'}'")
  assert not (tmp_path / 'second').exists()


def test_a_checkpoint_that_says_nothing_fits_everything(caches, tmp_path):
  assert inputs.of_checkpoint(tmp_path / 'checkpoint_7') == {}
  assert _settle(caches / 'bbbb', f"CHECKPOINT_PATH = '{tmp_path / 'checkpoint_7'}'")


def test_what_is_damaged_is_named(caches, tmp_path):
  (tmp_path / inputs.FILE).write_text('[')
  with pytest.raises(UserError, match=f'{tmp_path}/{inputs.FILE} is damaged; remove it'):
    _settle(caches / 'aaaa', f"MODEL_DIR = '{tmp_path}'")
