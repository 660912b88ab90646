"""What is fuzzed: each takes any bytes, and returns or raises what the docstring there names.

Anything else that is raised is a finding. `EXAMPLES` gives each target well-formed input to begin
with.
"""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import tempfile
import zlib

import google_crc32c
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from PIL import ImageCms

from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import damage
from parti_jax.data import datasets
from parti_jax.data import image_decoding
from parti_jax.data import token_cache_info
from parti_jax.data.readers import folder_index
from parti_jax.data.readers import tar_shards
from parti_jax.data.readers import text_files
from parti_jax.data.readers import text_lines
from parti_jax.data.readers import tfrecords
from parti_jax.data.sources import parquet as parquet_source


def picture(data: bytes) -> None:
  try:
    image = image_decoding.decode(data, 8)
  except image_decoding.UndecodablePicture as error:
    assert len(str(error)) < 60
  else:
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8


def _check(elements) -> None:
  for element in elements:
    if isinstance(element, damage.Damaged):
      assert len(element.reason) < 60
    else:
      assert all(isinstance(value, bytes) for value in element.values())


def tar(data: bytes) -> None:
  for caption_key in (None, 'caption'):
    _check(tar_shards.samples_in(io.BytesIO(data), caption_key))


def tfrecord(data: bytes) -> None:
  keys = {'picture': 'image', 'caption': 'caption'}
  _check(
    record if isinstance(record, damage.Damaged) else tfrecords.parsed(record, keys)
    for record in tfrecords.records(tfrecords.unpacked(io.BytesIO(data)))
  )
  # Damage is found by its checksum, so that the parser sees none of it but here.
  _check([tfrecords.parsed(data, keys)])


def parquet(data: bytes) -> None:
  with tempfile.TemporaryDirectory() as folder:
    with open(f'{folder}/a.parquet', 'wb') as file:
      file.write(data)
    for shuffle in parquet_source.SHUFFLES:
      source = parquet_source.ParquetSource(folder, None, None, None, shuffle)
      try:
        _check(source.examples('train'))
      except UserError as error:
        assert '\n' not in str(error)


def text_file(data: bytes) -> None:
  with tempfile.NamedTemporaryFile() as file:
    file.write(data)
    file.flush()
    _check(text_lines.lines(file.name))
    try:
      lines = text_files.lines(text_files.read(file.name, 'a file'))
    except UserError as error:
      assert '\n' not in str(error)
    else:
      assert '\n' not in ''.join(lines)


def caption(data: bytes) -> None:
  try:
    text, _ = captions.clean(data)
  except captions.UnusableCaption as error:
    assert len(str(error)) < 60
    return
  assert text and len(text) <= captions.MAX_BYTES
  datasets.get_vocabulary().encode(text, 8)


def text(data: bytes) -> None:
  """Any str, lone surrogates included, to the vocabulary."""
  try:
    ids, _ = datasets.get_vocabulary().encode(data.decode('utf-8', 'surrogateescape'), 8)
  except UserError:
    return
  assert ids.shape == (8,)


def folder(data: bytes) -> None:
  with tempfile.TemporaryDirectory() as place:
    with open(f'{place}/captions.jsonl', 'wb') as file:
      file.write(data)
    try:
      files, texts = folder_index.read(place, 'captions.jsonl', 'file', 'caption', pictures=False)
    except UserError as error:
      assert '\n' not in str(error)
    else:
      assert len(files) == len(texts) > 0
      assert all(file.startswith(place.encode()) for file in files)


def info(data: bytes) -> None:
  with tempfile.TemporaryDirectory() as place:
    with open(f'{place}/info.json', 'wb') as file:
      file.write(data)
    try:
      found = token_cache_info.read_info(place)
    except UserError as error:
      assert '\n' not in str(error)
    else:
      assert found['image_tokens'] > 0


TARGETS = {
  target.__name__: target
  for target in (picture, tar, tfrecord, parquet, text_file, caption, text, folder, info)
}


