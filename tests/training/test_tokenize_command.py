"""Tests `parti-jax tokenize`: its splits, for all sources of pictures, and its flags."""

import io
import json
import tarfile

import numpy as np
import pytest
import random_parameters
import tensorflow as tf
import tiny_configs
from PIL import Image

from parti_jax.cli import main
from parti_jax.data import openmoji
from parti_jax.data import token_cache_info
from parti_jax.models import vit_vqgan
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import frozen_tokenizer

TOKENIZER = tiny_configs.TOKENIZER
SPLITS = {'test': 2, 'train': 3}


def _pictures(count):
  for index in range(count):
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 60 * index, np.uint8)).save(data, 'png')
    yield f'number {index}', data.getvalue()


def _folder(path):
  for split, count in SPLITS.items():
    lines = []
    for index, (caption, picture) in enumerate(_pictures(count)):
      (path / f'{split}{index}.png').write_bytes(picture)
      lines.append(json.dumps({'file': f'{split}{index}.png', 'caption': caption}))
    (path / f'{split}.in').write_text('\n'.join(lines))


def _tfrecord(path):
  feature = lambda value: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
  for split, count in SPLITS.items():
    with tf.io.TFRecordWriter(str(path / f'{split}.in')) as writer:
      for caption, picture in _pictures(count):
        writer.write(
          tf.train.Example(
            features=tf.train.Features(
              feature={'image': feature(picture), 'caption': feature(caption.encode())}
            )
          ).SerializeToString()
        )


