"""Text tasks from all sources, without their pictures."""

import gzip
import json

import gin
import pytest
import tfrecord_files

from parti_jax.cli import vocabulary as vocabulary_lib
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import openmoji_builder
from parti_jax.data import sources
from parti_jax.data.batches import Batches

TEXTS = ['red circle', 'green circle', 'woman firefighter']
LENGTHS = {'inputs': 12}


def _read(task='texts', split='train', **kwargs):
  """Reads a task once: the texts, and the batches."""
  batches = Batches(task, split, 2, LENGTHS, num_epochs=1, **kwargs)
  vocabulary, read = datasets.get_vocabulary(), []
  for batch in batches:
    assert set(batch) == {'encoder_input_tokens'}
    read += [vocabulary.decode(ids) for ids in batch['encoder_input_tokens']]
  return read, batches


def test_lines_of_text_files(tmp_path):
  (tmp_path / 'a.txt').write_text(f'{TEXTS[0]}\n\n{TEXTS[1]}\n{"circle " * 30}\n')
  with gzip.open(tmp_path / 'b.txt.gz', 'wt') as file:
    file.write(TEXTS[2])
  gin_config.parse(
    ['gin_configs/tasks/text.gin'],
    [f"text.path = '{tmp_path}'", "text.splits = {'train': '*.txt*'}"],
  )
  read, batches = _read()
  assert sorted(text[:20] for text in read) == sorted(
    text[:20] for text in [*TEXTS, 'circle ' * 30]
  )
  assert batches.skipped == {'no caption': 1}
  assert batches.shortened == {'caption cut to 12 tokens': 1}
  # Each of several processes reads a part of them.
  parts = [_read(shuffle=False, share=share, shares=2)[0] for share in range(2)]
  assert sorted(sum(parts, [])) == sorted(read) and all(parts)


def test_a_text_file_makes_a_vocabulary(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(TEXTS))
  gin_config.parse(['gin_configs/tasks/text.gin'], [f"text.path = '{tmp_path}'"])
  found = vocabulary_lib._with_text([sources.configured('text')], 'train')
  assert list(found) == TEXTS


def test_a_text_source_has_no_pictures(tmp_path):
  (tmp_path / 'a.txt').write_text('red circle')
  gin_config.parse(['gin_configs/tasks/text.gin'], [f"text.path = '{tmp_path}'"])
  with pytest.raises(UserError, match="data.source='text'"):
    Batches('images', 'train', 1, {'images': 8})
  with pytest.raises(UserError, match=r"text .*'validation'.*text\.splits"):
    Batches('texts', 'validation', 1, LENGTHS)


def test_texts_of_a_folder_need_none_of_its_pictures(tmp_path):
  lines = [json.dumps({'file': f'{i}.png', 'caption': text}) for i, text in enumerate(TEXTS)]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
  gin_config.parse(['gin_configs/tasks/folder.gin'], [f"folder.path = '{tmp_path}'"])
  assert sorted(_read()[0]) == sorted(TEXTS)
  assert _read(shuffle=False)[0] == TEXTS


def test_texts_of_tfrecords_need_no_pictures(tmp_path):
  records = [tfrecord_files.example(text=text.encode()) for text in TEXTS]
  (tmp_path / 'train.tfrecord').write_bytes(tfrecord_files.framed(records))
  gin_config.parse(
    ['gin_configs/tasks/tfrecord.gin'],
    [f"tfrecord.path = '{tmp_path}'", "tfrecord.caption_key = 'text'"],
  )
  assert sorted(_read()[0]) == sorted(TEXTS)
  with pytest.raises(UserError, match=r"'image'.* text .*tfrecord\.image_key"):
    Batches('images', 'train', 1, {'images': 8})
  with gin.unlock_config():
    gin.parse_config("tfrecord.caption_key = 'caption'")
  with pytest.raises(UserError, match=r"'caption'.* text .*tfrecord\.caption_key"):
    _read()


def test_texts_of_openmoji_are_read_without_rendering_it(monkeypatch):
  monkeypatch.setattr(openmoji_builder, 'at_size', lambda *_: pytest.fail('drawn'))
  read, _ = _read('openmoji_texts', 'validation')
  assert len(read) == 151 and len(set(read)) == 151


def test_a_task_of_pairs_is_not_a_task_of_texts(tmp_path):
  (tmp_path / 'captions.jsonl').write_text('{"file": "a.png", "caption": "red circle"}')
  (tmp_path / 'a.png').write_bytes(b'')
  gin_config.parse(['gin_configs/tasks/folder.gin'], [f"folder.path = '{tmp_path}'"])
  with pytest.raises(
    UserError, match="folder_pairs .*images, inputs.* inputs; .*train.task = 'texts'$"
  ):
    Batches('pairs', 'train', 1, LENGTHS)
