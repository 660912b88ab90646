"""Tests the options that XLA gets for a training step."""

import gin
import jax
import pytest

from parti_jax.core.errors import UserError
from parti_jax.partitioning import compiler_options


def test_gin_replaces_the_options_of_one_platform():
  assert compiler_options.compiler_options('cpu') == compiler_options.CPU
  assert compiler_options.compiler_options('tpu') == compiler_options.TPU
  assert compiler_options.compiler_options('gpu') == {}
  gin.parse_config("compiler_options.tpu = {'xla_a': 1, 'xla_b': 'x'}\ncompiler_options.cpu = {}")
  assert compiler_options.compiler_options('tpu') == {'xla_a': 1, 'xla_b': 'x'}
  assert compiler_options.compiler_options('cpu') == {}


@pytest.mark.parametrize(
  'value, words',
  [
    ("'xla_a=1'", "compiler_options.tpu='xla_a=1': give a dict"),
    ('{1: 2}', 'compiler_options.tpu: 1: 2 must be the name of an option'),
    ("{'xla_a': None}", "compiler_options.tpu: 'xla_a': None must be"),
  ],
)
def test_options_of_the_wrong_form_are_refused(value, words):
  gin.parse_config(f'compiler_options.tpu = {value}')
  with pytest.raises(UserError, match=words):
    compiler_options.compiler_options('tpu')


@pytest.mark.parametrize('value', [{'xla_nonsense': 1}, {'xla_cpu_prefer_vector_width': 'wide'}])
def test_options_that_xla_refuses_name_the_way_out(value):
  step = jax.jit(lambda x: x + 1, compiler_options=value)
  with pytest.raises(UserError, match=f'XLA says: .*{next(iter(value))}.*remove it in gin'):
    with compiler_options.checked():
      step(1.0)


def test_other_errors_of_xla_pass():
  with pytest.raises(jax.errors.JaxRuntimeError, match='too large'):
    with compiler_options.checked():
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: too large')
