"""Sizes of a wrong type or out of bounds: one line that begins with the gin key."""

import dataclasses
import typing

import gin
import numpy as np
import pytest

from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import clip
from parti_jax.models import coca
from parti_jax.models import config_checks
from parti_jax.models import discriminator
from parti_jax.models import parti_config
from parti_jax.models import siglip
from parti_jax.models import super_resolution
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan

KINDS = [
  parti_config.PartiConfig,
  vit_vqgan.ViTVQGANConfig,
  coca.CoCaConfig,
  clip.CLIPConfig,
  clip.CLIPTextConfig,
  siglip.SigLIPConfig,
  super_resolution.SuperResolutionConfig,
  discriminator.DiscriminatorConfig,
  t5_encoder.T5EncoderConfig,
]
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]
# No field of any of them takes one of these, except for None if the field's type includes it, and
# True if it is a boolean.
NEVER = [
  None,
  -1,
  float('nan'),
  float('inf'),
  1e300,
  10**40,
  True,
  [],
  {},
  [[8], [8]],
  [8.0, 8.0],
  'x',
  '64',
  b'64',
  object(),
  np.array([1, 2]),
]


@pytest.mark.parametrize('kind, name', FIELDS, ids=lambda value: getattr(value, '__name__', value))
def test_values_of_no_field(kind, name):
  field_type = checks.field_types(kind)[name]
  for value in NEVER:
    if value is None and type(None) in typing.get_args(field_type):
      continue
    if value is True and field_type is bool:
      continue
    with pytest.raises(UserError, match=rf'^{kind.__name__}\.{name}[=.]') as caught:
      kind(**{name: value})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'kind, name', [(kind, name) for kind, name in FIELDS if checks.field_types(kind)[name] is int]
)
def test_whole_numbers_are_no_floats(kind, name):
  with pytest.raises(UserError, match=rf'^{kind.__name__}\.{name}=2\.0 must be a whole number'):
    kind(**{name: 2.0})


@pytest.mark.parametrize(
  'kind, name, value, message',
  [
    (parti_config.PartiConfig, 'decoder_layers', 1025, 'must be a whole number from 1 to 1024'),
    (parti_config.PartiConfig, 'width', 2**20 + 1, 'must be a whole number from 1 to 1048576'),
    (parti_config.PartiConfig, 'grid', (2048, 1024), r'gives 2,097,152 image tokens'),
    (parti_config.PartiConfig, 'grid', (8, 8, 8), 'must be a list of two whole numbers from 1'),
    (parti_config.PartiConfig, 'dropout', 1, r'must lie in \[0, 1\)'),
    (coca.CoCaConfig, 'dropout', -0.1, 'must be a number from 0 to 1'),
    (vit_vqgan.ViTVQGANConfig, 'image_size', 2**20, 'gives 17,179,869,184 image tokens'),
    (vit_vqgan.ViTVQGANConfig, 'commitment', -0.1, 'must be a number from 0'),
    (super_resolution.SuperResolutionConfig, 'low_rank', 1.5, 'must be a number from 0 to 1'),
    (super_resolution.SuperResolutionConfig, 'dilations', (1, 0), 'whole numbers from 1'),
  ],
)
def test_bounds(kind, name, value, message):
  with pytest.raises(UserError, match=rf'^{kind.__name__}\.{name}=.*{message}'):
    kind(**{name: value})


def test_values_have_one_type_however_they_are_given():
  sizes = parti_config.PartiConfig(grid=[np.int64(8), 8], heads=np.int32(4), dropout=0)
  assert sizes.grid == (8, 8) and type(sizes.grid) is tuple and type(sizes.grid[0]) is int
  assert type(sizes.heads) is int and type(sizes.dropout) is float
  assert hash(sizes) == hash(parti_config.PartiConfig(grid=(8, 8), heads=4, dropout=0.0))


@pytest.mark.parametrize(
  'binding, message',
  [
    ('PartiConfig.heads = 2.0', 'PartiConfig.heads=2.0 must be a whole number'),
    ("ViTVQGANConfig.encoder_width = '64'", "ViTVQGANConfig.encoder_width='64' must be a whole"),
  ],
)
def test_gin_values_are_checked_in_the_same_words(binding, message):
  kind = {kind.__name__: kind for kind in KINDS}[binding.split('.')[0]]
  with pytest.raises(UserError, match=f'^{message}') as caught:
    gin_config.parse([], [binding])
    kind()
  assert '\n' not in str(caught.value)
  gin_config.parse([], [])


def test_a_class_may_become_configurable_after_gin_files_were_read():
  gin_config.parse([], [])
  kind = dataclasses.make_dataclass('ReadLate', [('size', int, 1)], frozen=True)
  kind = config_checks.configurable(kind)
  gin_config.parse([], ['ReadLate.size = 3'])
  assert kind().size == 3
  assert gin.config_is_locked()
  gin_config.parse([], [])
