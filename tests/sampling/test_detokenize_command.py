"""Tests `parti-jax detokenize` from a file of t5x.infer to the pictures."""

import json

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.exported_model import model_folder
from parti_jax.sampling import detokenizing
from parti_jax.sampling import images

NAME = 'openmoji_tokens-predict.jsonl-00000-of-00001'


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', 'off')


@pytest.fixture(name='detokenize')
def _detokenize(tiny_folder, tmp_path):
  """Writes lines to a file and runs the command on it; returns the status."""

  def run(lines, *arguments, name=NAME):
    text = '\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / name).write_text(text + '\n')
    return main.main(
      [
        'detokenize',
        str(tmp_path / name),
        '--output_dir',
        str(tmp_path / 'out'),
        '--model',
        str(tiny_folder),
        *arguments,
      ]
    )

  return run


def line(prediction, caption=None, **more):
  inputs = {} if caption is None else {'inputs_pretokenized': caption}
  return {'inputs': inputs, 'prediction': prediction, **more}


def test_pictures_with_their_captions_and_a_grid(detokenize, tmp_path, tiny_folder, capsys):
  pipeline = parti_jax.load(tiny_folder)
  drawn = pipeline.generate(['red apple', 'green apple', 'red apple'], num_images=1, seed=1)
  tokens = drawn.tokens[:, 0].tolist()
  assert (
    detokenize(
      [
        line(tokens[0], 'red apple'),
        '',
        line(tokens[1], aux={'scores': 1.5}),
        line(tokens[2], 'red apple'),
      ],
      '--num_columns=2',
    )
    == 0
  )
  paths = capsys.readouterr().out.split()
  assert paths == [
    str(tmp_path / 'out' / name)
    for name in (
      'red-apple_line1_0.png',
      'picture_line3_0.png',
      'red-apple_line4_0.png',
      'openmoji-tokens-predict-jsonl-00000-of-00001_grid.png',
    )
  ]
  assert sorted(map(str, (tmp_path / 'out').iterdir())) == sorted(paths)
  for path, image in zip(paths, drawn.images[:, 0]):
    # The pipeline detokenizes in the sampling program, which may round differently.
    assert np.abs(np.asarray(Image.open(path)).astype(int) - image).max() <= 1
  metadata = images.read_metadata(paths[0])
  assert {
    name: metadata[name] for name in ('prompt', 'inferences', 'line', 'image_index', 'model')
  } == {'prompt': 'red apple', 'inferences': NAME, 'line': '1', 'image_index': '0', 'model': 'tiny'}
  assert 'prompt' not in images.read_metadata(paths[1])
  assert images.read_metadata(paths[3])['prompt'] == 'red apple\nline 3\nred apple'


def test_several_pictures_of_a_line(detokenize, capsys):
  decodes = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
  lines = [{'input': {'text': f'ball {i}'}, 'output': decodes} for i in range(10)]
  assert detokenize(lines, '--field=output', '--caption_field=text') == 0
  *paths, grid = capsys.readouterr().out.split()
  assert [path.rpartition('/')[2] for path in paths[:4]] == [
    'ball-0_line01_0.png',
    'ball-0_line01_1.png',
    'ball-0_line01_2.png',
    'ball-1_line02_0.png',
  ]
  assert len(paths) == 30 and grid.endswith('_grid.png')
  pixels = [Image.open(path).tobytes() for path in paths]
  assert pixels == pixels[:3] * 10 and len(set(pixels)) > 1


def test_the_same_pictures_replace_themselves_and_no_others(detokenize, tmp_path, capsys):
  assert detokenize([line([0, 1, 2, 3], 'a')]) == 0
  first = capsys.readouterr().out
  assert detokenize([line([0, 1, 2, 3], 'a')]) == 0
  assert capsys.readouterr().out == first and len(list((tmp_path / 'out').iterdir())) == 2
  # For example from another checkpoint.
  assert detokenize([line([11, 1, 2, 3], 'a')]) == 0
  second = capsys.readouterr().out
  assert second.split()[0].endswith('a_line1_0_2.png') and second.split()[1].endswith('_2.png')
  assert len(list((tmp_path / 'out').iterdir())) == 4


@pytest.mark.parametrize(
  'bad, named',
  [
    ('{"inputs": {}, "predic', 'not a JSON object'),
    ('[1, 2]', 'not a JSON object'),
    ('[' * 100_000, 'not a JSON object'),
    ({'inputs': {}, 'score': -3.5}, "'prediction' is missing; the fields are 'inputs', 'score'"),
    (line('red'), "'prediction' is 'red'"),
    (line([]), "'prediction' is '[]'"),
    (line([1, [2, 3]]), 'both image tokens and lists'),
    (line([1, 2, 3]), '3 tokens, but a picture of this tokenizer has 4'),
    (line([1, 2, 3, 12]), 'token 3 is 12, but the codebook of this tokenizer has 12 codes'),
    (line([1, 2, -1, 3]), 'token 2 is -1'),
    (line([1, 2.5, 1, 3]), 'token 1 is 2.5'),
    (line([True, 2, 1, 3]), 'token 0 is True'),
    (line([[1, 2, 3, 4]] * 2), '2 pictures, but line 1 has 1'),
  ],
)
def test_a_bad_line_is_named_and_nothing_is_written(detokenize, tmp_path, capsys, bad, named):
  assert detokenize([line([0, 1, 2, 3], 'a'), '', bad]) == 2
  error = capsys.readouterr().err
  assert f'{NAME}, line 3: ' in error and named in error and error.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_bad_files_and_flags(detokenize, tmp_path, capsys):
  assert detokenize(['', '']) == 2
  assert f'{NAME} has no line with image tokens' in capsys.readouterr().err
  assert detokenize([line([0, 1, 2, 3])], '--num_columns=0') == 2
  assert 'num_columns=0' in capsys.readouterr().err
  assert detokenize([line([0, 1, 2, 3])], '--tokenizer=runs/none') == 2
  assert 'not allowed with argument' in capsys.readouterr().err
  assert main.main(['detokenize', 'nowhere.jsonl']) == 2
  assert 'nowhere.jsonl cannot be read' in capsys.readouterr().err
  assert main.main(['detokenize', 'nowhere.jsonl', f'--tokenizer={tmp_path / "none"}']) == 2
  assert 'no training run there' in capsys.readouterr().err
  (tmp_path / 'latin.jsonl').write_bytes(b'{"a": "\xe9"}\n')
  assert main.main(['detokenize', str(tmp_path / 'latin.jsonl')]) == 2
  assert 'it is not UTF-8 text' in capsys.readouterr().err


def test_only_the_tokenizer_of_a_model_is_read(tiny_folder, tmp_path):
  for name in (model_folder.CONFIG_FILE, model_folder.parameter_file('tokenizer')):
    (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
  whole = model_folder.load(tiny_folder)
  config, params, *_ = model_folder.load_part('tokenizer', tmp_path)
  assert config == whole.tokenizer_config
  tokens = np.arange(12, dtype=np.int32).reshape(3, 4)
  np.testing.assert_array_equal(
    detokenizing.Detokenizer(config, params)(tokens),
    detokenizing.Detokenizer(config, whole.tokenizer_params)(tokens),
  )
