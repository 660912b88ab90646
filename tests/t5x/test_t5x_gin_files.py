"""The gin files for t5x without t5x: what they include is there, and no number is there twice."""

import configparser
import pathlib
import re

import pytest
import tried_t5x

from parti_jax.core import gin_config
from parti_jax.training import configurables  # noqa: F401

REPOSITORY = pathlib.Path(__file__).parents[2]
FILES = sorted(
  path.relative_to(gin_config.folder()).as_posix()
  for path in (gin_config.folder() / 't5x').rglob('*.gin')
)
_INCLUDE = re.compile(r"^include '(.+)'$", re.MULTILINE)
# What may be said for t5x alone: macros and bindings, with numbers that no run of ours has.
_NUMBER = re.compile(r'^ *([\w./]+) = (-?[\d(].*)$', re.MULTILINE)
_OF_T5X = {
  'DROPOUT_RATE',
  'Z_LOSS',
  'LABEL_SMOOTHING',
  'RANDOM_SEED',
  'EVAL_STEPS',
  'EVAL_PERIOD',
  'FINETUNE_LEARNING_RATE',
  'temperature',
  'topk',
  'topp',
  'guidance_scale',
  'num_decodes',
  'partitioning.standard_logical_axis_rules.parameter_partitioning_dims',
}


def _text(name):
  return (gin_config.folder() / name).read_text(encoding='utf-8')


def test_every_model_and_every_kind_of_run_is_there():
  models = {
    'tiny',
    'demo',
    '350m',
    '3b',
    '20b',
    'vit_vqgan_tiny',
    'vit_vqgan_demo',
    'vit_vqgan_small',
    'vit_vqgan_base',
  }
  assert {f't5x/models/{model}.gin' for model in models} | {
    f't5x/runs/{run}.gin' for run in ('pretrain', 'finetune', 'eval', 'infer')
  } | {'t5x/parti.gin', 't5x/vit_vqgan.gin'} == set(FILES)


@pytest.mark.parametrize('name', FILES)
def test_includes_are_there_and_numbers_are_not_repeated(name):
  text = _text(name)
  included = _INCLUDE.findall(text)
  ours = [path for path in included if not path.startswith('t5x/configs/')]
  assert all(gin_config.find(path).is_file() for path in ours)
  assert bool(ours) == (not name.startswith('t5x/runs/') and name.count('/') == 2)
  assert {key for key, _ in _NUMBER.findall(text)} <= _OF_T5X


@pytest.mark.parametrize(
  'name, run',
  [
    ('tiny', 'tiny_generator'),
    ('demo', 'demo_generator'),
    ('350m', 'parti_350m'),
    ('3b', 'parti_3b'),
    ('20b', 'parti_20b'),
    ('vit_vqgan_tiny', 'tiny_tokenizer'),
    ('vit_vqgan_demo', 'demo_tokenizer'),
    ('vit_vqgan_small', 'vit_vqgan_small'),
    ('vit_vqgan_base', 'vit_vqgan_base'),
  ],
)
def test_a_model_includes_what_our_run_of_it_includes(name, run):
  shared = {
    path
    for path in _INCLUDE.findall(_text(f't5x/models/{name}.gin'))
    if not path.startswith('gin_configs/t5x/')
  }
  found, unread = set(), [f'gin_configs/runs/{run}.gin']
  while unread:
    path = unread.pop()
    found.add(path)
    unread += _INCLUDE.findall(gin_config.find(path).read_text(encoding='utf-8'))
  assert len(shared) == 2 and shared <= found
  optimizer = re.search(
    r'OptaxWrapper\.optimizer = @parti_optimizers\.(\w+)',
    _text(f't5x/models/{name}.gin') + _text('t5x/vit_vqgan.gin'),
  ).group(1)
  schedule = re.search(
    r'SCHEDULE = @parti_optimizers\.(\w+)\(\)',
    _text(f't5x/models/{name}.gin') + _text('t5x/vit_vqgan.gin'),
  ).group(1)
  run_text = '\n'.join(gin_config.find(path).read_text(encoding='utf-8') for path in found)
  assert f'train.optimizer = @{optimizer}\n' in run_text
  assert f'train.schedule = @{schedule}()\n' in run_text


@pytest.mark.parametrize('name', ['tiny', 'demo', '350m', '3b', '20b'])
def test_dropout_is_the_models(name):
  rate = re.search(r'^DROPOUT_RATE = (.+)$', _text('t5x/parti.gin'), re.MULTILINE).group(1)
  assert f'PartiConfig.dropout = {rate}\n' in _text(f'models/parti_{name}.gin')


def test_one_revision_of_t5x_is_named_everywhere():
  pinned = dict(
    re.findall(
      r'^(\w+) @ git\+https://\S+@([0-9a-f]{40})$',
      (REPOSITORY / 'launch/t5x.txt').read_text(encoding='utf-8'),
      re.MULTILINE,
    )
  )
  assert set(pinned) == {'t5x', 'airio', 'jestimator'}
  setup = configparser.ConfigParser()
  setup.read(REPOSITORY / 'setup.cfg')
  assert f't5x@{pinned["t5x"]}' in setup['options.extras_require']['t5x']
  for name, revision in pinned.items():
    assert f'{name} {revision[:12]}' in tried_t5x.SENTENCE
  page = ' '.join((REPOSITORY / 'docs/t5x.md').read_text(encoding='utf-8').split())
  assert tried_t5x.SENTENCE in page.replace('`', '')
