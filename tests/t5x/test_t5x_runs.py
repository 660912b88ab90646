"""t5x's own commands, as users give them: OpenMoji's tokens, four devices, the model in two parts.

Run with `launch/test.sh -m slow tests/t5x/test_t5x_runs.py`, in an environment with t5x.
"""

import glob
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import require_t5x  # noqa: F401
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from parti_jax.cli import main
from parti_jax.data import token_cache

pytestmark = [pytest.mark.slow, pytest.mark.process]
REPOSITORY = pathlib.Path(__file__).parents[2]
STEPS = 200
IMAGE_TOKENS, CODES = 16, 64


def _ours(*argv):
  """Runs a command of ours in this process."""
  assert main.main([str(argument) for argument in argv]) == 0


def _t5x(command, model, run, *bindings, task='openmoji_tokens'):
  """Runs a command of t5x on four devices, two for each copy of the model; returns its log."""
  environment = dict(
    os.environ,
    XLA_FLAGS='--xla_force_host_platform_device_count=4',
    PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]),
  )
  bindings = (f'MIXTURE_OR_TASK_NAME="{task}"', 'PjitPartitioner.num_partitions=2', *bindings)
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      f't5x.{command}',
      f'--gin_file=gin_configs/t5x/models/{model}.gin',
      f'--gin_file=gin_configs/t5x/runs/{run}.gin',
      '--logtostderr',
      *(f'--gin.{binding}' for binding in bindings),
    ],
    cwd=REPOSITORY,
    env=environment,
    capture_output=True,
    text=True,
    timeout=1200,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stderr


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  """A folder with OpenMoji's pictures as 4×4 tokens of a tiny tokenizer."""
  folder = tmp_path_factory.mktemp('t5x')
  task = [
    '--gin_file=gin_configs/tasks/openmoji.gin',
    f"--gin.openmoji.data_dir='{folder}/pictures'",
  ]
  _ours(
    'train',
    '--gin_file=gin_configs/runs/tiny_tokenizer.gin',
    *task,
    f'--model_dir={folder}/tokenizer',
  )
  _ours('tokenize', *task, f'--tokenizer={folder}/tokenizer', f'--output_dir={folder}/tokens')
  return folder


@pytest.fixture(name='trained', scope='module')
def _trained(folder):
  """The MODEL_DIR of 200 steps of the tiny model, and the log."""
  log = _t5x(
    'train',
    'tiny',
    'pretrain',
    f'token_cache.path="{folder}/tokens"',
    f'MODEL_DIR="{folder}/t5x"',
    f'TRAIN_STEPS={STEPS}',
    'BATCH_SIZE=32',
    'EVAL_PERIOD=100',
    'train.stats_period=20',
    'utils.SaveCheckpointConfig.period=100',
  )
  return folder / 't5x', log


def _scalars(folder, tag):
  # All of them: by default it keeps ten, drawn by chance.
  events = event_accumulator.EventAccumulator(str(folder), {event_accumulator.TENSORS: 0})
  events.Reload()
  return {
    event.step: float(tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)
  }


def _metrics(folder):
  lines = (folder / 'inference_eval/openmoji_tokens-metrics.jsonl').read_text().splitlines()
  return json.loads(lines[-1])


def _drawn(folder):
  [file] = [path for path in glob.glob(f'{folder}/*.jsonl-*') if not path.endswith('COMPLETED')]
  with open(file, encoding='utf-8') as lines:
    return file, [json.loads(line) for line in lines]


def test_train_learns_on_two_by_two_devices(trained):
  folder, log = trained
  assert 'global_mesh devices shape: (2, 2)' in log
  assert re.search(
    r"mlp/project_in/kernel .*partition spec \(None, None, 'model'\)",
    (folder / 'model-info.txt').read_text(),
  )
  losses = _scalars(folder / 'train', 'loss')
  assert sorted(losses) == list(range(20, STEPS + 1, 20))
  assert losses[STEPS] < 0.6 * losses[20]
  real = _scalars(folder / 'training_eval/openmoji_tokens', 'loss')
  assert sorted(real) == [100, 200] and real[200] < 0.5 * math.log(CODES)
  assert {path.name for path in folder.glob('checkpoint_*')} >= {'checkpoint_100', 'checkpoint_200'}


