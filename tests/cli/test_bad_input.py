"""Bad input through the command line: one line that says what to mend, status 2, nothing left."""

import json
import os

import pytest
from PIL import Image

from parti_jax.cli import main

TINY_RUN = ['train', '--gin_file=gin_configs/runs/tiny_tokenizer.gin']


@pytest.fixture
def fails(capsys):
  """Runs a command that must fail; returns its one line on stderr."""

  def run(*arguments):
    capsys.readouterr()
    assert main.main([str(argument) for argument in arguments]) == 2
    lines = [
      line for line in capsys.readouterr().err.splitlines() if line.startswith('parti-jax: error: ')
    ]
    assert len(lines) == 1
    return lines[0]

  return run


@pytest.fixture
def folder(tmp_path):
  """A folder source of eight pictures, and the flags that select it."""
  pictures = tmp_path / 'pictures'
  pictures.mkdir()
  lines = []
  for index in range(8):
    Image.new('RGB', (16, 16), (30 * index, 0, 0)).save(pictures / f'{index}.png')
    lines.append(json.dumps({'file': f'{index}.png', 'caption': f'number {index}'}))
  (pictures / 'captions.jsonl').write_text('\n'.join(lines))
  return pictures, [
    '--gin_file=gin_configs/tasks/folder.gin',
    f"--gin.folder.path='{pictures}'",
    "--gin.train.task='images'",
    '--gin.train.eval_split=None',
    '--gin.train.batch_size=8',
    '--gin.train.steps=1',
  ]


def test_gin_name_that_does_not_exist(fails, tmp_path):
  line = fails(*TINY_RUN, f'--model_dir={tmp_path}/run', '--gin.train.stepz=3')
  assert 'train.stepz' in line and 'train.steps' in line
  assert not os.listdir(tmp_path)


def test_gin_file_that_does_not_exist(fails, tmp_path):
  line = fails('train', '--gin_file=runs/tiny_tokeniser.gin', f'--model_dir={tmp_path}/run')
  assert 'tiny_tokeniser.gin' in line and 'tiny_tokenizer.gin' in line


def test_mesh_that_does_not_divide_the_devices(fails, folder, tmp_path):
  line = fails(*TINY_RUN, *folder[1], f'--model_dir={tmp_path}/run', '--gin.make_mesh.tensor=3')
  assert 'make_mesh.tensor=3' in line and '8' in line
  assert not (tmp_path / 'run').exists()


def test_mesh_that_does_not_divide_a_dimension(fails, folder, tmp_path):
  line = fails(
    *TINY_RUN,
    *folder[1],
    f'--model_dir={tmp_path}/run',
    '--gin.make_mesh.data=1',
    '--gin.make_mesh.tensor=8',
  )
  assert 'tensor' in line and 'heads' in line or 'parameter' in line
  assert not (tmp_path / 'run').exists()


def test_batch_that_the_mesh_does_not_divide(fails, folder, tmp_path):
  line = fails(*TINY_RUN, *folder[1], f'--model_dir={tmp_path}/run', '--gin.train.batch_size=6')
  assert 'train.batch_size=6' in line and '8' in line


def test_captions_file_with_a_missing_picture_and_a_missing_column(fails, folder, tmp_path):
  pictures, flags = folder
  (pictures / '3.png').unlink()
  line = fails(*TINY_RUN, *flags, f'--model_dir={tmp_path}/run')
  assert '3.png' in line and 'captions.jsonl' in line
  (pictures / 'captions.jsonl').write_text('{"file": "0.png", "text": "number 0"}')
  line = fails(*TINY_RUN, *flags, f'--model_dir={tmp_path}/run')
  assert 'caption' in line and 'captions.jsonl' in line
  assert not (tmp_path / 'run' / 'checkpoints').exists() or not os.listdir(
    tmp_path / 'run' / 'checkpoints'
  )


def test_source_in_which_no_picture_can_be_decoded(fails, folder, tmp_path):
  pictures, flags = folder
  for path in pictures.glob('*.png'):
    path.write_bytes(b'not a picture')
  line = fails(*TINY_RUN, *flags, f'--model_dir={tmp_path}/run')
  assert 'no usable example' in line and str(pictures) in line


def test_checkpoint_of_another_configuration(fails, folder, tmp_path):
  run = [*TINY_RUN, *folder[1], f'--model_dir={tmp_path}/run']
  assert main.main(run) == 0
  line = fails(*run, '--gin.train.steps=2', '--gin.ViTVQGANConfig.codebook_size=32')
  assert 'codebook_size' in line and '64' in line and '32' in line
  line = fails(
    'export',
    f'--tokenizer={tmp_path}/run',
    f'--generator={tmp_path}/run',
    '--vocabulary=parti_jax/demo/vocabulary.model',
    f'--output_dir={tmp_path}/model',
  )
  assert 'tokenizer' in line and 'generator' in line
  assert not (tmp_path / 'model').exists()


def test_run_that_is_missing_and_run_without_a_finished_checkpoint(fails, tmp_path):
  export = [
    'export',
    f'--generator={tmp_path}/run',
    f'--tokenizer={tmp_path}/run',
    '--vocabulary=parti_jax/demo/vocabulary.model',
    f'--output_dir={tmp_path}/model',
  ]
  assert f'{tmp_path}/run' in fails(*export)
  (tmp_path / 'run' / 'checkpoints' / '10.orbax-checkpoint-tmp').mkdir(parents=True)
  assert 'no finished checkpoint' in fails(*export)


def test_model_folder_that_is_missing(fails, tmp_path):
  line = fails('generate', 'red apple', f'--model={tmp_path}/model')
  assert f'{tmp_path}/model' in line


@pytest.mark.parametrize('prompt', ['', '   '])
def test_empty_prompt(fails, prompt, tmp_path):
  line = fails('generate', prompt, f'--output_dir={tmp_path}/out')
  assert 'prompt' in line and 'empty' in line
  assert not (tmp_path / 'out').exists()


def test_prompt_that_is_too_long_is_cut_with_a_warning_that_shows_what(tmp_path, capsys):
  words = ['apple'] * 20 + ['zebra'] * 20
  arguments = ['generate', ' '.join(words), '--num_images=1', f'--output_dir={tmp_path}/out']
  assert main.main(arguments) == 0
  printed = capsys.readouterr()
  assert 'zebra zebra' in printed.err
  assert len(list((tmp_path / 'out').glob('*.png'))) >= 1
