"""Reads torch's files of weights without torch, and without running any of their code.

`torch.save` writes a zip of a pickle and of the raw storages of its tensors. Before torch 1.6 it wrote
several pickles one after another, and then the storages; many older weights are still published so,
such as those of the FID's Inception and of LPIPS. A pickle is a program for a small stack machine
that can call any function of Python. `_Machine` interprets the few instructions that a tree of
tensors needs, and knows the few names that tensors are made with. Anything else is refused by name.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import lzma
import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from parti_jax.core.errors import UserError

# The pickle lists the tensors: 10,000 of them take about 2 MB.
MAX_PICKLE = 2**26
_MAX_DEPTH = 100
# Maximum number of values and containers; a container may be referred to many times.
_MAX_ITEMS = 1_000_000
# Maximum characters of a tensor's name, whose parts may be referred to many times, too.
_LONGEST_NAME = 10_000
# Maximum number of axes of an array of numpy.
_MAX_AXES = 32
# What zipfile raises for a damaged zip, or one that is encrypted or packed in another way.
ZIP_ERRORS = (
  OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError
)  # fmt: skip

_DTYPES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
_MARK = object()
# How files from before torch 1.6 begin: the pickle of a number. Two more pickles follow it, of the
# version 1001 and of facts about the machine, then that of the tree, then that of the storages' keys.
_OLD_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_OLD_VERSION = 1001


class _Zip:
  """The storages of a zip, each a member."""

  def __init__(self, file: pathlib.Path, folder: str, members: Mapping[str, zipfile.ZipInfo]):
    self._file, self._folder, self._members = file, folder, members

  def storage(self, key: str, dtype: np.dtype, size: int) -> _Storage:
    """Returns the storage of this key; raises UserError if it isn't there or has another size."""
    name = f'{self._folder}data/{key}'
    member = self._members.get(name)
    if member is None:
      raise UserError(f'{self._file} is damaged: the tensor data {name} is missing')
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != size * dtype.itemsize:
      raise UserError(
        f'{self._file} is damaged: {name} has {member.file_size} bytes instead of '
        f'{size * dtype.itemsize}'
      )
    return _Storage(self, name, dtype, size)

  def read(self, name: str, start: int, count: int) -> bytes:
    """Reads bytes of a storage."""
    with zipfile.ZipFile(self._file) as archive, archive.open(name) as member:
      member.seek(start)
      return member.read(count)


class _Consecutive:
  """The storages of a file from before torch 1.6: each is its size, in values, and its values."""

  def __init__(self, file: pathlib.Path):
    self._file = file
    self._storages: dict[str, _Storage] = {}
    self._places: dict[str, int] = {}

  def storage(self, key: str, dtype: np.dtype, size: int) -> _Storage:
    """Returns the storage of this key, which `find` will look for."""
    found = self._storages.setdefault(key, _Storage(self, key, dtype, size))
    if (found.dtype, found.size) != (dtype, size):
      raise UserError(f'{self._file} is damaged: it describes the tensor data {key} in two ways')
    return found

  def find(self, keys: Any, place: int) -> None:
    """Finds the storages, which follow each other in the order of `keys` from a place in the file."""
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or len(set(keys)) < len(keys):
      raise UserError(f'{self._file} is damaged: it has no list of its tensor data')
    with open(self._file, 'rb') as content:
      end = content.seek(0, os.SEEK_END)
      for key in keys:
        storage = self._storages.get(key)
        if storage is None:
          raise UserError(f'{self._file} is damaged: no tensor uses the tensor data {key}')
        content.seek(place)
        size = content.read(8)
        if size != struct.pack('<q', storage.size):
          raise UserError(f'{self._file} is damaged: the tensor data {key} has another size')
        self._places[key] = place + 8
        place += 8 + storage.size * storage.dtype.itemsize
    missing = self._storages.keys() - self._places.keys()
    if missing:
      raise UserError(f'{self._file} is damaged: the tensor data {min(missing)} is missing')
    if place > end:
      raise UserError(f'{self._file} is damaged: it ends {place - end} bytes too early')

  def read(self, name: str, start: int, count: int) -> bytes:
    """Reads bytes of a storage."""
    with open(self._file, 'rb') as content:
      content.seek(self._places[name] + start)
      return content.read(count)


