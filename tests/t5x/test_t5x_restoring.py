"""What finetuning takes of a checkpoint."""

import pytest

from parti_jax.core.errors import UserError
from parti_jax.t5x import restoring

WHOLE = {
  'target': {'a': {'kernel': 1}, 'b': 2},
  'state': {'step': 3, 'param_states': {'0': {'mu': 4}}},
}
PARAMETERS = {'target': WHOLE['target'], 'state': {'step': 0}}


def test_all_of_a_whole_checkpoint_is_taken():
  assert restoring.of_checkpoint(WHOLE, WHOLE) == WHOLE


@pytest.mark.parametrize('found', [WHOLE, PARAMETERS])
def test_the_optimizer_may_begin_anew(found):
  taken = restoring.of_checkpoint(found, WHOLE, parameters_only=True)
  assert taken == {'target': WHOLE['target'], 'state': {'step': found['state']['step']}}


def test_a_run_that_goes_on_takes_everything():
  assert restoring.of_checkpoint(WHOLE, WHOLE, parameters_only=True, is_resuming=True) == WHOLE


def test_without_a_state_of_the_optimizer_the_way_out_is_named():
  with pytest.raises(UserError, match=r'no state of an optimizer.*--gin\.PARAMETERS_ONLY=True'):
    restoring.of_checkpoint(PARAMETERS, WHOLE)


@pytest.mark.parametrize('parameters_only', [False, True])
def test_parameters_never_begin_at_random(parameters_only):
  smaller = {'target': {'b': 2}, 'state': WHOLE['state']}
  with pytest.raises(UserError, match=r'lacks 1 of the arrays of the model \(target/a/kernel\)'):
    restoring.of_checkpoint(smaller, WHOLE, parameters_only=parameters_only)
  # More than the model has, t5x leaves away.
  assert restoring.of_checkpoint(WHOLE, smaller) == WHOLE
