"""Tests of the loaders of MS-COCO and Localized Narratives, on small files in their format."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.evaluation.datasets import captioned_pictures
from parti_jax.evaluation.datasets import coco
from parti_jax.evaluation.datasets import localized_narratives


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
      for turn in range(captions)
    ]
  path = folder / 'captions_val2014.json'
  path.write_text(json.dumps(content | changes))
  return str(path), str(place)


def pairs(captioned):
  """Returns each caption with the name of its picture's file."""
  return {
    caption: captioned.pictures.paths[picture].name
    for caption, picture in zip(captioned.captions, captioned.picture_of)
  }


def test_all_pictures_get_a_caption_before_any_gets_two():
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


def test_missing_coco_pictures_are_counted(tmp_path):
  annotations, pictures = coco_files(tmp_path)
  (tmp_path / 'val2014' / 'COCO_val2014_000000000102.jpg').unlink()
  captioned = coco.read(annotations, pictures, limit=100, seed=0)
  assert len(captioned.captions) == 10 and captioned.skipped == {'no picture file': 2}
  assert not any(caption.startswith('102') for caption in captioned.captions)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='--pictures .*empty: none of the 12 captions'):
    coco.read(annotations, str(tmp_path / 'empty'), limit=100, seed=0)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'images': None}, "no list 'images'"),
    ({'annotations': []}, "its list 'annotations' is empty"),
    ({'annotations': [{'image_id': 100}]}, r'no usable caption \(1 no caption\)'),
    ({'annotations': [{'image_id': 100, 'caption': ' '}]}, 'no usable caption'),
    ({'annotations': [{'image_id': 7, 'caption': 'a'}]}, 'image_id 7 is not among its images'),
    (
      {'annotations': [{'image_id': None, 'caption': 'a'}]},
      "entry 1: it has no whole .* 'image_id'",
    ),
    ({'annotations': ['a']}, "annotations, entry 1: it has no whole number or string 'image_id'"),
    (
      {'images': [{'id': True, 'file_name': 'a'}]},
      "images, entry 1: it has no whole number .* 'id'",
    ),
    (
      {'images': [{'id': 1.5, 'file_name': 'a'}]},
      "images, entry 1: it has no whole number .* 'id'",
    ),
    ({'images': [{'id': 1}]}, "images, entry 1: no text 'file_name'"),
    (
      {'images': [{'id': 1, 'file_name': 'a'}, {'id': '1', 'file_name': 'b'}]},
      "images, entry 2: the id 1 already belongs to 'a'",
    ),
    (
      {'images': [{'id': 1, 'file_name': '../a.jpg'}]},
      r"file_name '\.\./a.jpg' is not a path within",
    ),
    ({'images': [{'id': 1, 'file_name': 'a/../../b'}]}, 'is not a path within the folder'),
    ({'images': [{'id': 1, 'file_name': '/etc/passwd'}]}, 'is not a path within the folder'),
    ({'images': [{'id': 1, 'file_name': 'a\0b'}]}, 'is not a path within the folder'),
    ({'images': [{'id': 1, 'file_name': '\ud83d'}]}, 'is not a path within the folder'),
  ],
)
def test_coco_files_of_another_format(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    coco.read(*coco_files(tmp_path, **changes), limit=4, seed=0)


def test_unusable_coco_captions_are_skipped_and_counted(tmp_path):
  values = ['100, 0', ' ', '', None, ['100, 0'], {'raw': 'a'}, 7, 'half a pair \ud83d']
  annotations = [{'image_id': 100, 'caption': value} for value in values] + [{'image_id': 100}]
  captioned = coco.read(*coco_files(tmp_path, annotations=annotations), limit=9, seed=0)
  assert captioned.captions == ['100, 0'] and captioned.available == 1
  assert captioned.skipped == {
    'no caption': 4,
    'caption that is not a text': 3,
    'caption not UTF-8': 1,
  }


def test_coco_ids_and_folders(tmp_path):
  """Ids are numbers or strings; file names may contain folders."""
  (tmp_path / 'photos' / 'val' / 'a').mkdir(parents=True)
  for shade, name in ((10, 'val/a/1.jpg'), (20, 'val/1.jpg'), (30, '1.jpg')):
    write_picture(tmp_path / 'photos' / name, shade)
  content = {
    'images': [
      {'id': 7, 'file_name': 'val/a/1.jpg'},
      {'id': '8', 'file_name': 'val/1.jpg'},
      {'id': 'x9', 'file_name': '1.jpg'},
      {'id': 10, 'file_name': 'val/none.jpg'},
      {'id': 11, 'file_name': 'val/a'},
    ],
    'annotations': [
      {'image_id': identity, 'caption': caption}
      for identity, caption in (
        ('7', '10'),
        (8, '20'),
        ('x9', '30'),
        (10, 'not there'),
        (11, 'a folder'),
      )
    ],
  }
  path = tmp_path / 'annotations.json'
  # As written by Windows programs.
  path.write_bytes(b'\xef\xbb\xbf' + json.dumps(content).encode())
  captioned = coco.read(str(path), str(tmp_path / 'photos'), 9, 0)
  assert captioned.skipped == {'no picture file': 2}
  encoded = list(captioned.pictures.encoded())
  shown = {
    caption: np.asarray(Image.open(io.BytesIO(encoded[picture]))).mean()
    for caption, picture in zip(captioned.captions, captioned.picture_of)
  }
  assert shown.keys() == {'10', '20', '30'}
  assert all(abs(shade - int(caption)) < 2 for caption, shade in shown.items())


def test_coco_files_that_cannot_be_read(tmp_path):
  annotations, pictures = coco_files(tmp_path)
  with pytest.raises(UserError, match='--annotations .*nothing.json cannot be read'):
    coco.read(str(tmp_path / 'nothing.json'), pictures, 4, 0)
  with pytest.raises(UserError, match='--pictures .*nothing cannot be read'):
    coco.read(annotations, str(tmp_path / 'nothing'), 4, 0)
  (tmp_path / 'captions_val2014.json').write_text('{"images": [')
  with pytest.raises(UserError, match='is no JSON'):
    coco.read(annotations, pictures, 4, 0)
  (tmp_path / 'captions_val2014.json').write_text('[' * 100_000)
  with pytest.raises(UserError, match='is no JSON'):
    coco.read(annotations, pictures, 4, 0)


def test_coco_of_tensorflow_datasets(tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  with pytest.raises(UserError, match='coco_captions is not prepared .*tfds build coco_captions'):
    coco.read_tfds(str(tmp_path), 4, 0)
  # The files of `tfds build coco_captions`, with fewer pictures.
  features = tfds.builder('coco_captions').info.features
  tfds.dataset_builders.store_as_tfds_dataset(
    name='coco_captions',
    version='1.1.0',
    config='2014',
    data_dir=tmp_path,
    features=features,
    split_datasets={
      split: [(i, tfds_example(10 * start + i)) for i in range(2)]
      for start, split in enumerate(('train', 'val', 'test', 'restval'))
    },
    disable_shuffling=True,
  )
  captioned = coco.read_tfds(str(tmp_path), 9, 0)
  assert captioned.available == 12 and len(captioned.captions) == 9
  assert captioned.skipped == {'no caption': 6}
  encoded = list(captioned.pictures.encoded())
  assert len(encoded) == len(captioned.pictures) == 6  # No pictures of train.
  for caption, picture in zip(captioned.captions, captioned.picture_of):
    shade = np.asarray(Image.open(io.BytesIO(encoded[picture]))).mean()
    assert abs(shade - int(caption.split(',')[0])) < 2 and shade >= 10


def tfds_example(shade):
  return {
    'image': np.full((10, 20, 3), shade, np.uint8),
    'image/filename': f'{shade}.jpg',
    'image/id': shade,
    'objects': [],
    'captions': [
      {'text': f'{shade}, {turn}' if turn < 2 else ' ', 'id': turn} for turn in range(3)
    ],
  }


def narratives(folder, lines):
  folder.mkdir(exist_ok=True)
  path = folder / 'coco_val_localized_narratives.jsonl'
  path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return str(path)


def test_narratives_of_coco_pictures(tmp_path):
  lines = [
    {
      'dataset_id': 'mscoco_val2017',
      'image_id': '137576',
      'annotator_id': 93,
      'caption': 'In this image there are cows. ',
      'traces': [[{'x': 0.2, 'y': 0.7}]],
    },
    {'dataset_id': 'mscoco_val2017', 'image_id': '9', 'caption': 'A dog.'},
    '',
    {'dataset_id': 'mscoco_val2017', 'image_id': '9', 'caption': 'A brown dog.'},
    {'dataset_id': 'open_images', 'image_id': '00ab', 'caption': 'A house.'},
    {'dataset_id': 'mscoco_val2017', 'image_id': '10', 'caption': 'Not there.'},
  ]
  for name in ('000000137576', 'COCO_val2014_000000000009', '00ab'):
    write_picture(tmp_path / f'{name}.jpg')
  captioned = localized_narratives.read(narratives(tmp_path, lines), str(tmp_path), 10, 0)
  assert pairs(captioned) == {
    'In this image there are cows.': '000000137576.jpg',
    'A dog.': 'COCO_val2014_000000000009.jpg',
    'A brown dog.': 'COCO_val2014_000000000009.jpg',
    'A house.': '00ab.jpg',
  }
  assert len(captioned.pictures) == 3 and captioned.skipped == {'no picture file': 1}


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_narratives_with_other_ids_endings_and_captions(tmp_path, encoding):
  rows = [
    {'image_id': 7, 'caption': 'A\u2028dog.'},
    {'image_id': 'ADE_1', 'caption': 'A cat.'},
    {'image_id': 7, 'caption': None},
    {'image_id': 7, 'caption': ['A dog.']},
    {'image_id': 7},
    {'image_id': 7, 'caption': ' '},
  ]
  path = tmp_path / 'narratives.jsonl'
  path.write_text(
    '\r\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding
  )
  write_picture(tmp_path / '7.JPG')
  write_picture(tmp_path / 'ADE_1.jpeg')
  captioned = localized_narratives.read(str(path), str(tmp_path), 9, 0)
  assert pairs(captioned) == {'A\u2028dog.': '7.JPG', 'A cat.': 'ADE_1.jpeg'}
  assert captioned.skipped == {'no caption': 3, 'caption that is not a text': 1}


@pytest.mark.parametrize(
  'lines, message',
  [
    (['{"image_id": "1", "caption": "a"}', '{'], 'line 2: not JSON'),
    (['[' * 100_000], 'line 1: not JSON'),
    ([{'image_id': '1', 'caption': ''}], r'no usable caption \(1 no caption\)'),
    ([{'image_id': 1.5, 'caption': 'a'}], "line 1: it has no whole number or string 'image_id'"),
    ([{'caption': 'a'}], "line 1: it has no whole number or string 'image_id'"),
    (['[]'], 'line 1: not a JSON object'),
    ([''], r'no usable caption \(it is empty\)'),
  ],
)
def test_narratives_of_another_format(tmp_path, lines, message):
  with pytest.raises(UserError, match=message):
    localized_narratives.read(narratives(tmp_path, lines), str(tmp_path), 10, 0)
