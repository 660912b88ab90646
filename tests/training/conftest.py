"""Data that the tests of training make for themselves: a folder of pictures, a token cache."""

import json

import first_states
import numpy as np
import pytest
from PIL import Image

from parti_jax.core import gin_config

# What gin may name must be there before the fixture below locks gin.
from parti_jax.data import datasets  # noqa: F401
from parti_jax.data import token_cache


@pytest.fixture(autouse=True)
def clean_gin():
  """Gives every test an empty gin configuration, and leaves none."""
  gin_config.parse([], [])
  yield
  gin_config.parse([], [])


@pytest.fixture(autouse=True, scope='module')
def first_states_drawn():
  """Draws the first parameters of runs by NumPy."""
  with first_states.creating(first_states.drawn):
    yield


@pytest.fixture
def initialized():
  """Has a test's runs begin with the parameters that the objective initializes."""
  with first_states.initialized():
    yield


def _write_pictures(folder, name, count, seed):
  """Writes pictures of two colors, 16×16, and their captions file."""
  draw, lines = np.random.default_rng(seed), []
  for index in range(count):
    pixels = np.empty((16, 16, 3), np.uint8)
    pixels[:] = draw.integers(0, 256, 3)
    row, column = draw.integers(0, 9, 2)
    pixels[row : row + 8, column : column + 8] = draw.integers(0, 256, 3)
    file = f'{name}_{index:02d}.png'
    Image.fromarray(pixels).save(folder / file)
    lines.append(json.dumps({'file': file, 'caption': f'square {row} {column}'}))
  (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='session')
def pictures_folder(tmp_path_factory):
  """A folder of 20 pictures and a broken one (train.jsonl) and 11 others (validation.jsonl)."""
  folder = tmp_path_factory.mktemp('pictures')
  _write_pictures(folder, 'train', 21, 0)
  (folder / 'train_13.png').write_bytes(b'not a picture')
  _write_pictures(folder, 'validation', 11, 1)
  return folder


@pytest.fixture(scope='session')
def tokens_folder(tmp_path_factory):
  """A token cache of 20 and 11 examples, 4×4 tokens of a codebook of 64."""
  folder = tmp_path_factory.mktemp('tokens')
  draw = np.random.default_rng(0)
  info = {'codebook_size': 64, 'image_tokens': 16, 'tokenizer': 'none'}
  for split, count in (('train', 20), ('validation', 11)):
    examples = [(f'picture number {i}', draw.integers(0, 64, 16)) for i in range(count)]
    token_cache.write_token_cache(str(folder), examples, info, split)
  return folder


@pytest.fixture
def tokenizer_bindings(pictures_folder):
  """Bindings that give gin_configs/runs/tiny_tokenizer.gin the pictures."""
  return [
    f"folder.path = '{pictures_folder}'",
    "folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}",
    "train.eval_split = 'validation'",
  ]


@pytest.fixture
def generator_bindings(tokens_folder):
  """Bindings that give gin_configs/runs/tiny_generator.gin the token cache."""
  return [f"token_cache.path = '{tokens_folder}'", "train.eval_split = 'validation'"]