@dataclasses.dataclass(frozen=True)
class _Storage:
  """Consecutive values in a file."""

  data: _Zip | _Consecutive
  name: str
  dtype: np.dtype
  size: int


@dataclasses.dataclass(frozen=True)
class TorchArray:
  """A tensor in a torch file.

  Attributes:
    file: the file.
    storage: the part of the file that holds the values.
    offset: position of the first value, in values.
    shape: shape of the tensor.
    strides: strides of the tensor, in values.
  """

  file: pathlib.Path
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def dtype(self) -> np.dtype:
    return self.storage.dtype

  def read(self) -> np.ndarray:
    """Reads the values from the file.

    Raises:
      UserError: if the file is damaged there.
    """
    size = self.storage.dtype.itemsize
    spanned = _spanned(self.shape, self.strides)
    try:
      content = self.storage.data.read(self.storage.name, self.offset * size, spanned * size)
    except ZIP_ERRORS as error:
      raise UserError(f'{self.file} is damaged at {self.storage.name}: {error}') from error
    if len(content) != spanned * size:
      raise UserError(f'{self.file} is damaged at {self.storage.name}: it ends too early')
    values = np.frombuffer(content, self.storage.dtype)
    return np.lib.stride_tricks.as_strided(
      values, self.shape, [stride * size for stride in self.strides], writeable=False
    )


def _spanned(shape, strides) -> int:
  """Returns the number of values from the first to the last of a tensor."""
  if 0 in shape:
    return 0
  return 1 + sum((axis - 1) * stride for axis, stride in zip(shape, strides))


def open_torch_file(path) -> dict[str, TorchArray]:
  """Lists the tensors in a file of `torch.save`, without reading their values.

  Args:
    path: the file.

  Returns:
    {name: tensor}; the keys of nested dicts and the places in lists are joined by dots. Other
    values, such as a step's number, are left out.

  Raises:
    UserError: if the file is damaged, of another format, or holds anything but tensors, numbers,
      texts and containers of these.
  """
  path = pathlib.Path(path)
  found = _old_tree(path) if _is_old(path) else _tree(path)
  tensors: dict[str, TorchArray] = {}
  for number, (name, value) in enumerate(_items(found, '', path)):
    if number > _MAX_ITEMS:
      raise UserError(f'{path} lists more than {_MAX_ITEMS} values')
    if isinstance(value, TorchArray):
      if name in tensors:
        raise UserError(f'{path}: two tensors are named {name}')
      tensors[name] = value
  if not tensors:
    raise UserError(f'{path} holds no tensors')
  return tensors


