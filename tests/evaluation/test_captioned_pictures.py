"""Tests of the loaders of MS-COCO and Localized Narratives, on small files of their form."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from parti_jax.errors import UserError
from parti_jax.evaluation import captioned_pictures
from parti_jax.evaluation import coco
from parti_jax.evaluation import localized_narratives


def write_picture(path, shade=0):
  Image.new('RGB', (20, 10), (shade, shade, shade)).save(path)


def coco_files(folder, pictures=6, captions=2, **changes):
  """Writes captions_val2014.json and its pictures; `changes` replace top-level entries."""
  place = folder / 'val2014'
  place.mkdir(parents=True)
  content = {'info': {'year': 2014}, 'licenses': [], 'images': [], 'annotations': []}
  for identity in range(100, 100 + pictures):
    name = f'COCO_val2014_{identity:012d}.jpg'
    write_picture(place / name, identity)
    content['images'].append({'id': identity, 'file_name': name, 'height': 10, 'width': 20})
    content['annotations'] += [
        {'id': 10 * identity + turn, 'image_id': identity, 'caption': f'{identity}, {turn} \n'}
        for turn in range(captions)]
  path = folder / 'captions_val2014.json'
  path.write_text(json.dumps(content | changes))
  return str(path), str(place)


def pairs(captioned):
  """Each caption with the name of its picture's file."""
  return {caption: captioned.pictures.paths[picture].name
          for caption, picture in zip(captioned.captions, captioned.picture_of)}


def test_every_picture_gets_a_caption_before_any_gets_two():
  picture_of = np.repeat(np.arange(50), 5)
  chosen = captioned_pictures.choose(picture_of, 50, seed=0)
  assert sorted(picture_of[chosen]) == list(range(50))
  more = captioned_pictures.choose(picture_of, 80, seed=0)
  assert list(more[:50]) == list(chosen)
  assert set(collections.Counter(picture_of[more].tolist()).values()) == {1, 2}
  assert list(chosen) != list(captioned_pictures.choose(picture_of, 50, seed=1))
  # Not always a picture's first caption.
  assert len(set((chosen % 5).tolist())) > 1


def test_coco_captions_with_their_pictures(tmp_path):
  captioned = coco.read(*coco_files(tmp_path), limit=4, seed=3)
  assert len(captioned.captions) == 4 and len(captioned.pictures) == 4
  assert captioned.available == 12 and captioned.skipped == {}
  for caption, name in pairs(captioned).items():
    assert name == f'COCO_val2014_{int(caption.split(",")[0]):012d}.jpg'
  encoded = list(captioned.pictures.encoded())
  assert Image.open(io.BytesIO(encoded[0])).size == (20, 10)
  again = coco.read(*coco_files(tmp_path / 'again'), limit=4, seed=3)
  assert again.captions == captioned.captions


def test_coco_pictures_that_are_not_there_are_counted(tmp_path):
  annotations, pictures = coco_files(tmp_path)
  (tmp_path / 'val2014' / 'COCO_val2014_000000000102.jpg').unlink()
  captioned = coco.read(annotations, pictures, limit=100, seed=0)
  assert len(captioned.captions) == 10 and captioned.skipped == {'no picture file': 2}
  assert not any(caption.startswith('102') for caption in captioned.captions)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='--pictures .*empty: none of the 12 captions'):
    coco.read(annotations, str(tmp_path / 'empty'), limit=100, seed=0)


