"""A run that is killed at random moments is bit for bit the run that was not.

Each objective takes some minutes: launch/test.sh -m slow tests/soak
"""

import killed_runs
import numpy as np
import pytest
import tiny_runs

pytestmark = pytest.mark.process

KILLS = 20


@pytest.fixture(name='starter', scope='module')
def _starter(tmp_path_factory):
  return killed_runs.Starter(tmp_path_factory.mktemp('killed'))


@pytest.fixture(name='data', scope='module')
def _data(starter):
  """Pictures, tokens, and a tokenizer that is hardly trained."""
  tiny_runs.write_pictures(starter.folder / 'pictures', 32)
  tiny_runs.write_tokens(starter.folder / 'tokens')
  assert starter.run('first', tiny_runs.tokenizer_arguments(starter.folder)) == 0
  return starter.folder


@pytest.mark.slow
@pytest.mark.parametrize('objective', tiny_runs.OBJECTIVES)
def test_killed_at_random_moments_or_not_a_run_is_the_same(starter, data, objective):
  """Twenty kills: while it starts, reads a checkpoint, writes one, has just written one, draws.

  The other run is compiled from scratch, so that compiled programs from the cache are compared too.
  """
  bindings = [
    'train.steps = 60',
    'train.checkpoint_every = 2',
    'train.pictures_every = 5',
    'train.evaluate_every = 7',
  ]
  whole, killed = (data / f'{name}_{objective}' for name in ('whole', 'killed'))
  arguments = [
    tiny_runs.arguments(objective, data, folder, *bindings) for folder in (whole, killed)
  ]
  assert starter.run(whole.name, arguments[0], cached=False) == 0
  seed = tiny_runs.OBJECTIVES.index(objective)
  assert (
    starter.run_killed(killed.name, arguments[1], killed, KILLS, np.random.default_rng(seed))
    == KILLS
  )
  records = [starter.record_file(folder.name) for folder in (whole, killed)]
  assert len(killed_runs.by_step(killed_runs.records(records[0]))) > 300
  assert killed_runs.differences(whole, killed, *records) == []
