"""Pictures of classes, such as ImageNet's: a folder or tar for each class, or tensorflow-datasets.

The caption of a picture is the text of its class: its name, or its number.
"""

from __future__ import annotations

import array
import functools
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
import xxhash
from absl import logging
from jaxtyping import Int64

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import image_decoding
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import array_records
from parti_jax.data.readers import file_patterns
from parti_jax.data.readers import tar_index
from parti_jax.data.readers import tfrecords
from parti_jax.data.sources import base
from parti_jax.data.sources import paths

# The file of tensorflow-datasets with the key of each label.
_TFDS_LABELS = 'label.labels.txt'
_TFRECORD, _ARRAY_RECORD = '.tfrecord', '.array_record'


class ClassesSource(base.Source):
  """Pictures of classes; `configured` describes the arguments."""

  def __init__(
    self,
    path: str,
    splits: Mapping[str, str],
    names: str | None,
    label: str,
    template: str,
  ):
    super().__init__('classes', splits)
    self.place = f'classes {path}'
    self._path, self._places = path, dict(splits)
    self._names = class_names.read(names) if names is not None else None
    self._label, self._template = label, template
    if self._names is not None:
      self._names.texts(label, template)  # Reports bad values now.

  def open(self, split: str, pictures: bool = True) -> base.Records | base.Shards:
    del pictures  # Finding the classes takes as long as finding the pictures.
    return self._open(split, describe=False)

  def open_described(self, split: str) -> base.Records | base.Shards:
    return self._open(split, describe=True)

  def _open(self, split: str, describe: bool) -> base.Records | base.Shards:
    self.check_split(split)
    place = storage.join(self._path, self._places[split])
    folders = _class_folders(place)
    if folders:
      return self._of_folders(split, place, folders, describe)
    pattern = storage.join(self._places[split], '*') if storage.is_folder(place) else None
    files = file_patterns.files(file_patterns.join(self._path, pattern or self._places[split]))
    tars = [file for file in files if file.endswith('.tar')]
    if tars:
      return self._of_tars(split, tars, describe)
    prepared = [file for file in files if _TFRECORD in file or _ARRAY_RECORD in file]
    if prepared:
      return self._of_tfds(split, prepared, describe)
    raise UserError(
      f'classes: {place} is neither a folder with a folder of pictures for each class, nor are there '
      'tars or files of tensorflow-datasets (gin: classes.path, classes.splits)'
    )

  def _of_folders(
    self, split: str, place: str, folders: Mapping[str, str], describe: bool
  ) -> base.Records:
    classes = self._classes(split, sorted(folders))
    found: list[str] = []
    labels: list[int] = []
    for key, label in self._found(classes, sorted(folders), place).items():
      for name in sorted(storage.names(folders[key])):
        if os.path.splitext(name)[1][1:].lower() in image_decoding.ENDINGS:
          found.append(f'{key}/{name}')
          labels.append(label)
    if empty := len(folders) - len(set(labels)):
      logging.warning('%s: %d of %d folders have no pictures', place, empty, len(folders))
    if not found:
      raise UserError(f'classes: the folders in {place} have no pictures (gin: classes.splits)')
    return _Labeled(
      functools.partial(_read_file, place), found, np.array(labels), self._texts(classes), describe
    )

  def _of_tars(self, split: str, tars: Sequence[str], describe: bool) -> base.Records:
    for file in tars:
      storage.check_local(file)
    logging.info('%s, %s: looking through %d tars', self.place, split, len(tars))
    names: list[str] = []
    where = array.array('q')
    given: list[str | int] = []
    for number, file in enumerate(tars):
      for place in tar_index.places(file):
        names.append(place.name)
        where.extend((number, place.offset, place.size))
        given.append(place.label)
    if not names:
      raise UserError(f'classes: {", ".join(tars[:3])} hold no pictures (gin: classes.splits)')
    kinds = {type(label) for label in given}
    if len(kinds) > 1:
      raise UserError(f'classes: only some of the tars of {split} have .cls files')
    if kinds == {int}:
      labels = np.array(given, np.int64)
      classes = self._numbered(int(labels.max()), split)
    else:
      keys = sorted(set(map(str, given)))
      classes = self._classes(split, keys)
      ids = self._found(classes, keys, f'the tars of {split}')
      labels = np.array([ids[str(label)] for label in given], np.int64)
    places = np.array(where, np.int64).reshape(-1, 3)
    return _Labeled(_Tars(tars, places), names, labels, self._texts(classes), describe)

  def _of_tfds(
    self, split: str, files: Sequence[str], describe: bool
  ) -> base.Records | base.Shards:
    listed = storage.join(self._path, _TFDS_LABELS)
    known = class_names.read(listed) if storage.exists(listed) else None
    classes = self._names or known
    if classes is None:
      raise UserError(
        f'classes: {listed} does not exist; set classes.path to the folder of a prepared version, such '
        'as imagenet2012/5.1.0, or set classes.names'
      )
    if known is not None and list(known.keys) != list(classes.keys):
      raise UserError(
        f'classes: the classes of classes.names are not those of {listed}, in its order'
      )
    parse = _Parse(self._texts(classes), describe)
    if all(_ARRAY_RECORD in file for file in files):
      for file in files:
        storage.check_local(file)
      counts = [array_records.Reader(file, parse).count() for file in files]
      return array_records.ShardRecords(files, counts, parse, base.digest_of(files))
    if any(_ARRAY_RECORD in file for file in files):
      raise UserError(f'classes: the pattern of {split} matches files of two formats')
    return paths.Files(list(files), functools.partial(_tfds_examples, parse=parse))

  def _classes(self, split: str, keys: Sequence[str]) -> class_names.Classes:
    """Returns the classes: of the file of names, or else those that the first split has."""
    if self._names is not None:
      return self._names
    first = next(iter(self._places))
    if split != first:
      folders = _class_folders(storage.join(self._path, self._places[first]))
      if not folders:
        raise UserError(
          f"classes: without classes.names the classes are those of {first!r}, which isn't a folder "
          'with a folder for each class; set classes.names'
        )
      keys = sorted(folders)
    return class_names.of_keys(keys)

  def _numbered(self, largest: int, split: str) -> class_names.Classes:
    """Returns the classes of labels that are numbers up to `largest`."""
    if self._names is None:
      if self._label != 'id':
        raise UserError(
          'classes: the .cls files have the numbers of classes; set classes.names to a file of their '
          "names, or classes.label = 'id'"
        )
      # Any number of classes has the same texts.
      return class_names.of_keys([str(number) for number in range(largest + 1)])
    if largest >= len(self._names):
      raise UserError(
        f'classes: {split} has the class {largest}, but classes.names has {len(self._names)} classes'
      )
    return self._names

  def _found(self, classes: class_names.Classes, keys: Sequence[str], place: str) -> dict[str, int]:
    """Returns {key: id} of the keys that a split has; refuses unknown ones."""
    ids = classes.ids()
    if unknown := [key for key in keys if key not in ids]:
      more = f' and {len(unknown) - 1:,} more' if len(unknown) > 1 else ''
      raise UserError(
        f'classes: {place} has the class {unknown[0]!r}{more}, which is not among the '
        f'{len(classes):,} known ones (gin: classes.names)'
      )
    if len(keys) < len(classes):
      logging.warning('%s: pictures of %d of %d classes', place, len(keys), len(classes))
    return {key: ids[key] for key in keys}

  def _texts(self, classes: class_names.Classes) -> list[bytes]:
    return [text.encode() for text in classes.texts(self._label, self._template)]


