"""Kinds of parts that users register, and what they are told if something is missing."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_config
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import parti_config
from parti_jax.models import rankers
from parti_jax.models import super_resolution
from parti_jax.models import text_encoders
from parti_jax.models import upscalers
from parti_jax.sampling import placement
from parti_jax.sampling import upscaling
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import tokenizer_objective

REGISTRIES = [generators, image_tokenizers, rankers, text_encoders, upscalers]
WORDS = ('text_vocabulary', 'text_length', 'layers', 'width')


def _config(name, members, **annotated):
  """Returns a frozen dataclass with whole numbers, and other fields {name: (type, default)}."""
  fields = [(member, int, dataclasses.field(default=2)) for member in members]
  fields += [
    (key, kind, dataclasses.field(default=value)) for key, (kind, value) in annotated.items()
  ]
  return dataclasses.make_dataclass(name, fields, frozen=True)


def _text_encoder_kind(config):
  return text_encoders.Kind(config, nn.Module, lambda config: (), lambda config: 0)


@pytest.fixture
def registered():
  """A function that registers a kind 'mine' until the end of the test."""
  done = []

  def register(registry, kind):
    registry.register('mine', kind)
    done.append(registry)

  yield register
  for registry in done:
    registry.KINDS.remove('mine')


@pytest.mark.parametrize('registry', REGISTRIES)
@pytest.mark.parametrize(
  'name, changes, message',
  [
    ('my kind', {}, "the name 'my kind' must consist of letters, digits and underscores"),
    ('mine', {'config': dict}, 'dict must be a frozen dataclass'),
    ('mine', {'config': _config('Small', (), dtype=(str, 'float32'))}, 'Small has no '),
    ('mine', {'config': _config('Small', ('width',))}, 'Small needs a field dtype'),
    (
      'mine',
      {'config': _config('Small', (), dtype=(str, 'float32'), kind=(str, ''))},
      "rename Small.kind; config.json has the kind's name there",
    ),
  ],
)
def test_a_kind_that_lacks_something_is_refused(registry, name, changes, message):
  kind = next(iter(registry.KINDS.values()))._replace(**changes)
  before = dict(registry.KINDS)
  with pytest.raises(UserError) as caught:
    registry.register(name, kind)
  assert message in str(caught.value) and registry.__name__.rpartition('.')[2] in str(caught.value)
  assert dict(registry.KINDS) == before


def test_missing_members_are_named_also_those_that_training_needs():
  members = ('image_size', 'grid', 'image_length', 'codebook_size')
  config = _config('Small', members, dtype=(str, 'float32'))
  kind = image_tokenizers.KINDS['vqgan']._replace(config=config)
  with pytest.raises(
    UserError, match='Small has no remat, compute_dtype, predicts_scale, code_dis'
  ):
    image_tokenizers.register('mine', kind)
  with pytest.raises(
    UserError, match='Small has no image_size, grid, image_length, codebook_size;'
  ):
    image_tokenizers.register(
      'mine', kind._replace(config=_config('Small', (), dtype=(str, 'float32')), training=None)
    )


@pytest.mark.parametrize('registry', [rankers, upscalers, image_tokenizers])
def test_the_config_of_another_part_is_named(registry):
  with pytest.raises(
    UserError, match='PartiConfig is not the config of .*; the kinds are .*import'
  ):
    registry.module(parti_config.PartiConfig())


def test_a_text_encoder_of_a_users_kind_gives_the_generator_its_sizes(registered):
  config = _config('Words', WORDS, dtype=(str, 'float32'))
  registered(text_encoders, _text_encoder_kind(config))
  generator = parti_config.PartiConfig(text_encoder=config(width=3), dtype='bfloat16')
  assert (generator.text_width, generator.text_length, generator.encoder_layers) == (3, 2, 2)
  assert generator.text_encoder.dtype == 'bfloat16'  # It has neither remat nor unroll.
  assert parti_config.as_dict(generator)['text_encoder']['kind'] == 'mine'
  again = parti_config.PartiConfig(**parti_config.as_dict(generator))
  assert again == generator
  text_encoders.check_empty_text(config(), [1, 0, 0], 'the tokenizer')
  assert text_encoders.forward_flops(generator) == 0


@pytest.mark.parametrize('registry', REGISTRIES)
def test_files_name_a_users_kind_and_what_makes_it_known(registry, registered):
  first = next(iter(registry.KINDS.values()))
  config = type('Own', (first.config,), {'__module__': __name__})
  config = dataclasses.dataclass(frozen=True)(config)
  registered(registry, first._replace(config=config))
  kinds = registry.KINDS.configs
  entry = model_config.entry(kinds, config(), unnamed=next(iter(kinds)))
  assert entry['kind'] == 'mine'
  read = model_config.sizes(kinds, {'part': entry}, 'part', 'float32', 'c.json')
  assert read == dataclasses.replace(config(), dtype='float32')
  with pytest.raises(UserError, match='part.kind="?.other"?.* is not one of .*--import=MODULE'):
    model_config.sizes(kinds, {'part': entry | {'kind': 'other'}}, 'part', 'float32', 'c.json')


@pytest.mark.parametrize(
  'annotated, message',
  [
    ({'depth': (int, 0)}, 'depth=0 must be a whole number from 1'),
    ({'depth': (tuple, (1, (2, 3)))}, 'depth=(1, (2, 3)) is read as [1, [2, 3]]'),
    ({'depth': (object, np.float32(1))}, 'its fields cannot be written as JSON'),
  ],
)
def test_a_config_that_a_folder_would_not_keep_is_refused(annotated, message):
  config = _config('Words', WORDS, dtype=(str, 'float32'), **annotated)
  with pytest.raises(UserError) as caught:
    model_config.entry({'mine': config}, config())
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_parameters_that_no_fingerprint_covers_are_refused():
  params = {'encoder': {'kernel': np.ones(2)}, 'pooling': {'kernel': np.ones(2)}}
  with pytest.raises(UserError, match='the image tokenizer has parameters pooling; put them into'):
    fingerprints.of_tokenizer(params)


def test_a_checkpoint_gives_a_users_config_tuples_again(registered, monkeypatch):
  members = ('image_size', 'grid', 'image_length', 'codebook_size')
  config = _config('Small', members, dtype=(str, 'float32'), widths=(tuple[int, ...], (1, 2)))
  first = image_tokenizers.KINDS['vqgan']
  registered(image_tokenizers, first._replace(config=config, training=None))
  fields = dataclasses.asdict(config()) | {'widths': [3, 4]}
  saved = {'stage': 'tokenizer', 'kind': 'mine', 'config': fields}
  monkeypatch.setattr(run_checkpoints, 'read_model', lambda path: saved)
  read = run_checkpoints.read_config('run', 'tokenizer')
  assert read == config(widths=(3, 4)) and hash(read) == hash(config(widths=(3, 4)))
  saved['config'] = fields | {'widths': 'wide'}
  with pytest.raises(UserError, match="run: Small.widths='wide' must be a list of whole numbers"):
    run_checkpoints.read_config('run', 'tokenizer')


def test_reviving_codes_keeps_the_quantizers_other_parameters():
  quantizer = {'project': np.ones(2), 'codebook': {'table': np.zeros((2, 1)), 'scale': np.ones(1)}}
  found = tokenizer_objective._with_table({'quantizer': quantizer, 'decoder': 1}, jnp.ones((2, 1)))
  assert found['decoder'] == 1 and found['quantizer']['project'] is quantizer['project']
  assert found['quantizer']['codebook']['scale'] is quantizer['codebook']['scale']
  assert np.all(found['quantizer']['codebook']['table'] == 1)
  assert np.all(quantizer['codebook']['table'] == 0)


class _Blurred(nn.Module):
  """Adds the mean of the whole picture."""

  config: object

  @nn.compact
  def __call__(self, images):
    gain = self.param('gain', nn.initializers.ones, ())
    images = 0.5 * images + 0.5 * gain * jnp.mean(images, axis=(1, 2), keepdims=True)
    return images.repeat(2, axis=1).repeat(2, axis=2)


def test_a_network_that_sees_the_whole_picture_gets_it_whole(registered, monkeypatch):
  members = {'factor': 2, 'multiple': 1, 'reach': None, 'features_per_pixel': 12}
  config = _config('Blur', (), dtype=(str, 'float32'))
  for name, value in members.items():
    setattr(config, name, value)
  inputs = lambda config: (jnp.zeros((1, 4, 4, 3)),)
  registered(upscalers, upscalers.Kind(config, _Blurred, inputs))
  monkeypatch.setattr(upscaling, '_LARGEST_SIDE', 8)
  upscaler = upscaling.Upscaler(config(), {'gain': np.ones((), np.float32)}, placement.Placement())
  images = np.random.default_rng(0).integers(0, 256, (2, 20, 12, 3)).astype(np.uint8)
  wanted = 0.5 * images + 0.5 * images.mean(axis=(1, 2), keepdims=True)
  found = upscaler(images)
  np.testing.assert_allclose(found, wanted.repeat(2, 1).repeat(2, 2), atol=0.51)
  with pytest.raises(
    UserError, match='SuperResolutionObjective.model: Blur is of a kind that canno'
  ):
    super_resolution_objective.SuperResolutionObjective(config(), image_size=8)


def test_super_resolution_says_what_its_kind_needs():
  config = super_resolution.SuperResolutionConfig(factor=2, unshuffle=4)
  with pytest.raises(
    UserError, match='image_size=20 is not divisible by 8: this SuperResolutionCon'
  ):
    super_resolution_objective.SuperResolutionObjective(config, image_size=20)
  with pytest.raises(UserError, match='crop=6 must be a multiple of 4'):
    super_resolution_objective.SuperResolutionObjective(config, image_size=32, crop=6)