def test_a_run_goes_on_where_it_was(trained, folder):
  log = _t5x(
    'train',
    'tiny',
    'pretrain',
    f'token_cache.path="{folder}/tokens"',
    f'MODEL_DIR="{trained[0]}"',
    f'TRAIN_STEPS={STEPS + 10}',
    'BATCH_SIZE=32',
    'train.eval_period=10',
    'train.stats_period=5',
  )
  assert f'Starting main loop over steps {STEPS}-{STEPS + 10}' in log
  assert (trained[0] / f'checkpoint_{STEPS + 10}').is_dir()
  losses = _scalars(trained[0] / 'train', 'loss')
  assert losses[STEPS + 5] == pytest.approx(losses[STEPS], rel=0.1)  # Not that of new parameters.


def test_eval_measures_by_openmojis_pictures(trained, folder):
  out = folder / 'eval'
  _t5x(
    'eval',
    'tiny',
    'eval',
    f'token_cache.path="{folder}/tokens"',
    f'CHECKPOINT_PATH="{trained[0]}/checkpoint_{STEPS}"',
    f'EVAL_OUTPUT_DIR="{out}"',
    f'openmoji_alignment.tokenizer="{folder}/tokenizer"',
  )
  metrics = _metrics(out)
  assert metrics['step'] == STEPS
  assert {'name_top1', 'name_top5', 'tone_right', 'reconstruction_name_top1'} <= set(metrics)
  real = _scalars(trained[0] / 'training_eval/openmoji_tokens', 'loss')[STEPS]
  # Of all examples; in training it is of the first 20 batches, repeated.
  assert -metrics['log_likelihood_per_token'] == pytest.approx(real, rel=0.05)


def test_infer_draws_what_becomes_pictures(trained, folder):
  out = folder / 'infer'
  _t5x(
    'infer',
    'tiny',
    'infer',
    f'token_cache.path="{folder}/tokens"',
    f'CHECKPOINT_PATH="{trained[0]}/checkpoint_{STEPS}"',
    f'INFER_OUTPUT_DIR="{out}"',
    'PartiModel.guidance_scale=1.5',
    'decoding.temperature_sample.topk=20',
  )
  file, lines = _drawn(out)
  assert len(lines) == 151 and all(line['inputs']['inputs_pretokenized'] for line in lines)
  assert all(len(line['prediction']) == IMAGE_TOKENS for line in lines)
  assert {code for line in lines for code in line['prediction']} <= set(range(CODES))
  assert len({tuple(line['prediction']) for line in lines}) > 75
  _ours('detokenize', file, f'--tokenizer={folder}/tokenizer', f'--output_dir={folder}/drawn')
  pictures = list((folder / 'drawn').glob('*_line*.png'))
  assert len(pictures) == 151 and Image.open(pictures[0]).size == (16, 16)


def test_finetuning_goes_on_from_a_run_of_ours(folder):
  ours = folder / 'ours'
  _ours(
    'train',
    '--gin_file=gin_configs/runs/tiny_generator.gin',
    '--gin.train.log_every=5',
    f"--gin.token_cache.path='{folder}/tokens'",
    '--gin.train.batch_size=32',
    '--gin.make_mesh.data=4',
    '--gin.make_mesh.tensor=2',
    f'--model_dir={ours}',
  )
  _ours('t5x_checkpoint', f'--model_dir={ours}', f'--output_dir={folder}/ours_for_t5x')
  out = folder / 'finetuned'
  log = _t5x(
    'train',
    'tiny',
    'finetune',
    f'token_cache.path="{folder}/tokens"',
    f'MODEL_DIR="{out}"',
    'TRAIN_STEPS=120',
    'BATCH_SIZE=32',
    'EVAL_PERIOD=20',
    f'INITIAL_CHECKPOINT_PATH="{folder}/ours_for_t5x/checkpoint_100"',
    f'openmoji_alignment.tokenizer="{folder}/tokenizer"',
    'train.stats_period=5',
  )
  assert 'Starting main loop over steps 100-120' in log
  before = _scalars(ours / 'tensorboard', 'loss')
  after = _scalars(out / 'train', 'loss')
  assert sorted(after) == [105, 110, 115, 120]
  assert after[105] == pytest.approx(before[100], rel=0.15)
  assert _metrics(out)['step'] == 120


