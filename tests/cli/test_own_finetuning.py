"""A model is trained further on one's own pictures, as a whole, in part, or with adapters."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import random_parameters
import tiny_configs
import tiny_dalle_mini
from PIL import Image

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.cli import own_pictures
from parti_jax.cli import own_plan
from parti_jax.core import gin_config
from parti_jax.data import datasets
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import frozen_tokenizer

CAPTIONS = [f'{color} cat {number}' for color in ('red', 'the') for number in range(4)]
TOKENIZER = dataclasses.replace(
  tiny_configs.TOKENIZER, image_size=16, codebook_size=tiny_dalle_mini.CODES
)
PARTI = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=16,
  mlp_width=32,
  heads=2,
  text_vocabulary=24,
  text_length=16,
  codebook_size=tiny_dalle_mini.CODES,
  grid=(4, 4),
  dropout=0.0,
  dtype='float32',
)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Eight pictures of colored squares, and their captions."""
  folder = tmp_path_factory.mktemp('pictures')
  draw, lines = np.random.default_rng(0), []
  for number, caption in enumerate(CAPTIONS):
    pixels = np.kron(draw.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f'{number}.png')
    lines.append(json.dumps({'file': f'{number}.png', 'caption': caption}))
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Folders of a Parti that was not trained, and of a DALL·E mini that was imported."""
  folder = tmp_path_factory.mktemp('models')
  inputs = image_tokenizers.example_inputs(TOKENIZER)
  params = random_parameters.of(image_tokenizers.module(TOKENIZER), inputs, 1)
  path = folder / 'vocabulary.model'
  vocabulary.train_vocabulary(CAPTIONS, 24, str(path), model_type='bpe', at_most=True)
  parti = model_folder.save(
    folder / 'parti',
    generator_config=PARTI,
    generator_params=random_parameters.of(
      generators.module(PARTI), generators.example_inputs(PARTI), 0
    ),
    tokenizer_config=TOKENIZER,
    tokenizer_params=params,
    vocabulary_path=path,
    dtype='float32',
  )
  tokenizer = model_folder.save_part(
    folder / 'tokenizer', 'tokenizer', model_folder.Part(TOKENIZER, params), {}
  )
  weights = tiny_dalle_mini.write(folder / 'weights') / 'flax_model.msgpack'
  imported = folder / 'dalle_mini'
  command = ['import', 'generator', str(weights), '--format=dalle-mini', '--dtype=float32']
  assert main.main([*command, f'--tokenizer={tokenizer}', f'--output_dir={imported}']) == 0
  return {'parti': parti, 'dalle_mini': imported}


@pytest.fixture(name='few_steps')
def _few_steps(monkeypatch):
  """Trains tiny networks as fast as they learn; the command's rates are for larger ones.

  On one device, as most who use the command have: steps of eight emulated ones take much longer.
  """
  schedule = own_plan.schedule
  faster = lambda *arguments: [
    *schedule(*arguments),
    'warmup_cosine.peak = 1e-2',
    'train.pictures_every = 0',
    'train.checkpoint_every = 0',
  ]
  one_device = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(mesh_lib, 'make_mesh', one_device)
  monkeypatch.setattr(own_plan, 'schedule', faster)
  monkeypatch.setattr(own_plan, 'num_steps', lambda *arguments: 160)
  monkeypatch.setattr(own_pictures._Work, '_seconds_per_step', lambda *arguments: 0.1)


def _command(pictures, model, out, *flags):
  return [
    'own_pictures',
    str(pictures),
    CAPTIONS[0],
    f'--from={model}',
    f'--output_dir={out}',
    '--num_images=1',
    *flags,
  ]


def _tokens(pictures, model):
  """The captions, and the image tokens of their pictures."""
  gin_config.parse([], own_plan.find_source(str(pictures)))
  found = dict(datasets.pictures_and_captions(None, 'train', 16))
  encode = frozen_tokenizer.Encoder(frozen_tokenizer.load(model))
  return list(found), encode(np.stack(list(found.values())))()


def _params(folder):
  return jax.tree.map(np.asarray, dict(model_folder.load(folder).generator_params))


@pytest.mark.parametrize(
  'kind, finetune',
  [
    pytest.param('parti', 'all', marks=pytest.mark.slow),
    pytest.param('dalle_mini', 'decoder', marks=pytest.mark.slow),
    ('dalle_mini', 'lora'),
  ],
)
def test_eight_pictures_are_drawn_back(
  tmp_path, capsys, pictures, models, few_steps, kind, finetune
):
  base, out = models[kind], tmp_path / 'out'
  before = _params(base)
  command = _command(pictures, base, out, f'--finetune={finetune}')
  assert main.main(command) == 0
  captions, tokens = _tokens(pictures, base)
  assert len({row.tobytes() for row in tokens}) == 8
  sample = lambda folder: text_to_image.load(folder).generate(
    captions, num_images=1, temperature=0.0, guidance_scale=1.0
  )
  drawn = sample(out / 'model').tokens[:, 0]
  assert np.sum(np.all(drawn == tokens, axis=1)) >= 7
  assert np.sum(np.all(sample(base).tokens[:, 0] == tokens, axis=1)) == 0

  # The base is unchanged, and the rest of the model is its own.
  jax.tree.map(np.testing.assert_array_equal, before, _params(base))
  theirs, ours = model_folder.load(base), model_folder.load(out / 'model')
  assert ours.generator_config == theirs.generator_config and ours.sampling == theirs.sampling
  assert ours.made_with['tokenizer'] == theirs.made_with['tokenizer']
  after = _params(out / 'model')
  same = {
    part: all(jax.tree.leaves(jax.tree.map(np.array_equal, before[part], after[part])))
    for part in before
  }
  assert same == {'text_encoder': finetune == 'decoder', 'image_decoder': False}
  saved = run_checkpoints.saved_shapes(run_checkpoints.latest_checkpoint(out / 'generator'))
  whole = [name for name in saved if name.endswith('kernel')]
  assert bool(whole) == (finetune != 'lora')

  # The same command again trains nothing; another one is refused.
  capsys.readouterr()
  assert main.main(command) == 0
  assert 'parti-jax tokenize' not in capsys.readouterr().out
  other = {'all': 'lora'}.get(finetune, 'all')
  for changed in (
    _command(pictures, base, out, f'--finetune={other}'),
    _command(pictures, models['parti' if kind != 'parti' else 'dalle_mini'], out),
    [*command[:3], *command[4:-1]],
  ):
    assert main.main(changed) == 2
    assert 'choose another --output_dir' in capsys.readouterr().err


def test_bad_flags_are_named(tmp_path, capsys, pictures, models):
  out = tmp_path / 'out'
  for command, message in (
    (_command(pictures, tmp_path / 'nowhere', out), 'nowhere does not exist'),
    (_command(pictures, models['parti'].parent / 'tokenizer', out), 'has no generator'),
    (_command(pictures, models['parti'], out, '--image_size=64'), 'draws 16 pixels'),
    (['own_pictures', str(pictures), 'x', '--finetune=all'], '--finetune=all needs --from'),
    (['own_pictures', str(pictures), 'x', '--from=', f'--output_dir={out}'], '--from is empty'),
  ):
    assert main.main(command) == 2
    assert message in capsys.readouterr().err
  assert not out.exists()


def test_captions_that_are_cut_are_counted(tmp_path, capsys, models):
  Image.new('RGB', (16, 16), 'red').save(tmp_path / 'a.png')
  (tmp_path / 'a.txt').write_text('the red cat ' * 9)
  command = _command(tmp_path, models['parti'], tmp_path / 'out', '--minutes=1')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(own_pictures._Work, 'tokens', lambda self: 75)
    assert main.main(command) == 75
  assert '1 of 1 captions are longer than the 16 text tokens' in capsys.readouterr().out
