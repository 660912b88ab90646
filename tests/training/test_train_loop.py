"""The loop from gin and data to checkpoints, metrics and pictures: resumed, reported, refused."""

import collections
import json
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.training import config as config_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import hooks
from parti_jax.training import run as run_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib

GENERATOR = 'gin_configs/runs/tiny_generator.gin'
TOKENIZER = 'gin_configs/runs/tiny_tokenizer.gin'


def _train(folder, gin_file, *bindings):
  gin_config.parse([gin_file], bindings)
  return train_loop.train(str(folder))


def _events(folder):
  """Scalars of a run's TensorBoard events as tag -> step -> value, and the tags of pictures."""
  scalars, pictures = collections.defaultdict(dict), set()
  for file in sorted((folder / 'tensorboard').iterdir()):
    events = event_accumulator.EventAccumulator(
      str(file), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    for tag in events.Tags()['tensors']:
      for event in events.Tensors(tag):
        value = tensor_util.make_ndarray(event.tensor_proto)
        if value.shape:
          pictures.add((tag, event.step))
        else:
          scalars[tag][event.step] = float(value)
  return scalars, pictures


def _saved_state(folder, step):
  return ocp.StandardCheckpointer().restore(
    (folder / 'checkpoints' / str(step) / 'state').absolute()
  )


class _Watch:
  """Records the batches that are trained on, and ends training as a killed process would."""

  def __init__(self, monkeypatch):
    self.batches, self.dies_at, advance = [], None, run_lib.Run.advance
    watch, put = self, trainer_lib.Trainer.put

    def watched_put(trainer, batch, batch_size):
      watch.batches.append(batch)
      return put(trainer, batch, batch_size)

    def watched_advance(run):
      if run.step == watch.dies_at:
        raise KeyboardInterrupt
      return advance(run)

    monkeypatch.setattr(trainer_lib.Trainer, 'put', watched_put)
    monkeypatch.setattr(run_lib.Run, 'advance', watched_advance)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, generator_bindings):
  # Two and a half epochs of 20 pairs, with dropout and with texts dropped.
  bindings = [
    *generator_bindings,
    'train.steps = 6',
    'train.log_every = 1',
    'train.checkpoint_every = 2',
    'train.evaluate_every = 3',
    'drop_text.rate = 0.3',
    'train.seed = 3',
  ]
  watch = _Watch(monkeypatch)
  whole = _train(tmp_path / 'whole', GENERATOR, *bindings)
  batches, watch.batches, watch.dies_at = watch.batches, [], 5
  with pytest.raises(KeyboardInterrupt):
    _train(tmp_path / 'killed', GENERATOR, *bindings)
  assert len(watch.batches) == 5
  watch.batches, watch.dies_at = [], None
  resumed = _train(tmp_path / 'killed', GENERATOR, *bindings)

  # It resumed from the checkpoint at step 4, with the fifth batch.
  assert len(watch.batches) == 2
  jax.tree.map(np.testing.assert_array_equal, watch.batches, batches[4:])
  states = [_saved_state(tmp_path / name, 6) for name in ('whole', 'killed')]
  assert len(jax.tree.leaves(states[0])) > 60
  jax.tree.map(np.testing.assert_array_equal, *states)
  speeds = {'examples_per_second', 'model_flops_per_second', 'share_of_peak'}
  assert speeds <= set(whole)
  assert {k: v for k, v in whole.items() if k not in speeds} == {
    k: v for k, v in resumed.items() if k not in speeds
  }
  scalars = [_events(tmp_path / name)[0] for name in ('whole', 'killed')]
  for tag in ('loss', 'gradient_norm', 'token_accuracy', 'validation/loss'):
    assert scalars[0][tag] == scalars[1][tag], tag
  assert sorted(scalars[0]['loss']) == [1, 2, 3, 4, 5, 6]
  assert len(set(scalars[0]['loss'].values())) == 6
  # The journal tells of both starts.
  events = [
    [json.loads(line) for line in file.read_text().splitlines()]
    for file in sorted((tmp_path / 'killed' / 'journal').iterdir())
  ]
  names = [[event['event'] for event in start] for start in events]
  assert all('progress' in start for start in names)  # How many depends on the time.
  assert [[name for name in start if name != 'progress'] for start in names] == [
    ['start', 'checkpoint', 'checkpoint', 'stop'],
    ['start', 'checkpoint', 'stop'],
  ]
  assert [start[0]['step'] for start in events] == [0, 4]
  assert [(start[-1]['reason'], start[-1]['step']) for start in events] == [
    ('interrupted', 5),
    ('finished', 6),
  ]
  assert events[0][0]['config'] == events[1][0]['config']
  assert events[0][0]['mesh'] == {'stage': 1, 'data': 8, 'fsdp': 1, 'tensor': 1}
  # There is nothing left to train.
  watch.batches = []
  assert _train(tmp_path / 'whole', GENERATOR, *bindings) == {}
  assert not watch.batches


