"""Invalid values of objectives: one line that begins with the gin key, before anything is built."""

import dataclasses

import optax
import pytest

from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import coca
from parti_jax.models import parti_config
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import text_encoder_objective
from parti_jax.training.objectives import tokenizer_objective

OBJECTIVES = {
  generator_objective.GeneratorObjective: {'model': parti_config.PartiConfig()},
  tokenizer_objective.TokenizerObjective: {'model': vit_vqgan.ViTVQGANConfig()},
  ranker_objective.RankerObjective: {'model': coca.CoCaConfig()},
  text_encoder_objective.TextEncoderObjective: {'model': parti_config.PartiConfig()},
  super_resolution_objective.SuperResolutionObjective: {
    'model': super_resolution.SuperResolutionConfig(),
    'image_size': 64,
  },
}
FIELDS = [
  (objective, field.name)
  for objective in OBJECTIVES
  for field in dataclasses.fields(objective)
  if field.name != 'discriminator_optimizer'
]
NEVER = [float('nan'), float('inf'), 10**40, {}, [[1], [1]], b'x', object(), optax.adam]


@pytest.mark.parametrize(
  'objective, name', FIELDS, ids=lambda value: getattr(value, '__name__', value)
)
def test_values_of_no_field(objective, name):
  kind = checks.field_types(objective)[name]
  numbers = kind in (int, float, int | None)
  more = [1.5] if kind in (int, int | None, bool) else []
  more += ['1', True] if numbers else []
  more += [-1] if numbers and name != 'least_log_scale' else []
  more += [] if 'None' in str(kind) else [None]
  for value in NEVER + more:
    with pytest.raises(UserError, match=rf'{objective.__name__}\.{name}\b') as caught:
      objective(**OBJECTIVES[objective] | {name: value})
    assert '\n' not in str(caught.value)


def test_what_is_given_is_what_is_kept():
  for objective, given in OBJECTIVES.items():
    made = objective(**given)
    for field in dataclasses.fields(objective):
      if field.name not in given:
        assert getattr(made, field.name) == field.default
  assert tokenizer_objective.TokenizerObjective(
    vit_vqgan.ViTVQGANConfig(), frozen=['encoder']
  ).frozen == ('encoder',)


def test_sizes_without_their_call_in_gin_are_named():
  gin_config.parse([], ['GeneratorObjective.model = @PartiConfig'])
  with pytest.raises(
    UserError, match=r'GeneratorObjective.model=.*; in gin, write @PartiConfig\(\)'
  ):
    generator_objective.GeneratorObjective()
  gin_config.parse([], [])
