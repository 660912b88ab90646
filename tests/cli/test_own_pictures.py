"""From a folder of pictures to drawings: every form of captions, going on, and what is refused."""

import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from parti_jax.cli import main
from parti_jax.cli import own_pictures
from parti_jax.cli import own_plan
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.exported_model import model_folder
from parti_jax.training import configurables  # noqa: F401

COLORS = {'red': (255, 0, 0), 'green': (0, 128, 0), 'blue': (0, 0, 255), 'white': (255, 255, 255)}
# The smallest networks; the command's own are as large as the demo's.
TINY = {
  'tokenizer': [
    f'ViTVQGANConfig.{side}_{name} = {value}'
    for side in ('encoder', 'decoder')
    for name, value in (('layers', 1), ('width', 16), ('mlp_width', 16), ('heads', 2))
  ]
  + ['ViTVQGANConfig.image_size = 32', 'ViTVQGANConfig.codebook_size = 16'],
  'generator': [
    'PartiConfig.encoder_layers = 1',
    'PartiConfig.decoder_layers = 1',
    'PartiConfig.width = 16',
    'PartiConfig.mlp_width = 16',
    'PartiConfig.heads = 2',
    'PartiConfig.grid = (4, 4)',
    'PartiConfig.codebook_size = 16',
  ],
}


def _pictures(folder, captions_in):
  """Writes 24 pictures of one color with their captions in one of the forms."""
  folder.mkdir(parents=True)
  rows = []
  for number in range(24):
    name, color = list(COLORS.items())[number % 4]
    (folder / 'a').mkdir(exist_ok=True)
    Image.new('RGB', (40, 32), color).save(folder / 'a' / f'{number}.PNG', 'png')
    rows.append((f'a/{number}.PNG', f'a {name} square'))
    if captions_in == 'txt':
      (folder / 'a' / f'{number}.txt').write_text(rows[-1][1])
  if captions_in == 'captions.jsonl':
    lines = [json.dumps({'file': file, 'caption': caption}) for file, caption in rows]
    (folder / 'captions.jsonl').write_text('\n'.join(lines))
  elif captions_in == 'metadata.jsonl':
    lines = [json.dumps({'file_name': file, 'text': caption}) for file, caption in rows]
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
  elif captions_in == 'tar':
    for number, (_, caption) in enumerate(rows):
      (folder / 'a' / f'{number}.txt').write_text(caption)
    with tarfile.open(folder / '000.tar', 'w') as tar:
      for path in sorted((folder / 'a').iterdir()):
        tar.add(path, path.name)
        path.unlink()
  return folder


@pytest.mark.parametrize('captions_in', ['captions.jsonl', 'metadata.jsonl', 'txt', 'tar'])
def test_every_form_of_captions_is_found(tmp_path, captions_in):
  source = own_plan.find_source(str(_pictures(tmp_path / 'mine', captions_in)))
  gin_config.parse([], source)
  found = {
    caption: tuple(picture[16, 16])
    for caption, picture in datasets.pictures_and_captions(None, 'train', 32)
  }
  assert found == {f'a {name} square': color for name, color in COLORS.items()}


@pytest.mark.parametrize(
  'content, message',
  [
    ({}, 'no captions found; put them into captions.jsonl'),
    ({'a.png': b'x'}, 'no captions found'),
    ({'captions.jsonl': b'{"image_url": "x"}'}, 'line 1: expected an object with one of file, '),
    ({'captions.jsonl': b'[1]'}, 'line 1: expected an'),
    ({'captions.jsonl': b''}, 'line 1: expected'),
    ({'a.txt': b'a cat'}, 'none of the 1 files .* has a picture of the same name'),
  ],
)
def test_folders_without_captions_are_refused(tmp_path, capsys, content, message):
  for name, data in content.items():
    (tmp_path / name).write_bytes(data)
  status = main.main(['own_pictures', str(tmp_path), 'a cat', f'--output_dir={tmp_path / "out"}'])
  error = capsys.readouterr().err
  assert status == 2 and error.count('error: ') == 1
  assert re.search(message, error), error
  assert not (tmp_path / 'out').exists()


