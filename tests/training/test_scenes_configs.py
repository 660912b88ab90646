"""The gin files of the model of names and scenes fit together, with either tokenizer."""

import itertools
import json
import pathlib
import re

import gin
import jax
import pytest

from parti_jax.core import gin_config
from parti_jax.data import captions as captions_lib
from parti_jax.data import mixtures
from parti_jax.data import openmoji
from parti_jax.data import openmoji_scenes
from parti_jax.data import openmoji_things
from parti_jax.data import sources
from parti_jax.exported_model import model_folder
from parti_jax.models.nn import layers
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import frozen_tokenizer

SMOKE = 'gin_configs/recipes/scenes_smoke.gin'
KINDS = {'vit_vqgan': [], 'vqgan': ['TokenizerObjective.model = @VQGANConfig()']}
SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'scenes_demo.sh'


def _objective(run, kind='vit_vqgan', smoke=False):
  files = [f'gin_configs/runs/scenes_{run}.gin'] + smoke * [SMOKE]
  bindings = KINDS[kind] if run != 'generator' else []
  if smoke and run == 'super_resolution':
    bindings = [
      *bindings,
      'SuperResolutionObjective.image_size = 128',
      'SuperResolutionObjective.crop = 16',
    ]
  gin_config.parse(files, bindings)
  return gin.query_parameter('train.objective').scoped_configurable_fn()


@pytest.mark.parametrize('smoke', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_the_parts_fit_together(kind, smoke):
  tokenizer = _objective('tokenizer', kind, smoke).model
  assert type(tokenizer).__name__.lower() == f'{kind.replace("_", "")}config'
  generator = _objective('generator', kind, smoke).model
  ranker = _objective('ranker', kind, smoke)
  upscaling = _objective('super_resolution', kind, smoke)
  model_folder.check_sizes(generator, tokenizer, 'the tokenizer')
  assert generator.image_length == tokenizer.image_length
  assert ranker.model.image_size == tokenizer.image_size == upscaling.input_size
  assert ranker.model.text_length == generator.text_length == 40
  assert ranker.model.text_vocabulary == generator.text_vocabulary == 4000
  # Until the tokenizer is trained, plans take its sizes from gin.
  planned, expected = (
    jax.tree.map(lambda leaf: leaf.shape, params)
    for params in (
      ranker.abstract_constants()['tokenizer'],
      frozen_tokenizer.planned_params(tokenizer),
    )
  )
  assert planned == expected
  if not smoke:
    assert (tokenizer.image_size, generator.grid) == (128, (16, 16))
    assert tokenizer.codebook_size == generator.codebook_size == 2048
    assert upscaling.image_size == 512


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('phase', ['decoder', 'adversarial'])
def test_the_second_phase_continues_the_first(kind, phase):
  first, second = _objective('tokenizer', kind), _objective(f'tokenizer_{phase}', kind)
  assert first.model == second.model and second.frozen == ('encoder', 'quantizer')
  assert not second.quantize_from and not second.revive_every and second.first_phase
  assert bool(second.adversarial_weight) == (phase == 'adversarial')


@pytest.mark.parametrize(
  'run, task',
  [
    ('tokenizer', 'mixture_images'),
    ('tokenizer_decoder', 'mixture_images'),
    ('generator', 'mixture_tokens'),
    ('ranker', 'mixture_pairs'),
    ('super_resolution', 'mixture_images'),
  ],
)
def test_every_part_trains_on_both(run, task):
  objective = _objective(run)
  assert gin.query_parameter('train.task') == task
  assert set(mixtures.feature_names(task)) == set(objective.feature_lengths())
  shares = {name: float(share) for name, share in mixtures.tasks(task).items()}
  kind = task.removeprefix('mixture_')
  both = (
    ('token_cache_names', 'token_cache_scenes')
    if kind == 'tokens'
    else (
      'openmoji',
      'openmoji_scenes',
    )
  )
  assert shares == {f'{both[0]}_{kind}': 0.4, f'{both[1]}_{kind}': 0.6}
  gin_config.parse([f'gin_configs/runs/scenes_{run}.gin'], ['NAMES_RATE = 0.1'])
  assert float(mixtures.tasks(task)[f'{both[0]}_{kind}']) == pytest.approx(1 / 7)


@pytest.mark.parametrize('kind', KINDS)
def test_the_exported_model_is_small_enough(kind):
  parts = {
    'tokenizer': _objective('tokenizer', kind).model,
    'generator': _objective('generator', kind).model,
    'ranker': _objective('ranker', kind).model,
    'super_resolution': _objective('super_resolution', kind).model,
  }
  counts = {
    name: layers.count_parameters(model_folder.abstract(name, config))
    for name, config in parts.items()
  }
  vocabulary = 500_000  # Bytes; that of 2,000 ids has 276,000.
  assert 30e6 < 2 * sum(counts.values()) + vocabulary < 40e6, json.dumps(counts)


def test_the_script_trains_a_vocabulary_of_the_size_of_the_models():
  text = SCRIPT.read_text(encoding='utf-8')
  sizes = re.findall(r'--size=(\d+)', text)
  assert list(map(int, sizes)) == [_objective('generator').model.text_vocabulary]
  named = re.findall(r'gin_configs/(?:recipes|tasks)/\w+\.gin', text)
  assert named and all(gin_config.find(name).is_file() for name in named)


@pytest.mark.parametrize(
  'run',
  [
    'tokenizer',
    'tokenizer_decoder',
    'tokenizer_adversarial',
    'generator',
    'ranker',
    'super_resolution',
  ],
)
def test_what_either_data_set_holds_out_is_in_no_training_example_of_a_run(run):
  gin_config.parse([f'gin_configs/runs/scenes_{run}.gin'], ['openmoji_scenes.train_size = 300'])
  with pytest.raises(ValueError):  # It has its default, 'train'.
    gin.query_parameter('train.split')
  held_out_codes = {p.code for p in openmoji.pictures() if p.split != 'train'}
  held_out = set(itertools.chain(*openmoji_scenes.held_out().values()))
  settings = sources.configured('openmoji_scenes')._settings
  assert settings == openmoji_scenes.Settings(train_size=300, of_seen_names=True)
  for scene in openmoji_scenes.split_scenes('train', settings):
    kinds = [openmoji_things.kinds()[group.kind] for group in scene.groups]
    assert not {kind.code for kind in kinds} & held_out_codes
    assert not openmoji_scenes.combinations(scene) & held_out
  names = sources.configured('openmoji').open('train', pictures=False)
  members = [p.caption for p in openmoji.pictures() if p.split == 'train']
  assert len(names) == len(members)
  for index in range(0, len(members), 50):
    (example,) = names.read([index])
    texts = captions_lib.alternatives(example['caption'])
    assert texts[0].decode() == members[index] and len(texts) == 50
