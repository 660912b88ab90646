"""A trace of chosen steps lies in the run's folder, also if the run begins or ends among them."""

import gzip
import json
import types

import jax
import jax.numpy as jnp
import pytest

from parti_jax.training import profiler as profiler_lib


def _traced_steps(folder):
  """The numbers of the steps in each trace of a run."""
  found = []
  for file in sorted(folder.glob('tensorboard/plugins/profile/*/*.trace.json.gz')):
    with gzip.open(file) as content:
      events = json.load(content)['traceEvents']
    found.append(
      sorted(int(event['args']['step_num']) for event in events if event.get('name') == 'train')
    )
  return found


def _run(folder, steps, begin, end):
  """Advances a run that is a number."""
  run = types.SimpleNamespace(step=begin, state=jnp.zeros(()))
  profiler = profiler_lib.Profiler(str(folder), steps)
  while run.step < end:
    with profiler.step(run):
      run.state = run.state + 1
    run.step += 1
  profiler.close()


@pytest.mark.parametrize(
  'begin, end, traced',
  [(0, 6, [3, 4]), (3, 6, [4]), (0, 3, [3]), (4, 6, None), (0, 2, None)],
)
def test_the_steps_that_are_traced(tmp_path, begin, end, traced):
  _run(tmp_path, (3, 4), begin, end)
  assert _traced_steps(tmp_path) == ([] if traced is None else [traced])
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == (traced is not None)


def test_nothing_is_traced_unless_asked_for(tmp_path):
  _run(tmp_path, None, 0, 3)
  assert not list(tmp_path.iterdir())


def test_the_first_process_alone_traces(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  _run(tmp_path, (1, 2), 0, 3)
  assert not list(tmp_path.iterdir())


def test_a_step_that_fails_leaves_a_trace_of_what_was_done(tmp_path):
  run = types.SimpleNamespace(step=0, state=jnp.zeros(()))
  profiler = profiler_lib.Profiler(str(tmp_path), (1, 2))
  with pytest.raises(RuntimeError, match='no memory'), profiler.step(run):
    raise RuntimeError('no memory')
  profiler.close()
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == 1
