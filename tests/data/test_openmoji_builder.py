"""The tensorflow-datasets builder, run on a part of the pictures."""

import collections

import gin
import numpy as np
import pytest

from parti_jax.data import openmoji, openmoji_builder, tasks
from parti_jax.data.batches import Batches

SIZE = 16


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  some = openmoji.pictures()[::40]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(openmoji, 'pictures', lambda: some)
    folder = tmp_path_factory.mktemp('tfds')
    openmoji_builder.at_size(SIZE, str(folder)).download_and_prepare()
  return folder


def test_examples_are_the_pictures(data_dir):
  builder = openmoji_builder.at_size(SIZE, str(data_dir))
  counts = collections.Counter(p.split for p in openmoji.pictures()[::40])
  assert {name: split.num_examples for name, split in builder.info.splits.items()} == counts
  expected = {p.code: p for p in openmoji.pictures()[::40]}
  for split in openmoji.SPLITS:
    for example in builder.as_dataset(split=split).as_numpy_iterator():
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
  vocabulary = tasks.get_vocabulary()
  pictures = {vocabulary.decode(vocabulary.encode(p.caption, 32)[0]): p
              for p in openmoji.pictures()}
  for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
    picture = pictures[vocabulary.decode(ids)]
    assert picture.split == 'validation'
    np.testing.assert_array_equal(image, openmoji.render(picture.code, SIZE))


def test_pictures_and_captions_are_all_and_in_order(data_dir):
  gin.parse_config(f"openmoji.data_dir = '{data_dir}'")
  first = [caption for caption, _ in tasks.pictures_and_captions('openmoji', 'validation', SIZE)]
  again = [caption for caption, _ in tasks.pictures_and_captions('pairs', 'validation', SIZE)]
  expected = {p.caption for p in openmoji.pictures()[::40] if p.split == 'validation'}
  assert first == again and set(first) == expected and len(first) == len(expected)