def test_what_goes_wrong_after_a_step_does_not_cost_it(tmp_path, monkeypatch, tokenizer_bindings):
  bindings = [
    *tokenizer_bindings,
    'train.steps = 4',
    'train.checkpoint_every = 2',
    'train.evaluate_every = 2',
    'train.pictures_every = 2',
    'train.num_pictures = 2',
  ]
  with monkeypatch.context() as patch:
    patch.setattr(trainer_lib.Trainer, 'evaluate', mock.Mock(side_effect=RuntimeError('no memory')))
    with pytest.raises(RuntimeError, match='no memory'):
      _train(tmp_path, TOKENIZER, *bindings)
  with monkeypatch.context() as patch:
    patch.setattr(trainer_lib.Trainer, 'pictures', mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      _train(tmp_path, TOKENIZER, *bindings)
  assert [folder.name for folder in (tmp_path / 'checkpoints').iterdir()] == ['2']
  # What was missed is made up for, once.
  advance = mock.Mock(wraps=run_lib.Run.advance)
  monkeypatch.setattr(run_lib.Run, 'advance', lambda run: advance(run))
  _train(tmp_path, TOKENIZER, *bindings)
  assert advance.call_count == 2
  scalars, pictures = _events(tmp_path)
  assert sorted(scalars['validation/psnr']) == [2, 4]
  assert pictures == {('reconstructions', 2), ('reconstructions', 4)}
  evaluate = mock.Mock(wraps=trainer_lib.Trainer.evaluate)
  monkeypatch.setattr(trainer_lib.Trainer, 'evaluate', evaluate)
  _train(tmp_path, TOKENIZER, *bindings)
  assert not evaluate.called


def test_hooks_of_ones_own_come_after_the_loops(tmp_path, tokenizer_bindings):
  gin_config.parse(
    [TOKENIZER], [*tokenizer_bindings, 'train.steps = 5', 'train.checkpoint_every = 2']
  )
  found = []

  def look(run, metrics):
    run.finish_saving()
    saved = run.newest_step()
    found.append((run.step, int(run.state.step), float(metrics['loss']) > 0, saved))

  config = config_lib.configured()
  train_loop.train(str(tmp_path), config, [hooks.Hook(0, look), hooks.Hook(2, look)])
  assert found == [(2, 2, True, 2), (4, 4, True, 4), (5, 5, True, 5)]


@pytest.mark.parametrize('pictures_every', [0, 2])
def test_a_validation_split_without_a_usable_picture_is_refused_at_once(
  tmp_path, capsys, pictures_folder, pictures_every
):
  (pictures_folder / 'broken.jsonl').write_text('{"file": "train_13.png", "caption": "broken"}')
  status = main.main(
    [
      'train',
      f'--gin_file={TOKENIZER}',
      f'--model_dir={tmp_path / "run"}',
      f"--gin.folder.path='{pictures_folder}'",
      "--gin.train.eval_split='validation'",
      "--gin.folder.splits={'train': 'train.jsonl', 'validation': 'broken.jsonl'}",
      f'--gin.train.pictures_every={pictures_every}',
    ]
  )
  assert status == 2
  assert 'folder_images, validation: no usable example' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'bindings',
  [
    ['train.checkpoint_every = 0'],
    ['train.checkpoint_every = 3', 'train.num_pictures = 0', 'train.pictures_every = 1'],
    [
      'train.log_every = 0',
      'train.evaluate_every = 0',
      'train.pictures_every = 0',
      'train.profile_steps = (2, 3)',
    ],
  ],
)
def test_the_last_step_is_saved_whatever_else_is_off(tmp_path, tokenizer_bindings, bindings):
  _train(tmp_path, TOKENIZER, *tokenizer_bindings, 'train.steps = 4', *bindings)
  assert run_checkpoints.latest_checkpoint(tmp_path).name == '4'
  drawn = 'train.num_pictures = 0' not in bindings and 'train.pictures_every = 0' not in bindings
  assert (tmp_path / 'pictures').exists() == drawn
  traces = list((tmp_path / 'tensorboard').glob('plugins/profile/*/*.xplane.pb'))
  assert len(traces) == ('train.profile_steps = (2, 3)' in bindings)


