"""The sets of pictures that are neither an .npz nor a folder: tensorflow-datasets and sources."""

import json

import numpy as np
import pytest
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.data.sources import folder as folder_source
from parti_jax.evaluation.datasets import picture_sets

SHADES = (10, 60, 110, 160, 210)
EVERY = lambda index: True


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(picture_sets, 'BLOCK', 2)


def _shades(blocks):
  return [round(float(image.mean())) for block in blocks for image in block.images]


@pytest.fixture(scope='module', name='prepared')
def fixture_prepared(tmp_path_factory):
  """The files of a data set that tensorflow-datasets has prepared."""
  tfds = pytest.importorskip('tensorflow_datasets')
  folder = tmp_path_factory.mktemp('tfds')
  tfds.dataset_builders.store_as_tfds_dataset(
    name='shades',
    version='1.0.0',
    data_dir=folder,
    features=tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(encoding_format='png'),
        'label': tfds.features.ClassLabel(num_classes=9),
      }
    ),
    split_datasets={
      'validation': [
        (index, {'image': np.full((6, 10, 3), shade, np.uint8), 'label': index})
        for index, shade in enumerate(SHADES)
      ]
    },
    disable_shuffling=True,
  )
  tfds.dataset_builders.store_as_tfds_dataset(
    name='words',
    version='1.0.0',
    data_dir=folder,
    features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    split_datasets={'validation': [(0, {'text': 'a'})]},
  )
  return str(folder)


def test_tensorflow_datasets(prepared):
  found = picture_sets.TfdsSet('shades', 'validation', prepared)
  assert found.count == 5
  blocks = list(found.blocks(4, EVERY))
  assert [block.images.shape for block in blocks] == [(2, 4, 4, 3), (2, 4, 4, 3), (1, 4, 4, 3)]
  assert tuple(_shades(blocks)) == SHADES
  assert {block.formats for block in blocks} == {('PNG',)} and blocks[0].resized == 2
  second = list(found.blocks(4, lambda index: index == 1))
  assert second[0] is None and second[2] is None and tuple(_shades(second[1:2])) == SHADES[2:4]
  assert found.identity() == picture_sets.TfdsSet('shades', 'validation', prepared).identity()


@pytest.mark.parametrize(
  'name, split, named',
  [
    ('shades', 'train', '--tfds shades, --split train'),
    ('words', 'validation', "no feature 'image', but text"),
    ('nothing_like_it', 'validation', '--tfds nothing_like_it'),
    ('mnist', 'test', 'mnist is not prepared in .*tfds build mnist'),
  ],
)
def test_unusable_data_sets_are_named(prepared, name, split, named):
  with pytest.raises(UserError, match=named):
    picture_sets.TfdsSet(name, split, prepared)


def test_a_source(tmp_path):
  lines = []
  for index, shade in enumerate(SHADES):
    Image.new('RGB', (8, 8), (shade,) * 3).save(tmp_path / f'{index}.jpg', quality=95)
    lines.append(json.dumps({'file': f'{index}.jpg', 'caption': 'a shade'}))
  lines.append(json.dumps({'file': 'broken.jpg', 'caption': 'nothing'}))
  (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8')
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
  source = folder_source.configured(str(tmp_path), {'validation': 'captions.jsonl'})
  found = picture_sets.SourceSet(source, 'validation')
  assert found.count == 6 and str(tmp_path) in found.place
  blocks = list(found.blocks(8, EVERY))
  assert tuple(_shades(blocks)) == SHADES
  assert sum(sum(block.skipped.values()) for block in blocks) == 1
  assert blocks[0].formats == ('JPEG',) and blocks[0].resized == 0
  before = found.identity()
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines[:3]))
  assert picture_sets.SourceSet(source, 'validation').identity() != before


def test_a_set_of_pictures_in_blocks_of_several_sizes_is_refused(tmp_path):
  for index, size in enumerate((8, 8, 9)):
    Image.new('RGB', (size, size)).save(tmp_path / f'{index}.png')
  found = picture_sets.open_path(str(tmp_path))
  assert found.size() == (8, 8)
  with pytest.raises(UserError, match='8×8 and of 9×9 pixels; give --image_size'):
    list(found.blocks(None, EVERY))
