"""The page on new parts: they go through all commands, as the page says."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets  # noqa: F401
from parti_jax.exported_model import model_folder
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import rankers
from parti_jax.models import text_encoders
from parti_jax.models import upscalers
from parti_jax.sampling import continuous
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop  # noqa: F401
from parti_jax.training.objectives import frozen_tokenizer

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'new_part.md'
MODULES = ('palette', 'small_parts', 'bag', 'focal')
KINDS = {'palette', 'words', 'colors', 'repeat', 'bag'}
COUNT = 12
# Command -> flags that make it quick.
QUICK = {
  'train': ['--gin.train.steps=2', '--gin.train.pictures_every=0'],
  'generate': ['--num_images=1'],
}


def _blocks(language):
  text = PAGE.read_text(encoding='utf-8')
  return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def palette(tmp_path, monkeypatch):
  """The page's modules, not imported yet, and its gin file, in the working folder."""
  for name, code in zip(MODULES, _blocks('python'), strict=True):
    (tmp_path / f'{name}.py').write_text(code)
  (gin_file,) = _blocks('text')
  (tmp_path / 'focal.gin').write_text(gin_file)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in MODULES:
    sys.modules.pop(name, None)
  for registry in (generators, image_tokenizers, rankers, text_encoders, upscalers):
    for name in set(registry.KINDS) & KINDS:
      registry.KINDS.remove(name)
  gin_config.parse([], [])


def _write_pictures(folder):
  """Pictures of one color each, with captions as `tokenize` reads them and in MS-COCO's form."""
  folder.mkdir()
  lines, coco = [], {'images': [], 'annotations': []}
  for index in range(COUNT):
    color = np.random.default_rng(index).integers(0, 256, 3).astype(np.uint8)
    file, caption = f'{index}.png', f'square number {index}'
    Image.fromarray(np.full((16, 16, 3), color)).save(folder / file)
    lines.append(json.dumps({'file': file, 'caption': caption}))
    coco['images'].append({'id': index, 'file_name': file})
    coco['annotations'].append({'image_id': index, 'caption': caption})
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  (folder / 'coco.json').write_text(json.dumps(coco))


def _run(*arguments):
  assert main.main([str(argument) for argument in arguments]) == 0


def test_the_pages_parts_go_through_all_commands(palette, capsys):
  _write_pictures(palette / 'pictures')
  for line in ''.join(_blocks('sh')).replace('\\\n', ' ').splitlines():
    name, *arguments = shlex.split(line)
    if name == 'parti-jax':
      _run(*arguments, *QUICK.get(arguments[0], []))
    elif name == 'python':
      exec(arguments[1], {})
  (drawn,) = (palette / 'runs' / 'drawn').glob('*_0.png')
  pixels = np.asarray(Image.open(drawn))
  # Each square has one color of the palette.
  assert pixels.shape == (16, 16, 3) and set(np.unique(pixels)) <= {0, 85, 170, 255}
  np.testing.assert_array_equal(pixels[::4].repeat(4, 0)[:, ::4].repeat(4, 1), pixels)

  # The tokens are those of the module.
  tokenizer = frozen_tokenizer.load(palette / 'runs' / 'palette')
  images = np.stack(
    [np.asarray(Image.open(palette / 'pictures' / f'{index}.png')) for index in range(COUNT)]
  )
  tokens = frozen_tokenizer.Encoder(tokenizer)(images)()
  digits = np.round(images[:, 0, 0] / 255 * 3).astype(int)
  colors = np.asarray(tokenizer.params['quantizer']['colors'])
  np.testing.assert_allclose(colors[tokens[:, 0]], digits / 3, atol=1e-6)
  assert np.all(tokens == tokens[:, :1])

  config = json.loads((palette / 'runs' / 'model_of_words' / 'config.json').read_text())
  assert config['tokenizer']['kind'] == 'palette' and 'kind' not in config['generator']
  assert config['generator']['text_encoder']['kind'] == 'words'
  assert (config['ranker']['kind'], config['super_resolution']['kind']) == ('colors', 'repeat')
  drawn = palette / 'runs' / 'drawn_of_words'
  sizes = {Image.open(file).size for file in drawn.glob('*.png')}
  assert (32, 32) in sizes

  both = ['--import=palette', '--import=small_parts']
  pictures = ['--annotations=pictures/coco.json', '--pictures=pictures', '--output_dir=runs/report']
  _run('evaluate', *both, '--model=runs/model_of_words', '--dataset=coco', *pictures)
  report = json.loads((palette / 'runs' / 'report' / 'report.json').read_text())
  assert report['captions'] == COUNT and report['skipped'] == {}
  both = ['--import=palette', '--import=small_parts', '--import=bag']
  pictures = ['--annotations=pictures/coco.json', '--pictures=pictures', '--output_dir=runs/others']
  _run('evaluate', *both, '--model=runs/model_of_bags', '--dataset=coco', *pictures)
  report = json.loads((palette / 'runs' / 'others' / 'report.json').read_text())
  assert report['captions'] == COUNT and report['skipped'] == {}
  config = json.loads((palette / 'runs' / 'model_of_bags' / 'config.json').read_text())
  assert config['generator']['kind'] == 'bag'
  _check_ways_of_sampling(text_to_image.load(palette / 'runs' / 'model_of_bags'))
  capsys.readouterr()
  for folder in ('palette', 'model', 'model_of_words', 'model_of_bags'):
    _run('info', f'runs/{folder}')
    assert '16×16 pixels' in capsys.readouterr().out
  _run('info', 'runs/focal')
  assert 'a run of the objective generator (FocalObjective)' in capsys.readouterr().out