def _webdataset(path):
  for split, count in SPLITS.items():
    with tarfile.open(path / f'{split}.in', 'w') as tar:
      for index, (caption, picture) in enumerate(_pictures(count)):
        for extension, data in (('png', picture), ('txt', caption.encode())):
          member = tarfile.TarInfo(f'{index}.{extension}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))


MAKERS = {'folder': _folder, 'tfrecord': _tfrecord, 'webdataset': _webdataset}


@pytest.fixture(scope='module')
def tokenizer_params():
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  return random_parameters.of(module, vit_vqgan.example_inputs(TOKENIZER))


@pytest.fixture
def tokenize(monkeypatch, tokenizer_params, tmp_path):
  """Tokenizes a source; returns the exit status and the number of examples of each split."""
  monkeypatch.setattr(
    frozen_tokenizer,
    'load',
    lambda run: frozen_tokenizer.FrozenTokenizer(run, TOKENIZER, tokenizer_params),
  )

  def run(source, *arguments, splits=tuple(SPLITS)):
    path = tmp_path / source
    path.mkdir(exist_ok=True)
    if source in MAKERS:
      MAKERS[source](path)
      arguments = (
        f"--gin.{source}.path='{path}'",
        '--gin.{}.splits={}'.format(source, {split: f'{split}.in' for split in splits}),
        *arguments,
      )
    status = main.main(
      [
        'tokenize',
        f'--gin_file=gin_configs/tasks/{source}.gin',
        '--tokenizer=run',
        f'--output_dir={tmp_path}/tokens',
        *arguments,
      ]
    )
    if not (tmp_path / 'tokens').exists():
      return status, {}
    info = token_cache_info.read_info(str(tmp_path / 'tokens'))
    return status, {split: entry['examples'] for split, entry in info['splits'].items()}

  return run


@pytest.mark.parametrize('source', sorted(MAKERS))
def test_all_splits_of_the_source(source, tokenize, tmp_path, capsys):
  assert tokenize(source) == (0, SPLITS)
  assert capsys.readouterr().out.startswith(
    f'{source} {tmp_path / source} has the splits test, train; use --splits to select some of them\n'
  )


def test_one_split_alone_is_no_choice(tokenize, capsys):
  assert tokenize('folder', splits=['train']) == (0, {'train': SPLITS['train']})
  assert '--splits' not in capsys.readouterr().out


def test_all_splits_of_openmoji(tokenize, tmp_path, monkeypatch, capsys):
  some = openmoji.pictures()[::80]
  monkeypatch.setattr(openmoji, 'pictures', lambda: some)
  monkeypatch.setattr(openmoji, 'pixels_digest', lambda: openmoji.PIXELS_DIGEST)
  status, counts = tokenize('openmoji', f"--gin.openmoji.data_dir='{tmp_path}'")
  assert status == 0 and sum(counts.values()) == len(some)
  assert set(counts) == set(openmoji.SPLITS)
  assert 'openmoji has the splits train, validation, unseen_combinations;' in (
    capsys.readouterr().out
  )


def test_splits_are_written_once_each(tokenize, capsys):
  assert tokenize('folder', '--splits', 'test', 'test') == (0, {'test': 2})
  assert '--splits' not in capsys.readouterr().out


@pytest.mark.parametrize('source', [*sorted(MAKERS), 'openmoji'])
@pytest.mark.parametrize('split', ['validation_', 'train[:1]', ''])
def test_an_unknown_split_is_refused_with_a_list_of_splits(source, split, tokenize, capsys):
  if source == 'openmoji' and split == 'train[:1]':
    split = 'train_[:1]'  # The source accepts slices of its splits.
  assert tokenize(source, '--splits', 'train', split) == (2, {})
  has = ', '.join(openmoji.SPLITS if source == 'openmoji' else SPLITS)
  assert f'{source} has no split {split!r}; it has {has}' in capsys.readouterr().err


@pytest.mark.parametrize('source', sorted(MAKERS))
def test_a_split_without_files_is_found_before_any_is_tokenized(source, tokenize, capsys):
  assert tokenize(source, splits=('train', 'nowhere')) == (2, {})
  assert 'nowhere.in' in capsys.readouterr().err


def test_texts_have_no_pictures(tokenize, capsys):
  assert tokenize('text', "--gin.text.path='.'") == (2, {})
  assert 'texts without pictures' in capsys.readouterr().err


def _content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_time_there_is_nothing_to_do(tokenize, tmp_path, capsys):
  assert tokenize('folder') == (0, SPLITS)
  before = _content(tmp_path / 'tokens')
  assert tokenize('folder', '--batch_size=1') == (0, SPLITS)
  assert 'train: 3 pictures, 4 tokens each (finished before)' in capsys.readouterr().out
  assert _content(tmp_path / 'tokens') == before


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--views=2'], 'views 1, not 2'),
    (['--dtype=bfloat16'], 'dtype float32, not bfloat16'),
    (['--gin.decode_images.to_srgb=False'], "'decode_images.to_srgb': False"),
  ],
)
def test_data_made_with_other_settings_is_replaced_only_by_overwrite(
  flags, message, tokenize, tmp_path, capsys
):
  assert tokenize('folder') == (0, SPLITS)
  before = _content(tmp_path / 'tokens')
  assert tokenize('folder', *flags) == (2, SPLITS)
  error = capsys.readouterr().err
  assert "holds a finished split 'test' with " in error and message in error
  assert '--overwrite replaces it, or choose another folder' in error
  assert _content(tmp_path / 'tokens') == before
  assert tokenize('folder', *flags, '--overwrite') == (0, SPLITS)
  assert _content(tmp_path / 'tokens') != before


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--worker=3/3'], '--worker=3/3 must be I/N with I from 0 to N-1'),
    (['--worker=1'], '--worker=1 must be I/N'),
    (['--worker=-1/2'], 'must be I/N'),
    (['--worker=0/2', '--multi_host'], 'drop either it or --multi_host'),
    (['--worker=0/2', '--process_id=0'], 'drop either it or --process_id'),
    (['--convert=old'], 'give --tokenizer=FOLDER or, to convert'),
    (['--batch_size=0'], '--batch_size'),
    (['--views=3'], '--views'),
  ],
)
def test_bad_flags(flags, message, tokenize, capsys):
  assert tokenize('folder', *flags) == (2, {})
  assert message in capsys.readouterr().err


def test_a_tokenizer_or_a_cache_must_be_given(capsys, tmp_path):
  assert main.main(['tokenize', f'--output_dir={tmp_path}/tokens']) == 2
  assert 'give --tokenizer=FOLDER or, to convert a token cache, --convert=FOLDER' in (
    capsys.readouterr().err
  )