def _pictures():
  noise = np.random.default_rng(0).integers(0, 256, [5, 9, 3], np.uint8)
  image = Image.fromarray(noise)
  exif = Image.Exif()
  exif[0x0112] = 6
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  for picture_format, mode, arguments in (
    ('jpeg', 'RGB', {'exif': exif}),
    ('jpeg', 'RGB', {'progressive': True}),
    ('jpeg', 'CMYK', {}),
    ('jpeg', 'L', {}),
    ('jpeg', 'RGB', {'restart_marker_blocks': 1}),
    ('jpeg', 'RGB', {'icc_profile': profile}),
    ('png', 'L', {'icc_profile': profile}),
    ('png', 'RGB', {'transparency': (1, 2, 3)}),
    ('png', 'RGBA', {}),
    ('png', 'P', {'transparency': 0}),
    ('png', 'LA', {}),
    ('gif', 'P', {'transparency': 0}),
    ('webp', 'RGB', {}),
    ('webp', 'RGBA', {'lossless': True}),
  ):
    data = io.BytesIO()
    image.convert(mode).save(data, picture_format, **arguments)
    yield data.getvalue()
    if picture_format == 'jpeg':
      # Padded before its end and its last table.
      padded = data.getvalue()[:-2] + bytes(9) + b'\xff\xd9'
      yield padded.replace(b'\xff\xc4', bytes(3) + b'\xff\xc4')
  for picture_format in ('gif', 'webp', 'png'):
    data = io.BytesIO()
    image.save(data, picture_format, save_all=True, append_images=[image.rotate(90)])
    yield data.getvalue()


def _tars():
  for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w', format=form) as shard:
      for name, content in (
        ('a.jpg', b'1'),
        ('a.txt', b'a dog'),
        ('b' * 120 + '.png', b'2'),
        ('c.json', b'{"caption": "a cat"}'),
      ):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
    yield data.getvalue()[:6144]
  yield gzip.compress(data.getvalue(), mtime=0)
  for pack in (bz2.compress, lzma.compress, pyarrow.Codec('zstd').compress):
    yield bytes(pack(data.getvalue()))


def _tfrecords():
  example = b'\n \n\x10\n\x05image\x12\x07\n\x05\n\x03abc\n\x0c\n\x07caption\x12\x01\n'
  data = io.BytesIO()
  for record in (example, b'', example):
    for part in (struct.pack('<Q', len(record)), record):
      crc = google_crc32c.value(part)
      data.write(part + struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF))
  return [
    data.getvalue(),
    example,
    gzip.compress(data.getvalue(), mtime=0),
    zlib.compress(data.getvalue()),
  ]


def _parquets():
  pictures = [b'abc', None, b'd' * 50, b'e']
  structs = [{'bytes': picture, 'path': 'a'} for picture in pictures]
  captions_ = ['a dog', 'a cat', None, 'ein B\xe4r']
  for columns, arguments in (
    ({'image': structs, 'text': captions_}, {}),
    ({'jpg': pictures, 'caption': [[text] for text in captions_]}, {'compression': 'zstd'}),
    (
      {'jpg': pictures, 'caption': captions_, 'status': ['success', 'failed_to_download'] * 2},
      {'compression': 'none', 'use_dictionary': False, 'write_page_checksum': True},
    ),
  ):
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data, row_group_size=2, **arguments)
    yield data.getvalue()


_TEXTS = [
  'a dog\0 on\x92 the beach'.encode(),
  'ein Bär \u202e\u200d\U0001f692'.encode(),
  b'caf\xe9 \xed\xa0\x80',
]
_INFO = {
  'codebook_size': 32,
  'image_tokens': 4,
  'tokenizer': 'abc',
  'splits': {'train': {'examples': 3, 'shards': 1, 'bytes': [100]}},
}
EXAMPLES = {
  'picture': list(_pictures()),
  'tar': list(_tars()),
  'tfrecord': _tfrecords(),
  'parquet': list(_parquets()),
  'caption': _TEXTS,
  'text': _TEXTS,
  'text_file': [
    *_TEXTS,
    b'\xef\xbb\xbfa\r\nb\n',
    'a\nb\u2028c'.encode('utf-16'),
    lzma.compress(b'a dog\na cat'),
  ],
  'folder': [b'{"file": "a", "caption": "a dog"}\n\n{"file": "b/../c", "caption": "\\ud83d"}'],
  'info': [json.dumps(_INFO).encode()],
}
