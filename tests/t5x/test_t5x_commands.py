"""t5x trains and draws by our gin files, in this process; test_t5x_runs has the commands."""

import json
import sys

import gin
import numpy as np
import require_t5x  # noqa: F401
from t5x import gin_utils
from t5x import infer as t5x_infer
from t5x import train as t5x_train

from parti_jax.core import gin_config
from parti_jax.data import token_cache

_SMALL = (
  'PartiConfig.encoder_layers=1',
  'PartiConfig.decoder_layers=1',
  'PartiConfig.grid=(2, 2)',
  'PartiConfig.codebook_size=8',
  'PartiConfig.text_length=8',
  'BATCH_SIZE=8',
  'PjitPartitioner.num_partitions=2',
  'MIXTURE_OR_TASK_NAME="cached_tokens"',
)


def _run(monkeypatch, module, function, run, *bindings):
  monkeypatch.setitem(sys.modules, '__main__', module)
  gin.clear_config()
  gin_utils.parse_gin_flags(
    [str(gin_config.folder().parent), *t5x_train._DEFAULT_GIN_SEARCH_PATHS],
    ['gin_configs/t5x/models/tiny.gin', f'gin_configs/t5x/runs/{run}.gin'],
    [*_SMALL, *bindings],
  )
  return gin.get_configurable(function)()


def test_what_t5x_trains_it_draws_with(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  info = {'codebook_size': 8, 'image_tokens': 4, 'tokenizer': 'abc'}
  captions = ['red apple', 'green apple', 'alien', 'gorilla', 'menorah']
  for split in ('train', 'validation'):
    token_cache.write_token_cache(
      str(tmp_path / 'tokens'),
      [(caption, rng.integers(0, 8, 4).astype(np.int32)) for caption in captions],
      info,
      split,
    )
  tokens = f'token_cache.path="{tmp_path}/tokens"'
  step, state = _run(
    monkeypatch,
    t5x_train,
    t5x_train.train,
    'pretrain',
    tokens,
    'TRAIN_STEPS=2',
    f'MODEL_DIR="{tmp_path}/run"',
    'EVAL_PERIOD=2',
    'EVAL_STEPS=1',
  )
  assert step == int(state.step) == 2
  _run(
    monkeypatch,
    t5x_infer,
    t5x_infer.infer,
    'infer',
    tokens,
    'DatasetConfig.batch_size=8',
    f'CHECKPOINT_PATH="{tmp_path}/run/checkpoint_2"',
    f'INFER_OUTPUT_DIR="{tmp_path}/drawn"',
    'PartiModel.guidance_scale=2.0',
  )
  written = tmp_path / 'drawn/cached_tokens-predict.jsonl-00000-of-00001'
  written = written.read_text(encoding='utf-8')
  lines = [json.loads(line) for line in written.splitlines()]
  assert [line['inputs']['inputs_pretokenized'] for line in lines] == captions
  assert all(
    len(line['prediction']) == 4 and set(line['prediction']) <= set(range(8)) for line in lines
  )