def _class_folders(place: str) -> dict[str, str]:
  """Returns {key: folder} of the folders within a folder."""
  if not storage.is_folder(place):
    return {}
  found = {name: storage.join(place, name) for name in storage.names(place) if name[:1] != '.'}
  return {name: folder for name, folder in found.items() if storage.is_folder(folder)}


class _Labeled(base.Records):
  """Pictures that can be read directly, each with a class.

  Args:
    read: returns the bytes of a picture by its index and name; raises OSError.
    names: names of the pictures.
    labels: ids of their classes.
    texts: text of each class.
    describe: whether examples have a key and columns.
  """

  def __init__(
    self,
    read: Callable[[int, str], bytes],
    names: Sequence[str],
    labels: Int64[np.ndarray, 'pictures'],
    texts: Sequence[bytes],
    describe: bool,
  ):
    # Object arrays of bytes take less memory than lists of strings.
    self._read, self._names = read, np.array([os.fsencode(name) for name in names], object)
    self._labels, self._texts, self._describe = labels, texts, describe

  def __len__(self) -> int:
    return len(self._names)

  def digest(self) -> str:
    found = xxhash.xxh3_64(self._labels.astype('<i8').tobytes())
    for value in (*self._names, *self._texts):
      found.update(b'%d ' % len(value) + value)
    return found.hexdigest()

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    return [self._example(int(index)) for index in indices]

  def _example(self, index: int) -> base.Example | Damaged:
    name, label = os.fsdecode(self._names[index]), int(self._labels[index])
    try:
      picture = self._read(index, name)
    except OSError:
      return Damaged('picture that is gone or cannot be read', name)
    example: dict[str, Any] = {'picture': picture, 'caption': self._texts[label]}
    if self._describe:
      example |= {'key': name, 'columns': {'class': label}}
    return example

  def close(self) -> None:
    if isinstance(self._read, _Tars):
      self._read.close()


