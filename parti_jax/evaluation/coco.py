"""MS-COCO's captions: the annotation file and a folder of pictures, or tensorflow-datasets.

Lin et al. 2014, arXiv 1405.0312, and Chen et al. 2015, arXiv 1504.00325. The file is that of the
"2014 Train/Val annotations", captions_val2014.json (or of 2017): {"images": [{"id", "file_name",
…}], "annotations": [{"image_id", "caption", …}], …}. Parti's evaluation takes 30,000
captions of the validation pictures of 2014.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from parti_jax.errors import UserError
from parti_jax.evaluation import captioned_pictures

NAME = 'MS-COCO'

# tensorflow-datasets has Karpathy's splits; these make up the validation pictures of 2014.
_TFDS_SPLIT = 'val+test+restval'


def read(annotations: str, pictures: str, limit: int, seed: int) -> captioned_pictures.Captioned:
  """Reads captions from the annotation file and chooses among them.

  Args:
    annotations: path of the file.
    pictures: path of the folder with the picture files.
    limit: how many captions at most.
    seed: of the choice.

  Returns:
    The captions and their pictures.

  Raises:
    UserError: the file or the folder can't be read, an entry lacks what it must have, or no
      picture is there.
  """
  content = _load(annotations)
  names = {}
  for number, image in enumerate(content['images'], 1):
    identity, name = (_value(image, key, kind, annotations, f'images, entry {number}')
                      for key, kind in (('id', int), ('file_name', str)))
    names[identity] = name
  there = captioned_pictures.names_in(pictures)
  captions = []
  for number, annotation in enumerate(content['annotations'], 1):
    place = f'annotations, entry {number}'
    caption = _value(annotation, 'caption', str, annotations, place).strip()
    identity = _value(annotation, 'image_id', int, annotations, place)
    if not caption:
      raise UserError(f'{annotations}, {place}: the caption is empty')
    if identity not in names:
      raise UserError(f'{annotations}, {place}: image_id {identity} is not among its images')
    name = names[identity]
    captions.append((caption, pathlib.Path(pictures, name) if name in there else None))
  return captioned_pictures.of_files(NAME, captions, pictures, limit, seed)


def _load(path: str) -> dict:
  """Reads the file and checks its outer form."""
  try:
    content = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'--annotations {path} cannot be read ({error.strerror}); it is the file '
                    'captions_val2014.json of MS-COCO') from error
  except ValueError as error:
    raise UserError(f'--annotations {path} is no JSON ({error}); it is the file '
                    'captions_val2014.json of MS-COCO') from error
  for key in ('images', 'annotations'):
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise UserError(f'--annotations {path} has no list {key!r}; it is the file '
                      'captions_val2014.json of MS-COCO')
    if not content[key]:
      raise UserError(f'--annotations {path}: its list {key!r} is empty')
  return content


def _value(entry, key: str, kind: type, path: str, place: str):
  """Returns a value of an entry, or raises a UserError that names the entry."""
  if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
    what = {int: 'whole number', str: 'text'}[kind]
    raise UserError(f'{path}, {place}: no {what} {key!r} in it')
  return entry[key]


class _TfdsPictures:
  """Some pictures of a tensorflow-datasets split, by their places in it."""

  def __init__(self, builder, places: list[int]):
    self._builder = builder
    self._places = places

  def __len__(self):
    return len(self._places)

  def encoded(self) -> Iterator[bytes]:
    wanted = set(self._places)
    for place, example in enumerate(_examples(self._builder, ('image',))):
      if place in wanted:
        yield example['image']


def _examples(builder, keys: tuple[str, ...]) -> Iterator[dict]:
  """Yields a split's examples in one fixed order, pictures encoded."""
  # pylint: disable=import-outside-toplevel
  from parti_jax.data import streams
  from parti_jax.data.quiet_tensorflow import tfds
  features = builder.info.features
  dataset = builder.as_dataset(
      split=_TFDS_SPLIT, shuffle_files=False,
      decoders=tfds.decode.PartialDecoding(
          {key: features[key] for key in keys},
          decoders={'image': tfds.decode.SkipDecoding()} if 'image' in keys else None))
  with streams.Stream(dataset) as examples:
    yield from examples


def read_tfds(data_dir: str | None, limit: int, seed: int) -> captioned_pictures.Captioned:
  """Reads captions from tensorflow-datasets' `coco_captions` and chooses among them.

  Nothing is downloaded: the data set has been prepared, with `tfds build coco_captions`.

  Args:
    data_dir: where tensorflow-datasets keeps it; None for its own folder.
    limit: how many captions at most.
    seed: of the choice.

  Returns:
    The captions and their pictures.

  Raises:
    UserError: the data set is not prepared there.
  """
  from parti_jax.data.quiet_tensorflow import tfds  # pylint: disable=import-outside-toplevel
  builder = tfds.builder('coco_captions', data_dir=data_dir)
  if not builder.info.splits:
    raise UserError(
        f'coco_captions is not prepared in {builder.data_dir}: run `tfds build coco_captions` '
        '(--tfds_dir names another folder), or give --annotations and --pictures')
  captions, picture_of = [], []
  for place, example in enumerate(_examples(builder, ('captions',))):
    texts = [text.decode('utf-8').strip() for text in example['captions']['text']]
    captions += [text for text in texts if text]
    picture_of += [place] * sum(map(bool, texts))
  chosen = captioned_pictures.choose(picture_of, limit, seed)
  places = sorted({picture_of[index] for index in chosen})
  index_of = {place: index for index, place in enumerate(places)}
  return captioned_pictures.Captioned(
      NAME, [captions[index] for index in chosen],
      np.array([index_of[picture_of[index]] for index in chosen]),
      _TfdsPictures(builder, places), len(captions), {})