def test_settings_that_a_run_does_not_follow_are_named(tmp_path, capsys, tokenizer_bindings):
  _train(
    tmp_path,
    TOKENIZER,
    *tokenizer_bindings,
    'train.steps = 1',
    'train.batch_size = 8',
    'train.num_pictures = 40',
    'GeneratorObjective.ema = 0.9',
  )
  shown = capsys.readouterr().err
  assert (
    'pictures show 11 examples, all that validation has, and not train.num_pictures=40' in shown
  )
  assert shown.count('has no effect') == 1
  why = "the run's objective is TokenizerObjective"
  assert f'warning: --gin.GeneratorObjective.ema has no effect: {why}' in shown
  with Image.open(tmp_path / 'pictures' / 'reconstructions_00000001.png') as image:
    assert image.size == (3 * 32, 4 * 16)


def test_a_run_on_a_mixture(tmp_path, capsys, pictures_folder, tokenizer_bindings):
  """Counts and measures of each source, also of a run that resumes."""
  bindings = [
    *tokenizer_bindings,
    "train.task = 'mixture_images'",
    "mixture.sources = {'folder_a': 3, 'folder_b': 1}",
    'train.batch_size = 8',
    'train.pictures_every = 0',
    'train.log_every = 2',
    'train.evaluate_every = 4',
    f"folder_b/folder.path = '{pictures_folder}'",
    "folder_b/folder.splits = {'train': 'validation.jsonl', 'validation': 'train.jsonl'}",
  ]
  for steps in (2, 4):
    _train(tmp_path, TOKENIZER, *bindings, f'train.steps = {steps}')
  scalars, _ = _events(tmp_path)
  assert scalars['examples/folder_a'] == {2: 12, 4: 24}
  assert scalars['examples/folder_b'] == {2: 4, 4: 8}
  # 20 of 21 pictures can be used, so that the 24 are more than an epoch.
  assert scalars['skipped_examples/folder_a'][4] == scalars['skipped_examples'][4] == 1
  assert scalars['skipped_examples/folder_b'][4] == 0
  for name in ('l2', 'psnr'):
    found = [scalars[f'validation/{source}{name}'][4] for source in ('', 'folder_a/', 'folder_b/')]
    assert found[0] == pytest.approx(0.75 * found[1] + 0.25 * found[2]) and found[1] != found[2]
  assert 'examples skipped: 1 folder_a: unknown picture format' in capsys.readouterr().err
  # A batch is found again by the run's own gin file.
  status = main.main(['batch', f'--model_dir={tmp_path}', '--place', '0/1:0:3+2@folder_b_images'])
  assert status == 0 and 'images: uint8 [2, 16, 16, 3]' in capsys.readouterr().out