def test_the_demo_model_draws_in_t5x(folder):
  _ours(
    'tokenize',
    '--gin_file=gin_configs/tasks/openmoji.gin',
    '--tokenizer=parti_jax/demo',
    f"--gin.openmoji.data_dir='{folder}/pictures'",
    '--splits=validation',
    f'--output_dir={folder}/demo_tokens',
  )
  _ours('t5x_checkpoint', '--model=parti_jax/demo', f'--output_dir={folder}/demo_for_t5x')
  task = (
    f'token_cache.path="{folder}/demo_tokens"',
    f'CHECKPOINT_PATH="{folder}/demo_for_t5x/checkpoint_0"',
  )
  _t5x('eval', 'demo', 'eval', *task, f'EVAL_OUTPUT_DIR="{folder}/demo_eval"')
  metrics = _metrics(folder / 'demo_eval')
  # docs/demo.md: 50.0 ± 5.0, 7.3 ± 1.7 and 25.7 ± 3.3 on this split, over seeds.
  assert metrics['tone_right'] > 35 and metrics['name_top1'] > 2 and metrics['name_top5'] > 15
  assert metrics['reconstruction_name_top1'] > 95
  log = _t5x(
    'train',
    'demo',
    'finetune',
    task[0],
    f'MODEL_DIR="{folder}/demo_on"',
    'PARAMETERS_ONLY=True',
    f'INITIAL_CHECKPOINT_PATH="{folder}/demo_for_t5x/checkpoint_0"',
    'TRAIN_STEPS=2',
    'BATCH_SIZE=32',
    'train/utils.DatasetConfig.split="validation"',
    'train.train_eval_dataset_cfg=None',
    'train.infer_eval_dataset_cfg=None',
  )
  assert 'Starting main loop over steps 0-2' in log
  loss = _scalars(folder / 'demo_on/train', 'last_layer_loss')[2]
  # Not that of new parameters, whose logits are alike; it has dropout and dropped texts.
  assert loss == pytest.approx(-metrics['log_likelihood_per_token'], rel=0.25)
  _t5x('infer', 'demo', 'infer', *task, f'INFER_OUTPUT_DIR="{folder}/demo_infer"')
  file, lines = _drawn(folder / 'demo_infer')
  assert len(lines) == 151
  _ours('detokenize', file, f'--output_dir={folder}/demo_drawn')
  picture = Image.open(next((folder / 'demo_drawn').glob('gorilla*.png')))
  assert picture.size == (64, 64) and len(picture.getcolors(4096) or ()) > 10


def test_the_tokenizer_trains_and_goes_on_and_becomes_a_run_of_ours(folder):
  arguments = (
    f'openmoji.data_dir="{folder}/pictures"',
    f'MODEL_DIR="{folder}/tokenizer_t5x"',
    'BATCH_SIZE=32',
    'EVAL_PERIOD=20',
  )
  for steps in (40, 60):
    log = _t5x(
      'train',
      'vit_vqgan_tiny',
      'pretrain',
      *arguments,
      f'TRAIN_STEPS={steps}',
      task='openmoji_images',
    )
  assert 'Starting main loop over steps 40-60' in log
  psnr = _scalars(folder / 'tokenizer_t5x/training_eval/openmoji_images', 'psnr')
  assert sorted(psnr) == [20, 40, 60] and psnr[60] > psnr[20] + 1
  _ours(
    't5x_checkpoint',
    f'--from_t5x={folder}/tokenizer_t5x/checkpoint_60',
    f'--model_dir={folder}/tokenizer_back',
    '--gin_file=gin_configs/runs/tiny_tokenizer.gin',
  )
  _ours(
    'tokenize',
    '--gin_file=gin_configs/tasks/openmoji.gin',
    '--splits=validation',
    f"--gin.openmoji.data_dir='{folder}/pictures'",
    f'--tokenizer={folder}/tokenizer_back',
    f'--output_dir={folder}/tokens_back',
  )
  out = folder / 'tokens_t5x'
  _t5x(
    'infer',
    'vit_vqgan_tiny',
    'infer',
    f'openmoji.data_dir="{folder}/pictures"',
    f'CHECKPOINT_PATH="{folder}/tokenizer_t5x/checkpoint_60"',
    f'INFER_OUTPUT_DIR="{out}"',
    'infer.verify_matching_vocabs_fn=None',
    'infer.output_vocab_feature_name="images"',
    task='openmoji_images',
  )
  _, lines = _drawn(out)
  assert {len(line['prediction']) for line in lines} == {IMAGE_TOKENS}
  assert {code for line in lines for code in line['prediction']} <= set(range(CODES))
  ours = token_cache.TokenCacheSource(str(folder / 'tokens_back')).get_dataset(
    'validation', shuffle=False
  )
  assert [line['prediction'] for line in lines] == [
    example['targets'].tolist() for example in ours.as_numpy_iterator()
  ]
