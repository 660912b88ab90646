"""Invalid values of stages: one line that begins with the gin key, before anything is built."""

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

STAGES = {
  generator_objective.GeneratorStage: {'model': parti_config.PartiConfig()},
  tokenizer_objective.TokenizerStage: {'model': vit_vqgan.ViTVQGANConfig()},
  ranker_objective.RankerStage: {'model': coca.CoCaConfig()},
  text_encoder_objective.TextEncoderStage: {'model': parti_config.PartiConfig()},
  super_resolution_objective.SuperResolutionStage: {
    'model': super_resolution.SuperResolutionConfig(),
    'image_size': 64,
  },
}
FIELDS = [
  (stage, field.name)
  for stage in STAGES
  for field in dataclasses.fields(stage)
  if field.name != 'discriminator_optimizer'
]
NEVER = [float('nan'), float('inf'), 10**40, {}, [[1], [1]], b'x', object(), optax.adam]


@pytest.mark.parametrize('stage, name', FIELDS, ids=lambda value: getattr(value, '__name__', value))
def test_values_of_no_field(stage, name):
  kind = checks.field_types(stage)[name]
  numbers = kind in (int, float, int | None)
  more = [1.5] if kind in (int, int | None, bool) else []
  more += ['1', True] if numbers else []
  more += [-1] if numbers and name != 'least_log_scale' else []
  more += [] if 'None' in str(kind) else [None]
  for value in NEVER + more:
    with pytest.raises(UserError, match=rf'{stage.__name__}\.{name}\b') as caught:
      stage(**STAGES[stage] | {name: value})
    assert '\n' not in str(caught.value)


def test_what_is_given_is_what_is_kept():
  for stage, given in STAGES.items():
    made = stage(**given)
    for field in dataclasses.fields(stage):
      if field.name not in given:
        assert getattr(made, field.name) == field.default
  assert tokenizer_objective.TokenizerStage(
    vit_vqgan.ViTVQGANConfig(), frozen=['encoder']
  ).frozen == ('encoder',)


def test_sizes_without_their_call_in_gin_are_named():
  gin_config.parse([], ['GeneratorStage.model = @PartiConfig'])
  with pytest.raises(UserError, match=r'GeneratorStage.model=.*; in gin, write @PartiConfig\(\)'):
    generator_objective.GeneratorStage()
  gin_config.parse([], [])
