"""Steps whose numbers are not finite: not applied, counted, named, and after too many the end."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import shared_batches
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import config as config_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import run as run_lib
from parti_jax.training import skipped_steps
from parti_jax.training import state as state_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base

BATCH = 8


@dataclasses.dataclass(frozen=True)
class _Sizes:
  width: int = 16


class _Objective(base.Objective):
  """A regression and a judge, linear both, with an optimizer each and an average of the first."""

  name, compute_dtype, model = 'fake', jnp.float32, _Sizes()

  def feature_lengths(self):
    return {'images': self.model.width}

  def abstract_batch(self, batch_size):
    return {'images': jax.ShapeDtypeStruct((batch_size, 16, 16, 3), jnp.float32)}

  def init(self, rng):
    return {'main': {'kernel': jax.random.normal(rng, (3, 4))}, 'judge': {'bias': jnp.ones(3)}}

  def other_optimizers(self):
    return {'judge': optax.adam(0.1)}

  def initial_statistics(self):
    return {'average': {'main': {'kernel': jnp.zeros((3, 4))}}, 'seen': jnp.zeros(())}

  def loss(self, params, batch, dropout_keys, step):
    del dropout_keys, step
    colors = jnp.mean(batch['images'], axis=(1, 2)) / 255.0
    loss = jnp.mean(jnp.square(colors @ params['main']['kernel'] - 1.0))
    judge = jnp.mean(jax.lax.stop_gradient(colors) @ params['judge']['bias'])
    return loss + judge, {'metrics': {'loss': loss, 'judge': judge}, 'seen': jnp.mean(colors)}

  def weight(self, batch):
    return jnp.float32(len(batch['images']))

  def merge(self, aux):
    return {'seen': jnp.mean(aux['seen'])}

  def after_step(self, params, statistics, aux, step, rng):
    del rng
    average = state_lib.update_average(statistics['average'], {'main': params['main']}, step, 0.9)
    return params, {'average': average, 'seen': statistics['seen'] + aux['seen']}, {}

  def evaluate(self, params, batch):
    return {'loss': jnp.mean(batch['images'], axis=(1, 2, 3)) * params['judge']['bias'][0]}

  def summarize(self, measures):
    return {'loss': float(measures['loss'].mean()), 'best': float(measures['loss'].max() > 1)}

  def step_flops(self, batch_size):
    return batch_size


def _images(seed, poison=None):
  """A batch; `poison` takes the place of one number of one picture."""
  images = np.random.default_rng(seed).uniform(0, 255, (BATCH, 16, 16, 3)).astype(np.float32)
  if poison is not None:
    images[5, 3, 3, 1] = poison
  return {'images': images}


def _trainer(microbatches=1, mesh=None):
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(lambda count: 0.1 / (1 + count))
  )
  return trainer_lib.Trainer(_Objective(), optimizer, mesh or mesh_lib.make_mesh(), 3, microbatches)


def _same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('microbatches, devices', [(1, 8), (2, 4)])
def test_what_is_not_finite_is_not_applied(microbatches, devices, monkeypatch):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
  trainer = _trainer(microbatches, mesh)
  state, applied = trainer.create_state(), []
  # The last is a loss that is finite, and gradients that are, but not their squares.
  for seed, poison in enumerate([None, np.nan, None, np.inf, 1e28, None]):
    before = jax.device_get(state)
    state, metrics = trainer.step(state, trainer.put(_images(seed, poison)))
    after = jax.device_get(state)
    assert after.step == seed + 1
    applied.append(bool(metrics['finite']))
    if not applied[-1]:
      _same(after.replace(step=before.step), before)
    if poison == 1e28:
      assert np.isinf(metrics['loss'])
  assert applied == [True, False, True, False, False, True]
  assert np.isfinite(metrics['loss']) and np.isfinite(after.params['main']['kernel']).all()

  # Where all is finite, the check changes no bit.
  monkeypatch.setattr(skipped_steps, 'select', lambda finite, updated, before: updated)
  ends = []
  for each in (trainer, _trainer(microbatches, mesh)):
    state = each.create_state()
    for seed in range(3):
      state, metrics = each.step(state, each.put(_images(seed)))
    ends.append((jax.device_get(state), jax.device_get(metrics)))
  _same(*ends)


def test_donated_memory_is_used_again():
  trainer = _trainer(mesh=mesh_lib.make_mesh(devices=jax.devices()[:1]))
  memory = trainer.lower(BATCH).compile().memory_analysis()
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract))
  assert memory.alias_size_in_bytes == state


def test_an_average_is_whole_though_the_first_step_was_not_applied():
  trainer = _trainer()
  state = trainer.create_state()
  first = jax.device_get(state.params['main']['kernel'])
  state, _ = trainer.step(state, trainer.put(_images(0, np.nan)))
  np.testing.assert_array_equal(state.statistics['average']['main']['kernel'], first)
  state, metrics = trainer.step(state, trainer.put(_images(1)))
  assert metrics['finite']
  np.testing.assert_allclose(
    state.statistics['average']['main']['kernel'],
    first / 11 + jax.device_get(state.params['main']['kernel']) * 10 / 11,
    rtol=1e-5,
  )
  # Parts that a run starts with are averaged from the beginning, each in buffers of its own.
  parts = {'main': jax.tree.map(lambda leaf: leaf + 1.0, state.params['main'])}
  begun = state_lib.with_parts(trainer.create_state(), parts)
  _same(begun.statistics['average'], parts)
  trainer.step(begun, trainer.put(_images(2)))


class _Run:
  """Trains the objective above, with batches that are poisoned at chosen steps, from 1."""

  def __init__(self, folder, monkeypatch, pictures):
    self.folder, self.bad, self.batches, self._task = folder, (), {}, pictures
    watch, advance, put = self, run_lib.Run.advance, trainer_lib.Trainer.put

    def watched_put(trainer, batch, batch_size):
      watch.batches[watch.step] = batch['images']
      poison = np.float32(np.nan if watch.step in watch.bad else 1.0)
      return put(trainer, {'images': batch['images'] * poison}, batch_size)

    def watched_advance(run):
      watch.step = run.step + 1
      return advance(run)

    monkeypatch.setattr(trainer_lib.Trainer, 'put', watched_put)
    monkeypatch.setattr(run_lib.Run, 'advance', watched_advance)

  def train(self, steps, bad, **arguments):
    gin_config.parse([], self._task)
    self.bad = bad
    arguments = {
      'batch_size': 8,
      'log_every': 1,
      'checkpoint_every': 2,
      'pictures_every': 0,
      'eval_split': None,
      'max_bad_steps': 3,
    } | arguments
    config = config_lib.TrainConfig(
      _Objective(),
      'images',
      steps,
      optimizer=optax.adam,
      schedule=lambda count: 0.1 / (1 + count),
      **arguments,
    )
    return train_loop.train(str(self.folder), config)

  def checkpoints(self):
    return sorted(
      int(path.name) for path in (self.folder / 'checkpoints').iterdir() if path.name.isdecimal()
    )

  def counts(self, step):
    place = run_checkpoints.read_place(self.folder / 'checkpoints' / str(step))
    return place['skipped_steps'], place['skipped_in_a_row']

  def events(self, name):
    lines = [
      line
      for file in sorted((self.folder / 'journal').iterdir())
      for line in file.read_text().splitlines()
    ]
    return [event for event in map(json.loads, lines) if event['event'] == name]


@pytest.fixture
def run(tmp_path, monkeypatch, pictures_folder):
  return _Run(
    tmp_path / 'run',
    monkeypatch,
    [
      f"folder.path = '{pictures_folder}'",
      "folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}",
    ],
  )


def test_a_run_counts_and_names_what_it_skipped_and_keeps_the_count(run, capsys, monkeypatch):
  read, reads = skipped_steps.SkippedSteps.read, []
  monkeypatch.setattr(
    skipped_steps.SkippedSteps, 'read', lambda self: reads.append(run.step) or read(self)
  )
  metrics = run.train(6, bad=(2, 3), log_every=4, checkpoint_every=3)
  shown = capsys.readouterr().err
  # Only where numbers are read anyway; at the end there is nothing left to read.
  assert reads == [3, 4, 6, 6]
  assert metrics['skipped_steps'] == 2 and np.isfinite(metrics['loss'])
  # Four updates: the rate is that of the fourth.
  assert metrics['learning_rate'] == pytest.approx(0.1 / 4)
  lines = [line for line in shown.splitlines() if 'not applied' in line]
  assert [line.split(' was')[0] for line in lines] == ['step 2', 'step 3']
  assert 'loss nan' in lines[0] and 'gradient_norm nan' in lines[0]
  # The batches are found again by what the lines and the journal say.
  events = run.events('skipped step')
  assert [event['step'] for event in events] == [2, 3]
  for event in events:
    (place,) = event['places']
    assert f'batch {place}' in lines[event['step'] - 2]
    found = shared_batches.read(
      shared_batches.Place.parse(place), 'images', 'train', {'images': 16}, 0
    )
    np.testing.assert_array_equal(found['images'], run.batches[event['step']])
  # Step 3 was a bad one, so that the checkpoint was written when a good one was known.
  assert run.checkpoints() == [4, 6]
  assert run.counts(4) == (2, 0)
  assert run.train(7, bad=(7,))['skipped_steps'] == 3
  # There was nothing new in it.
  assert run.checkpoints() == [4, 6]


def test_a_run_ends_after_too_many_and_names_the_checkpoint_from_before(run):
  with pytest.raises(UserError) as error:
    run.train(20, bad=(3, 7, 8, 9))
  words = ' '.join(str(error.value).split())
  place, *more = re.findall(r'0/1:0:\d+\+8', words)
  assert words.startswith('steps 7 to 9 were not applied, 3 in a row (train.max_bad_steps)')
  assert place == '0/1:0:48+8' and len(more) == 2
  assert f'{run.folder}/checkpoints/6, the newest checkpoint' in words
  assert 'lower learning rate' in words and f'parti-jax batch --model_dir={run.folder}' in words
  assert run.checkpoints() == [4, 6] and '\n' not in words
  # The same data and numbers, the same end.
  with pytest.raises(UserError, match='steps 7 to 9 were not applied'):
    run.train(20, bad=(3, 7, 8, 9))
  assert run.checkpoints() == [4, 6]


@pytest.mark.slow
def test_a_run_told_to_stop_among_them_writes_what_is_new_and_goes_on_counting(run, monkeypatch):
  """A checkpoint of parameters from before, with the count of steps that were not applied in a row."""
  with monkeypatch.context() as patch:
    patch.setattr(run_lib.Run, 'stop_requested', lambda run: run.step == 8)
    with pytest.raises(SystemExit):
      run.train(20, bad=(2, 8), checkpoint_every=5)
  assert run.checkpoints() == [5, 8] and run.counts(8) == (2, 1)
  # The parameters at step 8 are those of step 7; the steps to come are the ones that are too many.
  with pytest.raises(UserError, match=f'steps 8 to 10 .*{run.folder}/checkpoints/5, the newest'):
    run.train(20, bad=(9, 10), checkpoint_every=5)
  # None ends nothing.
  assert run.train(13, bad=range(9, 13), max_bad_steps=None)['skipped_steps'] == 6
  assert run.checkpoints() == [8, 13]


def test_no_number_is_read_between_readings():
  class Unread:
    """Fails when it is looked at."""

    def __array__(self, *args, **kwargs):
      raise AssertionError('a number was read')

  skipped = skipped_steps.SkippedSteps(2)
  for step in range(1, 4):
    skipped.add(step, ('0/1:0:0+8',), {'finite': Unread(), 'loss': Unread()})
  assert skipped.unread == 3 and skipped.total == 0
  with pytest.raises(AssertionError, match='was read'):
    skipped.read()


def test_evaluation_says_what_is_not_finite():
  trainer = _trainer()
  params = trainer.create_state().params
  good, bad = _images(0), _images(1, np.nan)
  assert 'not_finite_examples' not in trainer.evaluate(params, [good])
  measured = trainer.evaluate(params, [good, bad])
  assert measured['not_finite_examples'] == 1 and np.isnan(measured['loss'])
  # What a summary of comparisons would hide.
  assert measured['best'] == 0


def test_the_command_shows_the_batch(tmp_path, capsys, generator_bindings):
  flags = [
    'batch',
    '--gin_file=gin_configs/runs/tiny_generator.gin',
    *(f'--gin.{binding}' for binding in generator_bindings),
    '--gin.drop_text.rate=0',
  ]
  assert main.main([*flags, '--place', '1/2:0:5+3', f'--output_dir={tmp_path}']) == 0
  shown = capsys.readouterr().out
  assert shown.startswith('1/2:0:5+3 of cached_tokens, train\n')
  assert 'decoder_target_tokens: int32 [3, 16]' in shown
  assert len(re.findall(r"example \d: 'picture number .+'", shown)) == 3
  with np.load(tmp_path / '1_2_0_5+3.npz') as written:
    assert written['encoder_input_tokens'].shape[0] == 3
  assert main.main([*flags, '--place', '2/2:0:5+3']) == 2
  assert "'2/2:0:5+3' is not a place in the data" in capsys.readouterr().err
  assert main.main(['batch', '--place', '0/1:0:0+1']) == 2
  assert '--model_dir=RUN' in capsys.readouterr().err