def _read_file(folder: str, index: int, name: str) -> bytes:
  """Returns the bytes of a picture in a folder of folders."""
  del index
  with storage.open_file(storage.join(folder, name)) as file:
    # One byte more lets the decoder detect files that are too large.
    return file.read(image_decoding.MAX_BYTES + 1)


class _Tars:
  """Reads pictures by their places in tars.

  Args:
    files: paths of the tars.
    where: for each picture the number of its tar, and the offset and size of its bytes.
  """

  def __init__(self, files: Sequence[str], where: Int64[np.ndarray, 'pictures 3']):
    self._files, self._where = list(files), where
    # grain's threads read at the same time.
    self._lock = threading.Lock()
    self._open: dict[int, int] = {}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_open': {}, '_lock': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def __call__(self, index: int, name: str) -> bytes:
    del name
    number, offset, size = self._where[index].tolist()
    with self._lock:
      if number not in self._open:
        self._open[number] = os.open(self._files[number], os.O_RDONLY)
      file = self._open[number]
    # Without a shared position, unlike a file object.
    data = os.pread(file, min(size, image_decoding.MAX_BYTES + 1), offset)
    while len(data) < min(size, image_decoding.MAX_BYTES + 1):
      more = os.pread(file, size - len(data), offset + len(data))
      if not more:
        raise OSError('the tar is cut off')
      data += more
    return data

  def close(self) -> None:
    """Closes the files; reading opens them again."""
    with self._lock:
      for file in self._open.values():
        os.close(file)
      self._open = {}


class _Parse:
  """Parses a record of tensorflow-datasets with an encoded 'image' and a 'label'."""

  def __init__(self, texts: Sequence[bytes], describe: bool):
    self._texts, self._describe = texts, describe

  def __call__(self, record: bytes) -> base.Example | Damaged:
    features = tfrecords.features_of(record)
    if features is None:
      return Damaged('record that is not a tf.train.Example')
    pictures = features['image'].bytes_list.value if 'image' in features else []
    labels = features['label'].int64_list.value if 'label' in features else []
    if len(pictures) != 1 or len(labels) != 1:
      return Damaged('record without one image and one label')
    label = int(labels[0])
    if not 0 <= label < len(self._texts):
      return Damaged('label that is not the number of a known class')
    example: dict[str, Any] = {'picture': pictures[0], 'caption': self._texts[label]}
    if self._describe:
      names = features['file_name'].bytes_list.value if 'file_name' in features else []
      example |= {
        'key': names[0].decode('utf-8', 'replace') if names else '',
        'columns': {'class': label},
      }
    return example


def _tfds_examples(path: str, parse: _Parse) -> Iterator[base.Example | Damaged]:
  """Yields the examples of a TFRecord file of tensorflow-datasets."""
  for found in tfrecords.raw(path):
    yield found if isinstance(found, Damaged) else parse(found['record'])


@gin.configurable('classes')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] = {'train': 'train', 'validation': 'val'},
  names: str | None = None,
  label: str = 'name',
  template: str = '{}',
) -> ClassesSource:
  """Returns a source of pictures of classes.

  Args:
    path: the folder of the data: of the splits' folders or tars, or of a version of a data set that
      tensorflow-datasets has prepared.
    splits: for each split a folder with a folder of pictures for each class; or a folder or pattern of
      tars in a form of `readers.tar_index`; or a pattern of TFRecord or ArrayRecord files.
    names: file of the classes' names in a form of `class_names`; without it, the names of the first
      split's folders are the classes, in alphabetical order.
    label: the caption: 'name', or 'id' for the number of the class in digits, from 0.
    template: text around the name, with {} in its place.
  """
  return ClassesSource(paths.required('classes', path), splits, names, label, template)
