"""MS-COCO's captions, from its annotation file and a folder of pictures, or tensorflow-datasets.

Lin et al. 2014, arXiv 1405.0312, and Chen et al. 2015, arXiv 1504.00325. The file comes from the
"2014 Train/Val annotations", captions_val2014.json (or from 2017): {"images": [{"id", "file_name",
…}], "annotations": [{"image_id", "caption", …}], …}. Ids may be numbers or strings, and file names
may contain folders. Parti's evaluation uses 30,000 captions of the validation pictures of 2014.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.evaluation.datasets import captioned_pictures

NAME = 'MS-COCO'

_FILE = 'the file captions_val2014.json of MS-COCO'

# tensorflow-datasets has Karpathy's splits; together these are the validation pictures of 2014.
_TFDS_SPLIT = 'val+test+restval'


def read(
  annotations: str, pictures: str | None, limit: int, seed: int
) -> captioned_pictures.Captioned:
  """Reads captions from the annotation file and chooses among them.

  Args:
    annotations: path of the file.
    pictures: path of the folder with the picture files; None to read only captions.
    limit: maximum number of captions.
    seed: seed of the choice.

  Returns:
    The captions and their pictures.

  Raises:
    UserError: the file or the folder can't be read, an entry is incomplete, a file's name points
      outside of the folder, no caption is usable, or no picture file exists.
  """
  content = _load(annotations)
  names = _file_names(content['images'], annotations)
  there = set() if pictures is None else captioned_pictures.names_in(pictures)
  captions = captioned_pictures.Captions()
  for number, annotation in enumerate(content['annotations'], 1):
    location = f'{annotations}, annotations, entry {number}'
    identity = _identity(annotation, 'image_id', location)
    if identity not in names:
      raise UserError(f'{location}: image_id {identity} is not among its images')
    name = names[identity]
    if pictures is None:
      captions.add(annotation.get('caption'), name)
      continue
    path = pathlib.Path(pictures, name)
    found = path.is_file() if '/' in name else name in there
    captions.add(annotation.get('caption'), path if found else None)
  captions.check(annotations)
  return captioned_pictures.of_files(NAME, captions, pictures, limit, seed)


def _load(path: str) -> dict:
  """Reads the file and checks its top-level structure."""
  content = captioned_pictures.read_json(path, _FILE)
  for key in ('images', 'annotations'):
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise UserError(f'--annotations {path} has no list {key!r}; expected {_FILE}')
    if not content[key]:
      raise UserError(f'--annotations {path}: its list {key!r} is empty')
  return content


def _file_names(images: list, annotations: str) -> dict[str, str]:
  """Returns {id: file name}, where names are paths within the folder of pictures."""
  names: dict[str, str] = {}
  for number, image in enumerate(images, 1):
    location = f'{annotations}, images, entry {number}'
    identity, name = _identity(image, 'id', location), image.get('file_name')
    if not isinstance(name, str) or not name:
      raise UserError(f"{location}: it has no string 'file_name'")
    if not _lies_within(name):
      raise UserError(
        f'{location}: the file_name {name!r} is not a path within the folder of pictures'
      )
    if names.setdefault(identity, name) != name:
      raise UserError(f'{location}: the id {identity} already belongs to {names[identity]!r}')
  return names


def _lies_within(name: str) -> bool:
  """Returns whether a file name can only refer to a file inside a folder."""
  valid = '\0' not in name and not any('\ud800' <= character <= '\udfff' for character in name)
  return valid and not name.startswith('/') and '..' not in name.split('/')


def _identity(entry: object, key: str, location: str) -> str:
  """Returns the picture id in an entry; raises UserError, which names the entry, without one."""
  value = captioned_pictures.identity(entry.get(key)) if isinstance(entry, dict) else None
  if value is None:
    raise UserError(f'{location}: it has no whole number or string {key!r}')
  return value


class _TfdsPictures:
  """Some pictures of a tensorflow-datasets split, given by their positions in it."""

  def __init__(self, builder, positions: list[int]):
    self._builder = builder
    self._positions = positions

  def __len__(self):
    return len(self._positions)

  def encoded(self) -> Iterator[bytes]:
    wanted = set(self._positions)
    for position, example in enumerate(_examples(self._builder, ('image',))):
      if position in wanted:
        yield example['image']


def _examples(builder, keys: tuple[str, ...]) -> Iterator[dict]:
  """Yields a split's examples in a fixed order, with encoded pictures."""
  from parti_jax.data import streams
  from parti_jax.data.quiet_tensorflow import tfds

  features = builder.info.features
  dataset = builder.as_dataset(
    split=_TFDS_SPLIT,
    shuffle_files=False,
    decoders=tfds.decode.PartialDecoding(
      {key: features[key] for key in keys},
      decoders={'image': tfds.decode.SkipDecoding()} if 'image' in keys else None,
    ),
  )
  with streams.Stream(dataset) as examples:
    yield from examples


def read_tfds(data_dir: str | None, limit: int, seed: int) -> captioned_pictures.Captioned:
  """Reads captions from tensorflow-datasets' `coco_captions` and chooses among them.

  The data set must have been prepared with `tfds build coco_captions`; nothing is downloaded.

  Args:
    data_dir: data folder of tensorflow-datasets; None for its default.
    limit: maximum number of captions.
    seed: seed of the choice.

  Returns:
    The captions and their pictures.

  Raises:
    UserError: the data set hasn't been prepared.
  """
  from parti_jax.data.quiet_tensorflow import tfds

  builder = tfds.builder('coco_captions', data_dir=data_dir)
  if not builder.info.splits:
    raise UserError(
      f'coco_captions is not prepared in {builder.data_dir}: run `tfds build coco_captions` '
      '(--tfds_dir names another folder), or give --annotations with --pictures or --reference'
    )
  found = captioned_pictures.Captions()
  for position, example in enumerate(_examples(builder, ('captions',))):
    for text in example['captions']['text']:
      found.add(text.decode('utf-8', 'surrogateescape'), position)
  found.check(str(builder.data_dir))
  captions, picture_of = zip(*found.found)
  chosen = captioned_pictures.choose(picture_of, limit, seed)
  positions = sorted({picture_of[index] for index in chosen})
  index_of = {position: index for index, position in enumerate(positions)}
  return captioned_pictures.Captioned(
    NAME,
    [captions[index] for index in chosen],
    np.array([index_of[picture_of[index]] for index in chosen]),
    _TfdsPictures(builder, positions),
    len(captions),
    dict(found.skipped),
  )