def test_a_run_shows_metrics_and_pictures(tmp_path, capsys, tokenizer_bindings):
  metrics = _train(
    tmp_path,
    TOKENIZER,
    *tokenizer_bindings,
    'train.steps = 6',
    'train.log_every = 2',
    'train.evaluate_every = 6',
    'train.num_pictures = 5',
    'train.pictures_every = 3',
  )
  scalars, pictures = _events(tmp_path)
  for tag in (
    'loss',
    'l2',
    'logit_laplace',
    'quantizer_loss',
    'psnr',
    'gradient_norm',
    'learning_rate',
    'codes_alive',
    'codes_in_batch',
    'code_perplexity',
  ):
    assert sorted(scalars[tag]) == [2, 4, 6], tag
    assert np.isfinite(list(scalars[tag].values())).all(), tag
  # Speeds are known from the second reading on; the pictures at step 3 are left out of them.
  for tag in ('examples_per_second', 'model_flops_per_second', 'share_of_peak'):
    assert sorted(scalars[tag]) == [4, 6] and min(scalars[tag].values()) > 0, tag
  np.testing.assert_allclose(
    scalars['model_flops_per_second'][6] / scalars['examples_per_second'][6],
    3 * train_loop_flops(),
    rtol=1e-5,
  )
  for tag in ('validation/psnr', 'validation/l2', 'validation/codes_used'):
    assert list(scalars[tag]) == [6]
    assert scalars[tag][6] == pytest.approx(metrics[tag], rel=1e-5)
  # The rate of the step that was taken last: the fourth of ten steps of warming up, and so on.
  assert scalars['learning_rate'][4] == pytest.approx(2e-3 * 3 / 10)

  assert pictures == {('reconstructions', 3), ('reconstructions', 6)}
  with Image.open(tmp_path / 'pictures' / 'reconstructions_00000006.png') as image:
    assert image.size == (2 * 32, 3 * 16)  # Five pairs of pictures, two in a row.
  shown = capsys.readouterr().err
  assert 'tokenizer: 27,840 parameters on 8 cpu devices (stage 1×data 8×fsdp 1×tensor 1)' in shown
  assert 'starting at step 0' in shown and 'step 6: validation/code_perplexity' in shown
  assert 'examples skipped: ' in shown
  # What gin was, in a form that gin reads.
  gin_config.parse([str(tmp_path / 'config.gin')], [])
  assert 'train.steps = 6' in (tmp_path / 'config.gin').read_text()


def train_loop_flops():
  """Model FLOPs of one picture of the tiny tokenizer."""
  from parti_jax.models import flops
  from parti_jax.models import vit_vqgan

  return flops.vit_vqgan_forward(vit_vqgan.ViTVQGANConfig())


@pytest.mark.parametrize(
  'bindings, words',
  [
    (['train.batch_size=12'], ['train.batch_size=12', '8 ways']),
    (['make_mesh.data=3'], ['make_mesh.data=3', '8']),
    (['make_mesh.data=1', 'make_mesh.tensor=8'], ['tensor', 'size 8', 'dimension 4']),
    (["train.task='tokens'"], ["unknown task 'tokens'", 'cached_tokens']),
    (["train.eval_split='test'"], ["no finished split 'test'", 'validation']),
    (['PartiConfig.heads=5'], ['PartiConfig.heads=5', 'width=32']),
    (["PartiConfig.remat='most'"], ["PartiConfig.remat='most'", 'block_inputs']),
    (['PartiConfig.codebook_size=32'], ['PartiConfig.codebook_size=32', '64 ids']),
    (['PartiConfig.grid=(4, 5)'], ['4×4 image tokens', 'grid=(4, 5)']),
    (['train.step=5'], ["unknown gin name 'train.step'", 'train.steps']),
  ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
  tmp_path, capsys, generator_bindings, bindings, words
):
  given = [f'--gin.{binding}' for binding in [*generator_bindings, *bindings]]
  status = main.main(
    ['train', f'--gin_file={GENERATOR}', f'--model_dir={tmp_path / "run"}', *given]
  )
  error = capsys.readouterr().err.strip()
  assert status == 2
  assert error.startswith('parti-jax: error: ') and '\n' not in error
  assert all(word in error for word in words), error
  assert not (tmp_path / 'run').exists()


@pytest.mark.process
def test_the_module_explains_itself():
  done = subprocess.run(
    [sys.executable, '-m', 'parti_jax.train', '--help'],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(train_loop.__file__).parents[2],
  )
  assert done.returncode == 0
  assert '--gin_file' in done.stdout and '--model_dir' in done.stdout
