"""The whole chain through the command line: from the builder to PNGs that match their captions."""

import os
import subprocess
import sys

import numpy as np
import pytest
import xla_flags
from PIL import Image

pytestmark = pytest.mark.process

SIZE = 16
SPLIT = 'train[:8]'
GIN = """
include 'gin_configs/models/{model}.gin'
include 'gin_configs/tasks/openmoji.gin'

openmoji.data_dir = '{data_dir}'
token_cache.path = '{folder}/tokens'
train.objective = @{objective}()
train.task = '{task}'
train.split = 'train[:8]'
train.eval_split = None
train.steps = {steps}
train.batch_size = 8
train.optimizer = @adamw
train.schedule = @warmup_cosine()
train.checkpoint_every = {steps}
{objective}.model = @{config}()
drop_text.rate = 0.0
adamw.weight_decay = 0.0
warmup_cosine.peak = 3e-3
warmup_cosine.warmup_steps = 20
"""


def parti_jax(*arguments):
  """Runs a command as a user does, on one device; returns what it printed."""
  flags = ' '.join(xla_flags.of(devices=1))
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-m', 'parti_jax.cli.main', *map(str, arguments)],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """Eight captions and pictures of OpenMoji, and the folder that they were built in."""
  from parti_jax.data import openmoji_builder

  data_dir = tmp_path_factory.mktemp('openmoji')
  builder = openmoji_builder.prepared(SIZE, data_dir=str(data_dir))
  examples = list(builder.as_data_source(split=SPLIT))
  captions = [example['caption'].decode() for example in examples]
  return data_dir, captions, np.stack([example['image'] for example in examples])


def write_gin(folder, name, data_dir, **values):
  path = folder / name
  path.write_text(GIN.format(folder=folder, data_dir=data_dir, **values))
  return path


def test_a_tiny_model_draws_back_the_eight_pairs_that_it_was_trained_on(pairs, tmp_path):
  data_dir, captions, pictures = pairs
  assert len(set(captions)) == 8
  tokenizer_gin = write_gin(
    tmp_path,
    'tokenizer.gin',
    data_dir,
    model='vit_vqgan_tiny',
    objective='TokenizerObjective',
    config='ViTVQGANConfig',
    task='openmoji_images',
    steps=1200,
  )
  generator_gin = write_gin(
    tmp_path,
    'generator.gin',
    data_dir,
    model='parti_tiny',
    objective='GeneratorObjective',
    config='PartiConfig',
    task='openmoji_tokens',
    steps=300,
  )
  vocabulary = tmp_path / 'vocabulary.model'
  parti_jax(
    'vocabulary',
    '--gin_file=gin_configs/tasks/openmoji.gin',
    '--size=300',
    f"--gin.openmoji.data_dir='{data_dir}'",
    f'--output={vocabulary}',
  )
  parti_jax(
    'train',
    f'--gin_file={tokenizer_gin}',
    f'--model_dir={tmp_path}/tokenizer',
    '--gin.TokenizerObjective.revive_every=20',
    '--gin.TokenizerObjective.revive_until=800',
    '--gin.TokenizerObjective.quantize_from=200',
    '--gin.TokenizerObjective.least_log_scale=-2.0',
  )
  parti_jax(
    'tokenize',
    f'--gin_file={tokenizer_gin}',
    f'--tokenizer={tmp_path}/tokenizer',
    f'--output_dir={tmp_path}/tokens',
    '--splits',
    SPLIT,
  )
  parti_jax(
    'train',
    f'--gin_file={generator_gin}',
    f'--model_dir={tmp_path}/generator',
    f"--gin.vocabulary.path='{vocabulary}'",
    '--gin.PartiConfig.text_vocabulary=300',
    '--gin.PartiConfig.dropout=0.0',
  )
  parti_jax(
    'export',
    f'--tokenizer={tmp_path}/tokenizer',
    f'--generator={tmp_path}/generator',
    f'--vocabulary={vocabulary}',
    f'--output_dir={tmp_path}/model',
  )
  printed = parti_jax(
    'generate',
    *captions,
    f'--model={tmp_path}/model',
    '--num_images=1',
    '--temperature=0',
    f'--output_dir={tmp_path}/pictures',
  )
  drawn = {}
  for path in (tmp_path / 'pictures').glob('*.png'):
    with Image.open(path) as image:
      if image.size == (SIZE, SIZE):
        drawn[image.text['prompt']] = np.asarray(image.convert('RGB'))
        assert str(path) in printed
  assert set(drawn) == set(captions)
  distances = [
    [np.mean(np.abs(drawn[caption].astype(float) - picture)) for picture in pictures]
    for caption in captions
  ]
  # Every picture is nearest to the one of its caption, and within a few levels of 255.
  assert np.argmin(distances, axis=1).tolist() == list(range(8))
  assert max(distances[i][i] for i in range(8)) < 16  # Depends on rounding; others are far off.
