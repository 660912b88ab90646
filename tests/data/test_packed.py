"""Packed files: intact content is read, in bounded memory."""

import bz2
import gzip
import io
import lzma
import sys
import tracemalloc
import zlib

import gin
import numpy as np
import pyarrow
import pytest
import tfrecord_files

from parti_jax.core.errors import UserError
from parti_jax.data import sources
from parti_jax.data.batches import Batches
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import packed
from parti_jax.data.readers import tar_shards
from parti_jax.data.readers import text_lines
from parti_jax.data.readers import tfrecords


def _zstd(data):
  return pyarrow.Codec('zstd').compress(data).to_pybytes()


PACK = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': _zstd}
KINDS = pytest.mark.parametrize('kind', PACK)


@KINDS
@pytest.mark.parametrize('content', [b'', b'x', np.random.default_rng(0).bytes(200_000) * 3])
def test_streams(kind, content):
  data = PACK[kind](content)
  assert packed.unpacked(io.BytesIO(data)).read() == content
  # Concatenated, as parallel compressors write them, and padded with zeros.
  assert packed.unpacked(io.BytesIO(data * 3)).read() == content * 3
  if kind != 'zst':
    assert packed.unpacked(io.BytesIO(data * 2 + bytes(100_000))).read() == content * 2
  stream, pieces = packed.unpacked(io.BytesIO(data)), []
  while piece := stream.read(777):
    pieces.append(piece)
  assert b''.join(pieces) == content
  with pytest.raises(OSError):
    packed.unpacked(io.BytesIO(data[:-1])).read()


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'a',
    b'\x1f\x8b',
    b'\x1f\x8b\x00',
    b'BZh9',
    b'BZh91.jpg' + bytes(600),
    b'\xfd7zX',
    bytes(512),
  ],
)
def test_unpacked_files_stay_unchanged(content):
  assert packed.unpacked(io.BytesIO(content)).read() == content
  if content:
    with pytest.raises(packed.DamagedPacking, match='a.TXZ'):
      packed.unpacked(io.BytesIO(content), 'a.TXZ')


