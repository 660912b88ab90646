"""The settings of a run: from gin, from Python, and checked in both."""

import re

import optax
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import vit_vqgan
from parti_jax.training import config as config_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import hooks
from parti_jax.training.objectives import tokenizer_objective

RUN = 'gin_configs/runs/tiny_tokenizer.gin'


def _given(**others):
  return {
    'objective': tokenizer_objective.TokenizerObjective(vit_vqgan.ViTVQGANConfig(image_size=16)),
    'task': 'images',
    'steps': 3,
    'batch_size': 4,
    'optimizer': optax.sgd,
    'schedule': optax.constant_schedule(0.1),
  } | others


def test_gin_fills_the_settings():
  gin_config.parse([RUN], ['train.steps = 7', 'train.eval_split = None', 'train.seed = 5'])
  config = config_lib.configured()
  assert isinstance(config.objective, tokenizer_objective.TokenizerObjective)
  assert (config.steps, config.eval_split, config.seed) == (7, None, 5)
  assert config.keep_checkpoints == 2
  # The values that gin has win over those for commands that need none.
  assert config_lib.configured(steps=100).steps == 7


def test_names_of_earlier_versions_work(capsys):
  with open(gin_config.find(RUN), encoding='utf-8') as file:
    bindings = [line for line in file if line.startswith('train.')]
  (objective,) = [line for line in bindings if line.startswith('train.objective')]
  old = objective.replace('train.objective', 'train.stage').replace('Objective()', 'Stage()')
  gin_config.parse([RUN], [old.strip()])
  assert isinstance(config_lib.configured().objective, tokenizer_objective.TokenizerObjective)
  assert 'train.stage is now named train.objective' in capsys.readouterr().err


def test_what_gin_lacks_is_one_line():
  gin_config.parse([], ['train.batch_size = 8', 'train.optimizer = @adamw'])
  with pytest.raises(UserError, match=r'no value for train\.objective, train\.task') as raised:
    config_lib.configured(steps=1)
  message = gin_config.without_call_chain(raised.value)
  assert '\n' not in message and '--gin.train.task=VALUE' in message
  assert 'train.steps' not in message and 'train.optimizer' not in message


@pytest.mark.parametrize(
  'others, message',
  [
    ({'objective': 3}, 'train.objective=3 must be an objective'),
    ({'objective': tokenizer_objective.TokenizerObjective}, 'must be an objective, such as'),
    ({'optimizer': 'adam'}, "train.optimizer='adam' must be an optimizer"),
    ({'schedule': 0.1}, 'train.schedule=0.1 must be a function of the step'),
    ({'steps': 0}, 'train.steps=0 must be a whole number from 1'),
    ({'batch_size': 4.0}, 'train.batch_size=4.0 must be a whole number'),
    ({'grace_seconds': -1}, 'train.grace_seconds=-1 must be a number from 0'),
    ({'profile_steps': (2, 1)}, 'train.profile_steps=(2, 1) must be the first and the last step'),
    ({'profile_steps': (2, 4)}, 'such as (1, 3), and the last at most train.steps=3'),
    ({'profile_steps': (0, 2)}, 'train.profile_steps=(0, 2) must be a list of two whole numbers'),
    ({'profile_steps': 2}, 'train.profile_steps=2 must be a list of two whole numbers'),
    ({'eval_split': 3}, 'train.eval_split=3 must be a string'),
  ],
)
def test_settings_from_python_are_checked_too(others, message):
  with pytest.raises(UserError, match=re.escape(message)):
    config_lib.TrainConfig(**_given(**others))


def test_settings_do_not_change():
  config = config_lib.TrainConfig(**_given())
  with pytest.raises(AttributeError):
    config.steps = 4


@pytest.mark.parametrize(
  'every, last, steps',
  [
    (0, 7, []),
    (3, 7, [3, 6, 7]),
    ((0, 7), 7, [7]),
    ((2, 3), 7, [2, 3, 4, 6, 7]),
    ((0, 0), 7, []),
    (1, 3, [1, 2, 3]),
  ],
)
def test_when_hooks_are_due(every, last, steps):
  hook = hooks.Hook(every, lambda run, metrics: None)
  assert [step for step in range(1, last + 1) if hook.is_due(step, last)] == steps
