"""Truncated, corrupted and lying files: readable parts are read, and the rest is counted."""

import gzip
import io
import json
import os
import struct
import tarfile

import gin
import numpy as np
import pytest
import tfrecord_files

from parti_jax.cli import vocabulary
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data import sources
from parti_jax.data.batches import Batches
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import folder_index
from parti_jax.data.readers import tar_shards
from parti_jax.data.readers import text_lines
from parti_jax.data.readers import tfrecords
from parti_jax.data.sources import paths

IMAGES = {'images': 8}
REST_OF_TAR = 'rest of a damaged tar shard'


def _numbers(batches):
  return [int(i) for batch in batches for i in batch['images'][:, 0, 0, 0]]


def _read(read, path):
  return [example.reason if isinstance(example, Damaged) else example for example in read(path)]


@pytest.fixture
def tfrecord(tmp_path):

  def write(name, records):
    path = tmp_path / name
    path.write_bytes(tfrecord_files.framed(records))
    gin.parse_config(f"tfrecord.path = '{tmp_path}'")
    return path

  return write


def test_damaged_tfrecords(tfrecord, encode, caplog):
  """A corrupted record, a corrupted length and a truncated file, together with an intact one."""
  numbers = iter(range(20))
  record = lambda: tfrecord_files.example(image=[encode((next(numbers), 0, 0))], caption=[b'a dog'])
  for name in 'abcd':
    path = tfrecord(f'train-{name}.tfrecord', [record() for _ in range(5)])
    data = bytearray(path.read_bytes())
    size = len(data) // 5
    if name == 'b':
      data[2 * size + 40] ^= 1  # A record.
    elif name == 'c':
      data[2 * size] ^= 1  # A length.
    path.write_bytes(bytes(data[:-1] if name == 'd' else data))
  batches = Batches('tfrecord_images', 'train', 4, IMAGES, num_epochs=1)
  assert sorted(_numbers(batches)) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 15, 16, 17, 18]
  assert batches.skipped == {
    'rest of a damaged TFRecord file': 2,
    'record with a wrong checksum': 1,
  }
  warned = {name for name in 'abcd' if f'train-{name}.tfrecord: ' in caplog.text}
  assert warned == set('bcd')
  # With fewer shares than files, and with more, nothing is read or counted twice.
  for shares in (2, 5):
    parts = [
      Batches('tfrecord_images', 'train', 4, IMAGES, num_epochs=1, share=share, shares=shares)
      for share in range(shares)
    ]
    assert len(sum((_numbers(part) for part in parts), [])) == 15
    assert sum(sum(part.skipped.values()) for part in parts) == 3


def test_records_that_are_not_examples(tfrecord, encode):
  picture = encode((9, 9, 9))
  tfrecord(
    'train.tfrecord',
    [
      tfrecord_files.example(image=[picture], caption=[b'a dog']),
      b'\xff' * 20,
      tfrecord_files.example(image=[1, 2]),
      tfrecord_files.example(caption=[b'a dog']),
      tfrecord_files.example(image=[picture]),
      b'',
      tfrecord_files.example(image=[picture], caption=[b'a', b'b']),
    ],
  )
  batches = Batches('tfrecord_pairs', 'train', 8, {'inputs': 8, **IMAGES}, num_epochs=1)
  assert len(_numbers(batches)) == 1
  assert batches.skipped == {
    'record that is not a tf.train.Example': 1,
    'record with numbers in place of a picture': 1,
    'no picture': 1,
    'no caption': 2,
    'record with more than one caption': 1,
  }


def test_a_record_that_claims_to_be_huge(monkeypatch):
  monkeypatch.setattr(tfrecords, 'MAX_BYTES', 100)
  small, huge = b'small', bytes(3_000_000)
  assert list(tfrecords.records(io.BytesIO(tfrecord_files.framed([small, huge, small])))) == [
    small,
    Damaged('record of too many bytes'),
    small,
  ]
  lies = struct.pack('<Q', 2**62)
  lies += tfrecord_files.masked_checksum(lies)
  assert list(
    tfrecords.records(io.BytesIO(tfrecord_files.framed([small]) + lies + bytes(200)))
  ) == [
    small,
    Damaged('rest of a damaged TFRecord file'),
  ]