@KINDS
def test_damaged_streams(kind):
  content = np.random.default_rng(0).bytes(300_000)
  data = PACK[kind](content)
  for damaged in (data[: len(data) // 2], data[:17]):
    stream, read = packed.unpacked(io.BytesIO(damaged)), b''
    with pytest.raises(OSError):
      while piece := stream.read(1000):
        read += piece
    assert content.startswith(read)
  if kind != 'zst':  # Its checksum is optional.
    with pytest.raises(OSError):
      packed.unpacked(io.BytesIO(data[:500] + bytes(100) + data[600:])).read()


@pytest.mark.parametrize('kind', ['gz', 'bz2', 'xz', 'zst'])
def test_bombs_take_no_memory(kind):
  data = PACK[kind](bytes(2**25))
  assert len(data) < 100_000
  tracemalloc.start()
  stream = packed.unpacked(io.BytesIO(data))
  total = 0
  while piece := stream.read(2**16):
    total += len(piece)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert total == 2**25 and peak < 2**24


def test_a_file_of_xz_that_asks_for_much_memory():
  data = bytearray(lzma.compress(b'a dog'))
  # The block's header: its size, flags, the filter LZMA2, its dictionary's size, and a checksum.
  assert data[12:16] == b'\x02\x00\x21\x01'
  for code, fits in ((28, True), (34, False)):  # 64 and 512 MiB.
    data[16] = code
    data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, 'little')
    stream = packed.unpacked(io.BytesIO(data))
    if fits:
      assert stream.read() == b'a dog'
    else:
      with pytest.raises(OSError):
        stream.read()


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.delitem(sys.modules, 'pyarrow')
  monkeypatch.setattr(sys, 'path', [])
  with pytest.raises(UserError, match=r'pyarrow.*parti_jax\[data\]'):
    packed.unpacked(io.BytesIO(_zstd(b'a dog')))


def _samples(path):
  return [
    example.reason if isinstance(example, Damaged) else example
    for example in tar_shards.samples(str(path), None)
  ]


@KINDS
def test_tars(tmp_path, write_tar, kind):
  files = [
    (f'{i}.{ending}', content)
    for i in range(3)
    for ending, content in (('jpg', b'%d' % i), ('txt', b'a dog'))
  ]
  plain = write_tar(tmp_path / '0.tar', files).read_bytes()
  expected = [{'picture': b'%d' % i, 'caption': b'a dog'} for i in range(3)]
  # Under any name.
  for name in (f'0.tar.{kind}', '1.tar'):
    (tmp_path / name).write_bytes(PACK[kind](plain))
    assert _samples(tmp_path / name) == expected
  noise = [(f'{i}.jpg', np.random.default_rng(i).bytes(150_000)) for i in range(9)]
  data = PACK[kind](write_tar(tmp_path / '0.tar', noise).read_bytes())
  (tmp_path / '2.tar').write_bytes(data[: len(data) // 2])
  found = _samples(tmp_path / '2.tar')
  assert found[-1] == 'rest of a damaged tar shard' and (2 <= len(found) <= 5 or kind == 'bz2')
  assert [one['picture'] for one in found[:-1]] == [c for _, c in noise[: len(found) - 1]]


def test_a_tar_whose_first_name_looks_packed(tmp_path, write_tar):
  path = write_tar(tmp_path / '0.tar', [('BZh9.jpg', b'1'), ('BZh9.txt', b'a dog')])
  assert _samples(path) == [{'picture': b'1', 'caption': b'a dog'}]


@KINDS
def test_text_files(tmp_path, kind):
  lines = [f'a red circle {i}' for i in range(2000)]
  data = PACK[kind]('\n'.join(lines).encode())
  (tmp_path / f'a.txt.{kind}').write_bytes(data)
  (tmp_path / f'b.txt.{kind}').write_bytes(b'not packed')
  gin.parse_config(f"text.path = '{tmp_path}'\ntext.splits = {{'train': 'a.txt*'}}")
  assert list(sources.configured('text').captions('train')) == lines
  assert list(text_lines.lines(str(tmp_path / f'b.txt.{kind}'))) == [
    Damaged('rest of a damaged text file')
  ]
  (tmp_path / 'c.txt').write_bytes(data[: len(data) // 2])
  *read, last = text_lines.lines(str(tmp_path / 'c.txt'))
  assert last == Damaged('rest of a damaged text file') and len(read) < 2000


@pytest.mark.parametrize('kind', ['zlib', *PACK])
def test_tfrecords(tmp_path, encode, kind):
  records = [tfrecord_files.example(image=encode((i, 0, 0)), caption=b'a dog') for i in range(20)]
  framed = tfrecord_files.framed(records)
  pack = zlib.compress if kind == 'zlib' else PACK[kind]
  data = pack(framed)
  (tmp_path / 'train-0.tfrecord.gz').write_bytes(data)
  gin.parse_config(f"tfrecord.path = '{tmp_path}'")
  batches = Batches('tfrecord_images', 'train', 20, {'images': 8}, shuffle=False, num_epochs=1)
  assert next(batches)['images'][:, 0, 0, 0].tolist() == list(range(20)) and not batches.skipped
  (tmp_path / 'cut').write_bytes(data[: -len(data) // 3])
  *read, last = tfrecords.raw(str(tmp_path / 'cut'))
  assert last == Damaged('rest of a damaged TFRecord file')
  assert [one['record'] for one in read] == records[: len(read)]
  damaged = bytearray(framed)
  damaged[40] ^= 1
  (tmp_path / 'damaged').write_bytes(pack(bytes(damaged)))
  first, *rest = tfrecords.raw(str(tmp_path / 'damaged'))
  assert first == Damaged('record with a wrong checksum')
  assert [one['record'] for one in rest] == records[1:]


def test_a_record_whose_length_looks_packed(tmp_path):
  """The first record's length and checksum show that the file isn't packed."""
  for length in (0x88B1F, 0x9C78, 0x178):
    record = bytes(length)
    (tmp_path / 'a').write_bytes(tfrecord_files.framed([record]))
    assert (tmp_path / 'a').read_bytes()[:2] in (b'\x1f\x8b', b'\x78\x9c', b'\x78\x01')
    assert [one['record'] for one in tfrecords.raw(str(tmp_path / 'a'))] == [record]


def test_the_bound_of_a_record_holds_in_packed_files(monkeypatch):
  monkeypatch.setattr(tfrecords, 'MAX_BYTES', 100)
  data = tfrecord_files.framed([b'small', bytes(3_000_000), b'small'])
  stream = tfrecords.unpacked(io.BytesIO(gzip.compress(data)))
  assert list(tfrecords.records(stream)) == [
    b'small',
    Damaged('record of too many bytes'),
    b'small',
  ]
