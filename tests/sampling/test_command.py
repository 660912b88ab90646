"""Tests `parti-jax generate` from the command line to the files."""

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.sampling import images


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', 'off')


def generate(*arguments):
  return main.main(['generate', *map(str, arguments)])


def test_writes_pictures_and_their_grid(tiny_folder, tmp_path, capsys):
  prompts = tmp_path / 'prompts.txt'
  prompts.write_text('blue ball\n\n  green apple\n')
  output = tmp_path / 'pictures'
  assert (
    generate(
      'red apple',
      '--prompts_file',
      prompts,
      '--model',
      tiny_folder,
      '--output_dir',
      output,
      '--num_images',
      2,
      '--seed',
      3,
      '--top_k',
      5,
    )
    == 0
  )
  printed = capsys.readouterr().out.split()
  assert printed == [
    str(output / name)
    for name in (
      'red-apple_seed3_0.png',
      'red-apple_seed3_1.png',
      'blue-ball_seed3_0.png',
      'blue-ball_seed3_1.png',
      'green-apple_seed3_0.png',
      'green-apple_seed3_1.png',
      'red-apple-and-2-more_seed3_grid.png',
    )
  ]
  assert sorted(map(str, output.iterdir())) == sorted(printed)
  expected = parti_jax.load(tiny_folder).generate(
    ['red apple', 'blue ball', 'green apple'], num_images=2, seed=3, top_k=5
  )
  np.testing.assert_array_equal(np.asarray(Image.open(printed[3])), expected.images[1, 1])
  assert images.read_metadata(printed[3])['top_k'] == '5'


@pytest.mark.parametrize(
  'arguments, named',
  [
    ([], 'no prompt'),
    ([' '], 'prompt 1 is empty'),
    (['a', '--num_images', 0], 'num_images=0'),
    (['a', '--top_p', 1.5], 'top_p=1.5'),
    (['a', '--temperature', -1], 'temperature=-1'),
    (['a', '--seed', -1], 'seed=-1'),
    (['a', '--batch_size', 0], 'batch_size=0'),
    (['a', '--seed', 2**32], 'seed=4294967296'),
    (['a', '--num_images', 2**31], 'num_images='),
    (['a', '--guidance_scale', 1e39], 'guidance_scale=1e+39'),
    (['a', '--guidance_scale', 1e38], 'guidance_scale=1e+38'),
    (['a', '--top_p', 'nan'], 'top_p=nan'),
    (['a', '--top_k', -1], 'top_k=-1'),
    (['a', '--display_size', 2**40], 'display_size='),
    (['a', '--temperature', 'inf'], 'temperature=inf'),
    (['a', '--output_dir', f'{__file__}/out'], 'test_command.py is not a folder'),
    (['a', '--model', 'nowhere'], 'nowhere'),
    (['a', '--ranker', 'nowhere'], '--ranker=nowhere: the model folder nowhere does not exist'),
    (['a', '--upscaler', 'nowhere'], '--upscaler=nowhere: the model folder nowhere does not exist'),
    (['--prompts_file', 'nowhere.txt'], 'nowhere.txt'),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, named, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert generate(*arguments) == 2
  error = capsys.readouterr().err
  assert named in error and error.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_a_file_without_prompts(tmp_path, capsys):
  empty = tmp_path / 'empty.txt'
  empty.write_text('\n\n')
  assert generate('--prompts_file', empty) == 2
  assert 'contains no prompt' in capsys.readouterr().err


def test_a_long_prompt_is_cut_with_a_warning(tiny_folder, tmp_path, capsys):
  assert (
    generate(
      'red apple ' * 20 + 'zebra',
      '--model',
      tiny_folder,
      '--output_dir',
      tmp_path,
      '--num_images',
      1,
    )
    == 0
  )
  error = capsys.readouterr().err
  assert error.startswith('parti-jax: warning: prompt 1 is longer') and 'zebra' in error


def test_says_how_many_passes_speculation_took(tiny_folder, tmp_path, capsys):
  output = ['--model', tiny_folder, '--output_dir', tmp_path, '--num_images', 1]
  assert generate('red apple', *output, '--speculative_window', 4) == 0
  assert 'decoder passes per picture of 4 tokens' in capsys.readouterr().err
  assert generate('red apple', *output, '--speculative_rule', 'always') == 2
  assert 'speculative_rule=' in capsys.readouterr().err