def test_text_files(tmp_path, caplog):
  lines = [f'a red circle {i}' for i in range(2000)]
  (tmp_path / 'a.txt').write_bytes(b'a dog\ncaf\xe9\n' + b'x' * 200_000 + b'\na cat')
  packed = gzip.compress('\n'.join(lines).encode())
  (tmp_path / 'b.txt.gz').write_bytes(packed[: len(packed) // 2])
  (tmp_path / 'c.txt.gz').write_bytes(b'not packed')
  gin.parse_config(f"text.path = '{tmp_path}'\ntext.splits = {{'train': '*.txt*'}}")
  assert [len(line['caption']) for line in text_lines.lines(str(tmp_path / 'a.txt'))] == [
    6,
    5,
    2**16 + 1,
    5,
  ]
  batches = Batches('text_texts', 'train', 100, {'inputs': 8}, num_epochs=1)
  count = sum(len(batch['encoder_input_tokens']) for batch in batches)
  assert 500 < count < 2000
  assert batches.skipped == {'rest of a damaged text file': 2, 'caption not UTF-8': 1}
  assert batches.shortened['caption cut to 65,536 bytes'] == 1
  # The vocabulary is trained on the same texts.
  source = sources.configured('text')
  assert len(list(vocabulary._with_text([source], 'train'))) == count
  assert 'c.txt.gz: ' in caplog.text


def test_a_missing_file(tmp_path):
  path = str(tmp_path / 'none.txt')
  elements = list(paths.Files([path], text_lines.lines).read(path))
  assert elements == [Damaged('file that is gone or cannot be read', file=path)]


@pytest.fixture
def tar(tmp_path):

  def write(files, name='0.tar', mode='w', tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(tmp_path / name, mode, format=tar_format) as shard:
      for file, content in files:
        member = file if isinstance(file, tarfile.TarInfo) else tarfile.TarInfo(file)
        if member.isreg() and not member.size:
          member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
    gin.parse_config(f"webdataset.path = '{tmp_path}'")
    return tmp_path / name

  return write


def _samples(path, caption_key=None):
  return _read(lambda file: tar_shards.samples(file, caption_key), str(path))


def _files(count):
  return [
    (f'{i}.{ending}', content)
    for i in range(count)
    for ending, content in (('jpg', b'%d' % i), ('txt', b'a dog'))
  ]


def _pairs(*numbers):
  return [{'picture': b'%d' % i, 'caption': b'a dog'} for i in numbers]


@pytest.mark.parametrize('mode', ['w', 'w:gz'])
@pytest.mark.parametrize('tar_format', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_shards(tar, mode, tar_format):
  long = 'beach/' * 30
  path = tar([(f'{long}{name}', content) for name, content in _files(3)], '0.tar', mode, tar_format)
  assert _samples(path) == _pairs(0, 1, 2)


@pytest.mark.parametrize(
  'kept', [5 * 2048, 5 * 2048 + 100, 5 * 2048 + 700, 5 * 2048 + 1024, 5 * 2048 + 1100]
)
def test_a_truncated_shard(tar, kept):
  path = tar(_files(8))
  path.write_bytes(path.read_bytes()[:kept])
  # Without an end marker, the last sample may be incomplete.
  assert _samples(path) == [*_pairs(*range(4 if kept <= 5 * 2048 + 100 else 5)), REST_OF_TAR]


def test_batches_of_a_truncated_shard(tar, encode, caplog):
  path = tar([(f'{i}.png', encode((i, i, i))) for i in range(8)])
  path.write_bytes(path.read_bytes()[: 5 * 1024 + 700])
  batches = Batches('webdataset_images', 'train', 2, IMAGES, num_epochs=1)
  assert sorted(_numbers(batches)) == [0, 1, 2, 3, 4]
  assert batches.skipped == {REST_OF_TAR: 1}
  assert f'0.tar: {REST_OF_TAR}' in caplog.text


@pytest.mark.parametrize('place', [0, 4, 7])
def test_reading_continues_after_a_damaged_header(tar, place):
  """`tarfile` stops there as if the shard had ended."""
  path = tar(_files(4))
  data = bytearray(path.read_bytes())
  data[1024 * place + 3] ^= 1
  path.write_bytes(data)
  found = _samples(path)
  half = (
    {'picture': b'', 'caption': b'a dog'} if place % 2 == 0 else {'picture': b'3', 'caption': b''}
  )
  assert [e for e in found if isinstance(e, str)] == ['part of a damaged tar shard']
  assert [e for e in found if not isinstance(e, str)] == [
    half if i == place // 2 else pair for i, pair in enumerate(_pairs(0, 1, 2, 3))
  ]


def test_a_size_that_lies(tar, monkeypatch):
  monkeypatch.setattr(image_decoding, 'MAX_BYTES', 2000)

  def lying(size):
    member = tarfile.TarInfo('1.jpg')
    member.size = size
    return member

  path = tar(_files(3))
  whole = path.read_bytes()
  header = lambda size: lying(size).tobuf()
  # Up to the middle of the next file; far larger than the shard; negative.
  path.write_bytes(whole[:2048] + header(600) + whole[2048 + 512 :])
  swallowed = {'picture': whole[2560:3160], 'caption': b''}
  assert _samples(path) == [*_pairs(0), 'part of a damaged tar shard', swallowed, *_pairs(2)]
  path.write_bytes(whole[:2048] + header(2**33) + whole[2048 + 512 :])
  assert _samples(path) == ['file of too many bytes in a tar shard', REST_OF_TAR]
  negative = bytearray(header(0))
  negative[124:136] = b'\xff' * 12
  negative[148:156] = b'%06o\0 ' % tarfile.calc_chksums(bytes(negative))[0]
  path.write_bytes(whole[:2048] + negative + whole[2048 + 512 :])
  assert 'part of a damaged tar shard' in _samples(path)


def test_members_that_are_not_files(tar):
  members = []
  for kind, name in (
    (tarfile.SYMTYPE, '0.txt'),
    (tarfile.LNKTYPE, '1.txt'),
    (tarfile.CHRTYPE, '2.txt'),
    (tarfile.FIFOTYPE, '3.txt'),
    (tarfile.DIRTYPE, '4.txt'),
  ):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, '/etc/passwd'
    members.append((member, b''))
  found = _samples(tar(members + _files(1)))
  assert found == ['link, device or sparse file in a tar shard'] * 4 + _pairs(0)


def test_names_outside_of_the_archive_are_harmless(tar, tmp_path):
  path = tar(
    [
      ('../../x.jpg', b'0'),
      ('../../x.txt', b'a dog'),
      ('/etc/x.jpg', b'1'),
      ('/etc/x.txt', b'a dog'),
    ]
  )
  assert _samples(path) == _pairs(0, 1)
  assert os.listdir(tmp_path) == ['0.tar']


def test_sparse_files_and_huge_headers(tar):
  sparse = tarfile.TarInfo('0.jpg')
  sparse.pax_headers = {'GNU.sparse.major': '1', 'GNU.sparse.realsize': str(2**60)}
  huge = tarfile.TarInfo('1.jpg')
  huge.pax_headers = {'comment': 'x' * 2**17}
  path = tar([(sparse, b'map'), (huge, b'9'), *_files(1)], tar_format=tarfile.PAX_FORMAT)
  assert _samples(path) == [
    'link, device or sparse file in a tar shard',
    'part of a damaged tar shard',
    *_pairs(0),
  ]


def test_concatenated_shards(tar):
  path = tar(_files(2))
  path.write_bytes(path.read_bytes() * 2)
  assert _samples(path) == _pairs(0, 1, 0, 1)


@pytest.mark.parametrize(
  'content, caption',
  [
    (b'{"caption": "B\\u00e4r"}', 'Bär'.encode()),
    (b'{"caption": "\\ud83d"}', b'\xed\xa0\xbd'),
    (b'{"caption": 7}', captions.NOT_TEXT),
    (b'{"caption": null}', b''),
    (b'[1]', b''),
    (b'\xff', b''),
    (b'[' * 100_000, b''),
    (b'{"other": "a"}', b''),
  ],
)
def test_captions_in_json(tar, content, caption):
  assert _samples(tar([('0.jpg', b'0'), ('0.json', content)])) == [
    {'picture': b'0', 'caption': caption}
  ]


def test_huge_json(tar):
  assert _samples(tar([('0.jpg', b'0'), ('0.json', b' ' * 2**21), *_files(2)[2:]])) == [
    'json file of too many bytes in a tar shard',
    *_pairs(1),
  ]


def test_damaged_gzip(tar):
  noise = [(f'{i}.jpg', np.random.default_rng(i).bytes(5000)) for i in range(9)]
  path = tar(noise, mode='w:gz')
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  found = _samples(path)
  assert found[-1] == REST_OF_TAR and 3 <= len(found) <= 5
  path.write_bytes(b'\x1f\x8b' + bytes(100))
  assert _samples(path) == [REST_OF_TAR]
  path.write_bytes(b'')
  assert _samples(path) == [REST_OF_TAR]


def test_pictures_that_vanish(folder, encode, caplog):
  path = folder([(f'a dog {i}', encode((i, 0, 0))) for i in range(4)])
  batches = Batches('folder_images', 'train', 2, IMAGES, seed=1, num_epochs=2)
  (path / '002.img').unlink()
  (path / '003.img').unlink()
  (path / '003.img').mkdir()
  batches.seek(1, 0)
  assert sorted(_numbers(batches)) == [0, 1]
  assert batches.skipped == {'picture file that is gone or cannot be read': 2}
  assert '002.img: ' in caplog.text


@pytest.mark.parametrize(
  'file, message',
  [
    ('/etc/passwd', '/etc/passwd'),
    # Where it leads, and the way out.
    ('../out.png', '/folder/../out.png .*/out.png.*folder.path'),
    ('sub/../../out.png', '/out.png.*folder.path'),
    ('link.png', '/folder/link.png .*/out.png.*folder.path'),
    ('linked/out.png', '/folder/linked/out.png .*/out.png.*folder.path'),
    ('s3://bucket/x.png', 's3://bucket/x.png'),
    ('sub', '/folder/sub '),
    ('', '/folder'),
    ('a\0b', r"'a\\x00b'"),
    ('\ud83d', r"'\\ud83d'"),
    ('x' * 5000, 'x' * 5000),
  ],
)
def test_paths_that_lead_out_of_the_folder(tmp_path, encode, file, message):
  path = tmp_path / 'folder'
  (path / 'sub').mkdir(parents=True)
  (tmp_path / 'out.png').write_bytes(encode((1, 2, 3)))
  (path / 'link.png').symlink_to(tmp_path / 'out.png')
  (path / 'linked').symlink_to(tmp_path)
  (path / 'captions.jsonl').write_text(json.dumps({'file': file, 'caption': 'a dog'}))
  gin.parse_config(f"folder.path = '{path}'")
  with pytest.raises(UserError, match=f'captions.jsonl, line 1: .*{message}'):
    Batches('folder_images', 'train', 1, IMAGES)


def test_paths_within_the_folder(tmp_path, encode):
  """Also with .. and links, if a captions file lies in a subfolder."""
  real = tmp_path / 'real'
  (real / 'lists').mkdir(parents=True)
  (real / 'a.png').write_bytes(encode((7, 2, 3)))
  (real / 'lists' / 'b.png').symlink_to(real / 'a.png')
  lines = [json.dumps({'file': file, 'caption': 'a dog'}) for file in ('../a.png', 'b.png')]
  (real / 'lists' / 'train.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'folder').symlink_to(real)
  files, _ = folder_index.read(str(tmp_path / 'folder'), 'lists/train.jsonl', 'file', 'caption')
  assert [open(file, 'rb').read() for file in files] == [encode((7, 2, 3))] * 2


def test_lines_of_captions_files_that_are_not_json(tmp_path):
  for content, message in (
    (b'\xff{', 'captions.jsonl .*UTF-8'),
    (b'\xff\xfe{', 'captions.jsonl .*UTF-8'),
    (b'[' * 100_000, 'captions.jsonl, line 1: .*JSON'),
    (b'{"file": ' + b'1' * 10_000 + b'}', 'captions.jsonl, line 1: .*JSON'),
  ):
    (tmp_path / 'captions.jsonl').write_bytes(content)
    with pytest.raises(UserError, match=message):
      folder_index.read(str(tmp_path), 'captions.jsonl', 'file', 'caption')


def test_one_long_caption_does_not_multiply(tmp_path):
  lines = [
    json.dumps({'file': f'{i}', 'caption': 'x' * (1_000_000 if i == 5 else 1)})
    for i in range(10_000)
  ]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
  _, texts = folder_index.read(str(tmp_path), 'captions.jsonl', 'file', 'caption', pictures=False)
  assert texts.nbytes < 1_000_000 and len(texts[5]) == 1_000_000


@pytest.mark.parametrize('taken', [1, 3])
def test_resuming_in_damaged_data(tfrecord, encode, taken):
  """The same batches and counts as without an interruption, in the first epoch and the second."""
  for name in 'ab':
    pictures = [encode((i, 0, 0)) if i % 3 else b'bad' for i in range(9)]
    path = tfrecord(
      f'train-{name}.tfrecord',
      [tfrecord_files.example(image=[picture], caption=[b'a dog']) for picture in pictures],
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data[:-1]))
  arguments = 'tfrecord_images', 'train', 3, IMAGES
  uninterrupted = Batches(*arguments, seed=5, num_epochs=2)
  for _ in range(taken):
    next(uninterrupted)
  resumed = Batches(*arguments, seed=5, num_epochs=2)
  next(resumed)
  resumed.restore(json.loads(json.dumps(uninterrupted.state())))
  rest = _numbers(uninterrupted)
  assert rest and rest == _numbers(resumed)
  assert resumed.state() == uninterrupted.state()
  assert (
    resumed.skipped
    == uninterrupted.skipped
    == {
      'unknown picture format': 12,
      'record with a wrong checksum': 4,
      'rest of a damaged TFRecord file': 4,
    }
  )