def _tree(path: pathlib.Path):
  """Returns the object in a zip, whose tensors are `TorchArray`."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = members_of(archive)
      pickles = [name for name in members if name.endswith('/data.pkl') or name == 'data.pkl']
      if len(pickles) != 1:
        raise UserError(f"{path} isn't a file of torch.save: it has no data.pkl")
      if members[pickles[0]].file_size > MAX_PICKLE:
        raise UserError(f'{path}: its list of tensors is larger than {MAX_PICKLE} bytes')
      program = archive.read(pickles[0])
      folder = pickles[0].removesuffix('data.pkl')
      order = f'{folder}byteorder'
      # Its first bytes suffice; it may claim any size.
      if order in members and archive.open(order).read(7) != b'little':
        raise UserError(f'{path}: its numbers are not stored as little-endian ones')
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist') from error
  except ZIP_ERRORS as error:
    raise UserError(
      f"{path} isn't a file of torch.save, or is damaged or unfinished ({error}); download it again"
    ) from error
  return _Machine(path, _Zip(path, folder, members)).run(program)


def _is_old(path: pathlib.Path) -> bool:
  try:
    with open(path, 'rb') as file:
      return file.read(len(_OLD_START)) == _OLD_START
  except OSError:  # `_tree` says what is wrong.
    return False


def _old_tree(path: pathlib.Path):
  """Returns the object in a file from before torch 1.6, whose tensors are `TorchArray`."""
  with open(path, 'rb') as file:
    # Larger lists of tensors end too early.
    content = io.BytesIO(file.read(MAX_PICKLE))
  content.seek(len(_OLD_START))
  data = _Consecutive(path)
  version, machine, found, keys = (_Machine(path, data).run(content) for _ in range(4))
  if version != _OLD_VERSION or not isinstance(machine, dict):
    number = version if isinstance(version, int) else 'none'
    raise UserError(f'{path} is damaged, or of an unknown version of torch.save: {number}')
  if machine.get('little_endian') is not True:
    raise UserError(f'{path}: its numbers are not stored as little-endian ones')
  data.find(keys, content.tell())
  return found


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
  """Returns {name: member} of a zip.

  Raises:
    BadZipFile: if two members have the same name, of which readers choose different ones.
  """
  members = {info.filename: info for info in archive.infolist()}
  if len(members) < len(archive.infolist()):
    raise zipfile.BadZipFile('two of its members have the same name')
  return members


def _items(value, name: str, path, depth: int = 0) -> Iterator[tuple[str, Any]]:
  """Yields all values in nested containers, containers too, with their names."""
  if depth > _MAX_DEPTH:
    raise UserError(f'{path}: its containers are nested too deeply')
  if len(name) > _LONGEST_NAME:
    raise UserError(f'{path}: a name has more than {_LONGEST_NAME} characters')
  yield name, value
  if isinstance(value, list | tuple):
    value = dict(enumerate(value))
  if isinstance(value, Mapping):
    for key, item in value.items():
      yield from _items(item, f'{name}.{key}'.removeprefix('.'), path, depth + 1)


@dataclasses.dataclass(frozen=True)
class _Name:
  """A name that the pickle looks up; its object is never imported."""

  module: str
  name: str

  def __str__(self):
    return f'{self.module}.{self.name}'


class _Machine:
  """Interprets the instructions of a pickle that make trees of tensors."""

  def __init__(self, path: pathlib.Path, data: _Zip | _Consecutive):
    self._path = path
    self._data = data
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self, program: bytes | io.BytesIO):
    """Returns the object that the pickle makes; a stream is left at the pickle's end.

    Raises:
      UserError: at the first instruction or name that weights do not need.
    """
    try:
      for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == 'STOP':
          return self._pop()
        self._step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
      raise UserError(f'{self._path} is damaged: its list of tensors ends in {error!r}') from error
    raise UserError(f'{self._path} is damaged: its list of tensors does not end')

  def _refuse(self, what: str) -> UserError:
    return UserError(
      f'{self._path} holds more than weights: it {what}, which could run code. Where you trust it, '
      'load it with torch and save its state_dict alone'
    )

  def _step(self, name: str, argument):
    match name:
      case 'PROTO' | 'FRAME':
        pass
      case 'MARK':
        self._stack.append(_MARK)
      case 'NONE':
        self._stack.append(None)
      case 'NEWTRUE' | 'NEWFALSE':
        self._stack.append(name == 'NEWTRUE')
      case (
        'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE' | 'SHORT_BINUNICODE'
        | 'BINSTRING' | 'SHORT_BINSTRING'
      ):  # fmt: skip
        self._stack.append(argument)
      case 'EMPTY_DICT':
        self._stack.append({})
      case 'EMPTY_LIST':
        self._stack.append([])
      case 'EMPTY_TUPLE':
        self._stack.append(())
      case 'TUPLE':
        self._stack.append(tuple(self._marked()))
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        items = [self._pop() for _ in range(int(name[-1]))]
        self._stack.append(tuple(reversed(items)))
      case 'LIST':
        self._stack.append(self._marked())
      case 'DICT':
        items = self._marked()
        # The hash of a tuple of tuples may take forever.
        keys = [_key(key) for key in items[::2]]
        self._stack.append(dict(zip(keys, items[1::2], strict=True)))
      case 'APPEND':
        item = self._pop()
        self._container(list).append(item)
      case 'APPENDS':
        items = self._marked()
        self._container(list).extend(items)
      case 'SETITEM':
        value, key = self._pop(), self._pop()
        self._container(dict)[_key(key)] = value
      case 'SETITEMS':
        items = self._marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
          self._container(dict)[_key(key)] = value
      case 'BINPUT' | 'LONG_BINPUT':
        self._memo[argument] = self._stack[-1]
      case 'MEMOIZE':
        self._memo[len(self._memo)] = self._stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        self._stack.append(self._memo[argument])
      case 'GLOBAL':
        self._stack.append(self._known(*argument.split(' ', 1)))
      case 'STACK_GLOBAL':
        name, module = self._pop(), self._pop()
        self._stack.append(self._known(str(module), str(name)))
      case 'BINPERSID':
        self._stack.append(self._storage(self._pop()))
      case 'REDUCE':
        arguments, function = self._pop(), self._pop()
        self._stack.append(self._called(function, arguments))
      case 'BUILD':
        # A state_dict has the versions of its modules as an attribute.
        self._pop()
        self._container(dict)
      case _:
        raise self._refuse(f'has the instruction {name}')

  def _pop(self):
    item = self._stack.pop()
    if item is _MARK:
      raise ValueError('a mark')
    return item

  def _marked(self) -> list[Any]:
    """Pops the items above the last mark, and the mark."""
    place = len(self._stack) - 1
    while self._stack[place] is not _MARK:
      place -= 1
      if place < 0:
        raise IndexError('no mark')
    items = self._stack[place + 1 :]
    del self._stack[place:]
    return items

  def _container(self, kind: type):
    """Returns the dict or list on top of the stack."""
    if not isinstance(self._stack[-1], kind):
      raise TypeError(f'{type(self._stack[-1]).__name__} is not a {kind.__name__}')
    return self._stack[-1]

  def _known(self, module: str, name: str) -> _Name:
    known = {
      'collections': ('OrderedDict',),
      'torch._utils': ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'),
      'torch': tuple(_DTYPES),
    }
    if name not in known.get(module, ()):
      raise self._refuse(f'asks for {module}.{name}')
    return _Name(module, name)

  def _storage(self, identity) -> _Storage:
    """Returns a storage, from ('storage', its type, its key, its device, its size).

    Before torch 1.6 a part of another storage followed, which none of today's tensors needs.
    """
    tag, kind, key, _, size, *part = identity
    if tag != 'storage' or not isinstance(kind, _Name) or kind.module != 'torch':
      raise TypeError('not a storage')
    if (
      not isinstance(key, str) or not isinstance(size, int) or size < 0 or part not in ([], [None])
    ):
      raise TypeError('not a storage')
    return self._data.storage(key, np.dtype(_DTYPES[kind.name]), size)

  def _called(self, function, arguments):
    """Returns the result of a call of one of the known names."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
      raise self._refuse('calls something')
    if function.name == 'OrderedDict':
      # Python 2 wrote its items as one list of pairs.
      pairs = arguments[0] if arguments else []
      if len(arguments) > 1 or not isinstance(pairs, list):
        raise TypeError('an OrderedDict of something else than pairs')
      return collections.OrderedDict((_key(key), value) for key, value in pairs)
    if function.name == '_rebuild_parameter':
      if not isinstance(arguments[0], TorchArray):
        raise TypeError('a parameter that is not a tensor')
      return arguments[0]
    if function.name not in ('_rebuild_tensor', '_rebuild_tensor_v2'):
      raise self._refuse(f'calls {function}')
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > _MAX_AXES:
      raise TypeError('not a tensor')
    numbers = [offset, *shape, *strides]
    if not all(type(number) is int and number >= 0 for number in numbers):
      raise TypeError('not a tensor')
    if offset + _spanned(shape, strides) > storage.size or math.prod(shape) > storage.size:
      raise UserError(
        f'{self._path} is damaged: a tensor {list(shape)} lies beyond the end of its data'
      )
    return TorchArray(self._path, storage, offset, tuple(shape), tuple(strides))


def _key(key):
  if not isinstance(key, str | int):
    raise TypeError(f'{type(key).__name__} as a key')
  return key