def test_pictures_without_texts_are_counted(tmp_path, caplog):
  folder = _pictures(tmp_path / 'mine', 'txt')
  (folder / 'a' / '3.txt').unlink()
  (folder / 'a' / '4.PNG').unlink()
  gin_config.parse([], own_plan.find_source(str(folder)))
  assert len(list(datasets.pictures_and_captions(None, 'train', 32))) == 22
  assert 'skipped 1 text file(s) without a picture' in caplog.text
  assert 'skipped 1 picture(s) without a text file' in caplog.text


@pytest.mark.parametrize(
  'platform, examples, size, large',
  [
    ('cpu', 50, 64, False),
    ('cpu', 5000, 64, False),
    ('tpu', 500, 128, False),
    ('gpu', 50_000, 128, True),
  ],
)
def test_sizes_follow_pictures_and_device(platform, examples, size, large):
  plan = own_plan.make('f', [], (f'word{i} cat' for i in range(examples)), 10, platform, 8)
  assert plan.image_size == size and plan.examples == examples and plan.batch_size >= 32
  assert plan.batch_size % 8 == 0
  sizes = dict(binding.split(' = ') for part in plan.sizes.values() for binding in part)
  assert ('PartiConfig.width' in sizes and int(sizes['PartiConfig.width']) == 512) == large
  assert sizes['PartiConfig.codebook_size'] == sizes['ViTVQGANConfig.codebook_size']
  assert 100 <= plan.vocabulary_size <= 16_000
  for part in ('tokenizer', 'generator'):
    gin_config.parse(
      [f'gin_configs/runs/own_{part}.gin'], plan.sizes[part] + own_plan.schedule(part, 500)
    )


def test_steps_fit_the_time_and_the_pictures():
  plan = own_plan.make('f', [], ['cat'] * 50, 10, 'cpu', 1)
  assert own_plan.num_steps(60, 0.1, plan) == 600
  assert own_plan.num_steps(1, 1.0, plan) == 40
  assert own_plan.num_steps(1e6, 0.1, plan) == 2000
  assert own_plan.text_length([3] * 99 + [50]) == 8 and own_plan.text_length([200] * 9) == 128


@pytest.fixture(name='tiny')
def _tiny(monkeypatch):
  monkeypatch.setattr(own_plan, '_sizes', lambda *arguments: TINY)
  monkeypatch.setattr(own_plan, 'num_steps', lambda *arguments: 40)
  monkeypatch.setattr(own_pictures._Work, '_seconds_per_step', lambda *arguments: 0.1)


def test_from_pictures_to_drawings_going_on_after_an_interruption(
  tmp_path, capsys, tiny, monkeypatch
):
  out = tmp_path / 'out'
  command = [
    'own_pictures',
    str(_pictures(tmp_path / 'mine', 'txt')),
    'a red square',
    f'--output_dir={out}',
    '--num_images=2',
    '--image_size=32',
    '--minutes=1',
  ]
  with monkeypatch.context() as patch:
    patch.setattr(own_pictures._Work, 'generator', lambda *arguments: 75)
    assert main.main(command) == 75
  assert 'parti-jax tokenize' in capsys.readouterr().out
  tokens = (out / 'tokens' / 'train-00000.array_record').stat().st_mtime_ns
  assert main.main(command) == 0
  printed = capsys.readouterr().out
  assert 'parti-jax vocabulary' not in printed and 'parti-jax tokenize' not in printed
  assert (out / 'tokens' / 'train-00000.array_record').stat().st_mtime_ns == tokens
  drawn = [pathlib.Path(line) for line in printed.splitlines() if line.endswith('.png')]
  assert len(drawn) == 3 and all(path.parent == out / 'drawings' for path in drawn)
  with Image.open(drawn[0]) as image:
    assert np.asarray(image).shape == (32, 32, 3)
  assert model_folder.load(out / 'model').generator_config.text_length == 8
  # The same folder is not used for other pictures.
  other = _pictures(tmp_path / 'other', 'txt')
  assert main.main([*command[:1], str(other), *command[2:]]) == 2
  assert 'choose another --output_dir' in capsys.readouterr().err


def test_a_damaged_plan_is_named(tmp_path):
  (tmp_path / own_plan.FILE).write_text('{"folder": 3}')
  with pytest.raises(UserError, match='plan.json is damaged; remove it'):
    own_plan.load(str(tmp_path))