def _check_ways_of_sampling(model):
  """Checks that all ways of sampling give the same pictures of a text."""
  greedy = {'num_images': 1, 'temperature': 0.0}
  plain = model.generate(['a red square', 'square number 3'], **greedy)
  for settings in (
    {'exit_threshold': 0.999999, 'guidance_skip_threshold': 1.0},
    {'speculative_window': 4},
  ):
    other = model.generate(['a red square', 'square number 3'], **greedy, **settings)
    np.testing.assert_array_equal(other.tokens, plain.tokens)
  with continuous.ContinuousSampler(model, batch_size=2) as sampler:
    other = sampler.submit('square number 3', temperature=0.0).result()
  np.testing.assert_array_equal(other.tokens[0], plain.tokens[1])


def test_an_unknown_kind_is_named_with_what_makes_it_known(palette, capsys):
  module = importlib.import_module('palette')
  module.save(palette / 'folder')
  image_tokenizers.KINDS.remove('palette')
  with pytest.raises(UserError, match='tokenizer.kind=.palette. is not one of vit_vqgan, vqgan'):
    model_folder.load_part('tokenizer', palette / 'folder')
  task = ['--gin_file=gin_configs/tasks/folder.gin', f"--gin.folder.path='{palette}'"]
  tokenize = ['tokenize', *task, '--tokenizer=folder', '--output_dir=tokens']
  assert main.main(tokenize) == 2
  assert '--import=MODULE' in capsys.readouterr().err


@pytest.mark.parametrize(
  'arguments',
  [
    ['generate', 'a prompt', '--import=no_such.module'],
    ['train', '--import', 'no_such.module', '--model_dir=run'],
  ],
)
def test_a_module_that_does_not_exist_is_named(arguments, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main.main(arguments) == 2
  error = capsys.readouterr().err
  assert '--import=no_such.module' in error and 'no_such' in error and error.count('\n') == 1


@pytest.mark.parametrize(
  'code, words',
  [
    ('import no_such_module', 'it imports a missing module: No module named .no_such_module'),
    ('from os import no_such_name', "ImportError: cannot import name 'no_such_name'"),
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('raise TypeError("one\\ntwo")', 'TypeError: one two'),
    ('raise SystemExit(3)', 'SystemExit: 3'),
    ('def f(:', 'SyntaxError: invalid syntax'),
    (
      'from parti_jax.models import image_tokenizers as it\n'
      "it.register('vqgan', it.KINDS['vit_vqgan'])",
      "image_tokenizers.register: the kind 'vqgan' is ",
    ),
  ],
)
@pytest.mark.parametrize(
  'command', [['generate', 'a prompt'], ['train', '--model_dir=run']], ids=['plain', 'gin']
)
def test_a_module_that_fails_is_named_in_one_line(
  command, code, words, capsys, tmp_path, monkeypatch
):
  (tmp_path / 'broken_kind.py').write_text(code + '\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  assert main.main([*command, '--import=broken_kind']) == 2
  error = capsys.readouterr().err
  assert re.match(f'parti-jax: error: --import=broken_kind: {words}', error), error
  assert error.count('\n') == 1 and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('flag', [['--import'], ['--import=a b'], ['--import', '--model=x']])
def test_a_name_that_is_no_modules_is_refused(flag, capsys):
  assert main.main(['generate', 'a prompt', *flag]) == 2
  assert 'must be the name of a module' in capsys.readouterr().err


def test_a_name_that_is_taken_is_refused(palette):
  module = importlib.import_module('palette')
  kind = image_tokenizers.KINDS['palette']
  image_tokenizers.register('palette', kind)  # The same one again.
  assert image_tokenizers.of(module.PaletteConfig()) is kind
  with pytest.raises(UserError, match="the kind 'vqgan' is parti_jax.models.vqgan.VQGANConfig"):
    image_tokenizers.register('vqgan', kind)
  with pytest.raises(UserError, match='dict must be a frozen dataclass'):
    image_tokenizers.register('other', kind._replace(config=dict))
  with pytest.raises(UserError, match='PaletteConfig is of a kind that cannot be trained'):
    image_tokenizers.training(module.PaletteConfig())