@pytest.mark.parametrize('changes, message', [
    ({'images': None}, "no list 'images'"),
    ({'annotations': []}, "its list 'annotations' is empty"),
    ({'annotations': [{'image_id': 100}]}, "annotations, entry 1: no text 'caption'"),
    ({'annotations': [{'image_id': 100, 'caption': ' '}]}, 'entry 1: the caption is empty'),
    ({'annotations': [{'image_id': 7, 'caption': 'a'}]}, 'image_id 7 is not among its images'),
    ({'images': [{'id': 'x', 'file_name': 'a'}]}, "images, entry 1: no whole number 'id'"),
    ({'annotations': [{'image_id': 100, 'caption': '\ud800'}]}, "'caption' has characters that are"),
])
def test_coco_files_of_another_form(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    coco.read(*coco_files(tmp_path, **changes), limit=4, seed=0)


def test_coco_files_that_cannot_be_read(tmp_path):
  annotations, pictures = coco_files(tmp_path)
  with pytest.raises(UserError, match='--annotations .*nothing.json cannot be read'):
    coco.read(str(tmp_path / 'nothing.json'), pictures, 4, 0)
  with pytest.raises(UserError, match='--pictures .*nothing cannot be read'):
    coco.read(annotations, str(tmp_path / 'nothing'), 4, 0)
  (tmp_path / 'captions_val2014.json').write_text('{"images": [')
  with pytest.raises(UserError, match='is no JSON'):
    coco.read(annotations, pictures, 4, 0)


def test_coco_of_tensorflow_datasets(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  with pytest.raises(UserError, match='coco_captions is not prepared .*tfds build coco_captions'):
    coco.read_tfds(str(tmp_path), 4, 0)
  # What `tfds build coco_captions` writes, but for its number of pictures.
  features = tfds.builder('coco_captions').info.features
  tfds.dataset_builders.store_as_tfds_dataset(
      name='coco_captions', version='1.1.0', config='2014', data_dir=tmp_path, features=features,
      split_datasets={split: [(i, tfds_example(10 * start + i)) for i in range(2)]
                      for start, split in enumerate(('train', 'val', 'test', 'restval'))},
      disable_shuffling=True)
  captioned = coco.read_tfds(str(tmp_path), 9, 0)
  assert captioned.available == 12 and len(captioned.captions) == 9
  encoded = list(captioned.pictures.encoded())
  assert len(encoded) == len(captioned.pictures) == 6  # No picture of train.
  for caption, picture in zip(captioned.captions, captioned.picture_of):
    shade = np.asarray(Image.open(io.BytesIO(encoded[picture]))).mean()
    assert abs(shade - int(caption.split(',')[0])) < 2 and shade >= 10


def tfds_example(shade):
  return {
      'image': np.full((10, 20, 3), shade, np.uint8), 'image/filename': f'{shade}.jpg',
      'image/id': shade, 'objects': [],
      'captions': [{'text': f'{shade}, {turn}', 'id': turn} for turn in range(2)]}


def narratives(folder, lines):
  folder.mkdir(exist_ok=True)
  path = folder / 'coco_val_localized_narratives.jsonl'
  path.write_text('\n'.join(
      line if isinstance(line, str) else json.dumps(line) for line in lines))
  return str(path)


def test_narratives_of_coco_pictures(tmp_path):
  lines = [{'dataset_id': 'mscoco_val2017', 'image_id': '137576', 'annotator_id': 93,
            'caption': 'In this image there are cows. ', 'traces': [[{'x': 0.2, 'y': 0.7}]]},
           {'dataset_id': 'mscoco_val2017', 'image_id': '9', 'caption': 'A dog.'}, '',
           {'dataset_id': 'mscoco_val2017', 'image_id': '9', 'caption': 'A brown dog.'},
           {'dataset_id': 'open_images', 'image_id': '00ab', 'caption': 'A house.'},
           {'dataset_id': 'mscoco_val2017', 'image_id': '10', 'caption': 'Not there.'}]
  for name in ('000000137576', 'COCO_val2014_000000000009', '00ab'):
    write_picture(tmp_path / f'{name}.jpg')
  captioned = localized_narratives.read(narratives(tmp_path, lines), str(tmp_path), 10, 0)
  assert pairs(captioned) == {
      'In this image there are cows.': '000000137576.jpg',
      'A dog.': 'COCO_val2014_000000000009.jpg', 'A brown dog.': 'COCO_val2014_000000000009.jpg',
      'A house.': '00ab.jpg'}
  assert len(captioned.pictures) == 3 and captioned.skipped == {'no picture file': 1}


@pytest.mark.parametrize('lines, message', [
    (['{"image_id": "1", "caption": "a"}', '{'], 'line 2: no JSON'),
    ([{'image_id': '1', 'caption': ''}], "line 1: no text 'caption'"),
    ([{'image_id': 1, 'caption': 'a'}], "line 1: no text 'image_id'"),
    (['[]'], "line 1: no text 'image_id'"),
    ([''], 'has no narrative'), (['[' * 10**5], 'line 1: no JSON'),
    ([{'image_id': '1', 'caption': '\ud800'}], "line 1: 'caption' has characters that are not"),
])
def test_narratives_of_another_form(tmp_path, lines, message):
  with pytest.raises(UserError, match=message):
    localized_narratives.read(narratives(tmp_path, lines), str(tmp_path), 10, 0)
