"""Runs that can't fit the memory or the disk are refused before they compute anything."""

import collections
import shutil

import pytest

from parti_jax.cli import main
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import memory

GENERATOR = '--gin_file=gin_configs/runs/tiny_generator.gin'


def _train(folder, bindings, *more):
  return main.main(
    [
      'train',
      GENERATOR,
      f'--model_dir={folder}',
      *(f'--gin.{binding}' for binding in [*bindings, *more]),
    ]
  )


def test_a_state_larger_than_the_memory(tmp_path, capsys, generator_bindings):
  # 4 · 10¹¹ bytes of a text table, and as much again of an optimizer's moments.
  assert (
    _train(
      tmp_path / 'run',
      generator_bindings,
      'PartiConfig.width=1_048_576',
      'PartiConfig.text_vocabulary=1_000_000',
    )
    == 2
  )
  error = capsys.readouterr().err
  assert 'parameters and optimizer take ' in error and 'GiB, and this machine has ' in error
  assert not (tmp_path / 'run').exists()


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch, capsys, generator_bindings):
  limit = tmp_path / 'memory.max'
  monkeypatch.setattr(memory, '_CONTAINER_LIMIT', limit)
  limit.write_text('100000\n')
  assert _train(tmp_path / 'run', generator_bindings) == 2
  assert 'this machine has 0.0 GiB' in capsys.readouterr().err
  limit.write_text('max\n')
  assert memory._host_memory() > 2**27


def test_a_disk_without_room_for_one_checkpoint(tmp_path, monkeypatch, capsys, generator_bindings):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10**9, 10**9 - 1000, 1000))
  folder = tmp_path / 'not' / 'there' / 'yet'
  assert _train(folder, generator_bindings) == 2
  error = capsys.readouterr().err
  assert f'{folder}: a checkpoint takes about ' in error and '0.0 MB are free; make room' in error
  assert not folder.exists()


@pytest.mark.parametrize(
  'binding, message',
  [
    ('train.objective=@GeneratorObjective', 'must be an objective, such as @GeneratorObjective()'),
    ('train.objective=3', 'train.objective=3 must be an objective'),
    ('train.optimizer=@adamw()', '@adamw() is called without'),
    ("train.optimizer='adamw'", "train.optimizer='adamw' must be an optimizer"),
    ('train.schedule=@parti_schedule', 'must be a function of the step, such as @parti_schedule()'),
    ('train.schedule=0.1', 'must be a function of the step'),
    ("train.steps='2'", "train.steps='2' must be a whole number from 1"),
    ('train.steps=-1', 'train.steps=-1 must be a whole number from 1'),
    ('train.batch_size=4.0', 'train.batch_size=4.0 must be a whole number from 1, such as 4'),
    ('train.keep_checkpoints=0', 'train.keep_checkpoints=0 must be a whole number from 1'),
    ('train.microbatches=2.0', 'train.microbatches=2.0 must be a whole number from 1'),
    ("make_mesh.data='8'", "make_mesh.data='8' must be a whole number from -1"),
    ('make_mesh.data=None', 'make_mesh.data=None must be a whole number from -1'),
    ('shuffle.buffer_size=0', 'shuffle.buffer_size=0 must be a whole number from 1'),
    ('train.seed=-1', 'train.seed=-1 must be a whole number from 0'),
    ('train.grace_seconds=-1', 'train.grace_seconds=-1 must be a number from 0'),
    ('parti_schedule.decay_start=101', 'decay_end=100 is less than parti_schedule.decay_start=101'),
    ('adafactor.beta1=1.0', 'adafactor.beta1=1.0 must be at least 0 and below 1'),
    ('adafactor.max_gradient_norm=0', 'adafactor.max_gradient_norm=0 must be above 0'),
    ('adafactor.weight_decay=-1', 'adafactor.weight_decay=-1 must be a number from 0'),
    ('train.eval_split=3', 'train.eval_split=3 must be a string'),
  ],
)
def test_values_that_make_no_run(tmp_path, capsys, generator_bindings, binding, message):
  assert _train(tmp_path / 'run', generator_bindings, binding) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1, error
  assert not (tmp_path / 'run').exists()
