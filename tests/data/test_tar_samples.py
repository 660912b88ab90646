"""How files of a tar form samples: names, endings, repeated keys, caption columns."""

import io
import json

import gin
import numpy as np
import pytest
from PIL import Image

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import datasets
from parti_jax.data.batches import Batches
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import tar_shards

NEITHER = 'file that is neither picture nor caption in a tar shard'
AMBIGUOUS = 'caption of one of several samples of the same key'


@pytest.fixture(name='read')
def _read(tmp_path, write_tar):
  """Reads samples of files: pairs of picture and caption, or reasons."""

  def read(files, caption_key=None):
    path = write_tar(tmp_path / '0.tar', files)
    found = []
    for example in tar_shards.samples(str(path), caption_key):
      if isinstance(example, Damaged):
        found.append(example.reason)
        continue
      try:
        caption = captions.clean(example['caption'])[0]
      except captions.UnusableCaption as error:
        caption = f'({error})'
      found.append((example['picture'].decode(), caption))
    return found

  return read


@pytest.mark.parametrize(
  'stem',
  [
    'IMG 2.0',
    '22.05',
    'a.b.c',
    'x',
    ' x ',
    '.hidden',
    'v1.0/x',
    'v1.0/x.1',
    './x',
    'a.jpg',
    'a.tar',
    'ä.ö',
    'x.',
    '2024-01-01 12.30.15 (1)',
    '..',
    'a.txt',
  ],
)
@pytest.mark.parametrize(
  'ending', ['jpg', 'JPG', 'jpeg', 'Jpe', 'jfif', 'JFIF', 'png', 'WebP', 'gif']
)
def test_names_end_at_their_last_dot(read, stem, ending):
  assert read(
    [
      (f'{stem}.{ending}', b'1'),
      (f'{stem}.txt', b'one'),
      (f'{stem}2.{ending}', b'2'),
      (f'{stem}2.TXT', b'two'),
      (f'{stem}3.json', b'{"caption": "three"}'),
      (f'{stem}3.{ending}', b'3'),
    ]
  ) == [('1', 'one'), ('2', 'two'), ('3', 'three')]


def test_whitespace_after_an_ending(read):
  assert read([('a.jpg ', b'1'), ('a.txt ', b'one')]) == [('1', 'one')]


def test_names_of_other_samples_begin_alike(read):
  files = [
    (f'IMG 2.{i}.{ending}', content)
    for i in range(3)
    for ending, content in (('jpg', b'%d' % i), ('txt', b'text %d' % i))
  ]
  assert read(files) == [(f'{i}', f'text {i}') for i in range(3)]
  # A caption of a.b doesn't belong to a, and vice versa.
  assert read([('a.jpg', b'1'), ('a.b.jpg', b'2'), ('a.b.txt', b'two')]) == [
    ('1', '(no caption)'),
    ('2', 'two'),
  ]
  assert read([('a.jpg', b'1'), ('a.jpg.txt', b'one?')]) == [('1', '(no caption)'), ('', 'one?')]


@pytest.mark.parametrize(
  'files, count',
  [
    (['a.tif', 'b.bmp', 'c.d.heic'], 3),
    (['README'], 1),
    (['a.tif', 'a.npy', 'a.cls'], 1),
    (['IMG 2.0.tif', 'IMG 2.1.tif', 'IMG 2.2.tif'], 3),
    (['v1.0/a.', 'v1.0/b'], 2),
    (['a.jpg.part', 'a.jpg~', 'x.gz'], 3),
    (['a' * 90 + '.exr'], 1),
    (['.DS_Store', 'x/.y'], 2),
  ],
)
def test_nothing_vanishes_uncounted(read, files, count):
  others = [(name, b'?') for name in files]
  sample = [('z.jpg', b'1'), ('z.txt', b'one')]
  assert read(others) == [NEITHER] * count
  assert read(others + sample) == [NEITHER] * count + [('1', 'one')]
  found = read(sample + others)
  assert ('1', 'one') in found and found.count(NEITHER) == count == len(found) - 1


def test_additional_files_of_a_sample_are_not_counted(read):
  others = [('0.cls', b'?'), ('0.depth.npy', b'?'), ('0.meta.v1.bin', b'?')]
  sample = [('0.jpg', b'1'), ('0.txt', b'one')]
  for files in (others + sample, sample + others, sample[:1] + others + sample[1:]):
    assert read(files) == [('1', 'one')]
  many = [(f'IMG 2.{i:04d}.{ending}', b'%d' % i) for i in range(1200) for ending in ('jpg', 'npy')]
  assert len(read(many)) == 1200


def test_a_warning_names_the_first_of_such_files(tmp_path, write_tar, encode, caplog):
  write_tar(tmp_path / '0.tar', [('a.tif', b'?'), ('b.tif', b'?'), ('c.png', encode((1, 2, 3)))])
  gin.parse_config(f"webdataset.path = '{tmp_path}'")
  batches = Batches('webdataset_images', 'train', 1, {'images': 8}, num_epochs=1)
  assert len(list(batches)) == 1 and batches.skipped == {NEITHER: 2}
  assert "0.tar, 'a.tif': " in caplog.text and 'b.tif' not in caplog.text


@pytest.mark.parametrize(
  'files, reasons',
  [
    ([('a.tif', b'?')], f'1 {NEITHER}'),
    ([], ''),
    ([('a.jpg', b'?'), ('a.txt', b'a')], '1 unknown picture format'),
    ([('a.txt', b'a')], '1 no picture'),
  ],
)
def test_the_error_says_why_nothing_is_usable(tmp_path, write_tar, files, reasons):
  write_tar(tmp_path / '0.tar', files)
  gin_config.parse(['gin_configs/tasks/webdataset.gin'], [f"webdataset.path='{tmp_path}'"])
  with pytest.raises(UserError, match=f"webdataset .*'train'.*{reasons}$"):
    next(datasets.pictures_and_captions('webdataset', 'train', 8))
  with pytest.raises(UserError, match=f'webdataset_pairs, train: .*{reasons}$'):
    next(Batches('webdataset_pairs', 'train', 1, {'images': 8, 'inputs': 8}))


R, G, TXT_R, TXT_G = ('0.jpg', b'r'), ('0.jpg', b'g'), ('0.txt', b'red'), ('0.txt', b'green')
NONE, UNSURE = '(no caption)', f'({AMBIGUOUS})'


@pytest.mark.parametrize(
  'files, samples',
  [
    ([R, TXT_R, G], [('r', 'red'), ('g', NONE)]),
    ([R, TXT_R, G, TXT_G], [('r', 'red'), ('g', 'green')]),
    ([TXT_R, R, TXT_G, G], [('r', 'red'), ('g', 'green')]),
    ([R, TXT_R, TXT_G, G], [('r', 'red'), ('g', 'green')]),
    ([R, TXT_R, TXT_G], [('r', 'red'), ('', 'green')]),
    ([R, TXT_R] * 3, [('r', 'red')] * 3),
    # An ambiguous caption.
    ([R, G, TXT_R], [('r', NONE), ('g', UNSURE)]),
    ([R, G, TXT_R, TXT_G], [('r', NONE), ('g', UNSURE), ('', UNSURE)]),
    ([TXT_R, TXT_G, R, G], [('', 'red'), ('r', UNSURE), ('g', NONE)]),
    ([TXT_R, TXT_G, R], [('', 'red'), ('r', UNSURE)]),
    ([R, G], [('r', NONE), ('g', NONE)]),
    ([R, ('0.jpeg', b'g'), TXT_R], [('r', NONE), ('g', UNSURE)]),
    ([R, ('0.JPG', b'g'), TXT_R], [('r', NONE), ('g', UNSURE)]),
    ([('0.png', b'g'), TXT_G, R, TXT_R], [('r', UNSURE), ('', UNSURE)]),
    # Two formats of one key may be the same picture; the first in a fixed order is read.
    ([('0.png', b'g'), R, TXT_R], [('r', 'red')]),
    ([R, ('0.png', b'g'), TXT_R], [('r', 'red')]),
    # Between others.
    (
      [R, TXT_R, ('1.jpg', b'1'), ('1.txt', b'one'), G, TXT_G],
      [('r', 'red'), ('1', 'one'), ('g', 'green')],
    ),
    (
      [R, ('1.jpg', b'1'), TXT_R, ('1.txt', b'one')],
      [('r', NONE), ('1', NONE), ('', 'red'), ('', 'one')],
    ),
  ],
)
def test_repeated_keys(read, files, samples):
  """They are separate samples; a caption never joins another picture."""
  assert read(files) == samples


def test_repeated_keys_in_a_run(tmp_path, write_tar, encode):
  write_tar(
    tmp_path / '0.tar',
    [
      ('0.png', encode((255, 0, 0))),
      ('0.txt', b'red circle'),
      ('0.png', encode((0, 255, 0))),
      ('1.png', encode((0, 0, 255))),
      ('1.png', encode((0, 0, 255))),
      ('1.txt', b'blue circle'),
    ],
  )
  gin.parse_config(f"webdataset.path = '{tmp_path}'\ndrop_text.rate = 0.0")
  batches = Batches('webdataset_pairs', 'train', 4, {'images': 8, 'inputs': 8}, num_epochs=1)
  (batch,) = batches
  assert (batch['images'] == (255, 0, 0)).all() and len(batch['images']) == 1
  assert batches.skipped == {'no caption': 2, AMBIGUOUS: 1}
  images = Batches('webdataset_images', 'train', 4, {'images': 8}, num_epochs=1)
  assert sum(len(batch['images']) for batch in images) == 4 and not images.skipped


def _json(**columns):
  return json.dumps(columns).encode()


@pytest.mark.parametrize(
  'key, caption',
  [
    (None, 'alt text'),
    ('caption', 'of json'),
    ('blip', 'a red square'),
    ('other', '(no caption under webdataset.caption_key)'),
  ],
)
def test_the_column_that_is_named_wins(read, key, caption):
  row = _json(caption='of json', blip='a red square')
  files = [('0.txt', b'alt text'), ('0.json', row)]
  for ordered in (files, files[::-1]):
    assert read([('0.jpg', b'0'), *ordered], key) == [('0', caption)]


@pytest.mark.parametrize(
  'files, caption',
  [
    ([('0.txt', b'alt text')], 'no caption under webdataset.caption_key'),
    ([('0.json', b'not json')], 'no caption under webdataset.caption_key'),
    ([('0.json', b'[1]')], 'no caption under webdataset.caption_key'),
    ([('0.json', _json(caption='of json'))], 'no caption under webdataset.caption_key'),
    ([('0.json', _json(blip=None))], 'no caption'),
    ([('0.json', _json(blip=' '))], 'no caption'),
    ([('0.json', _json(blip=['a']))], 'caption that is not a text'),
    ([('0.json', _json(blip={'a': 1}))], 'caption that is not a text'),
    ([('0.json', _json(blip=7))], 'caption that is not a text'),
    ([], 'no caption under .*'),
  ],
)
def test_a_missing_column_is_counted(tmp_path, write_tar, encode, files, caption):
  write_tar(tmp_path / '0.tar', [('0.png', encode((1, 2, 3))), *files])
  gin_config.parse(
    ['gin_configs/tasks/webdataset.gin'],
    [f"webdataset.path='{tmp_path}'", "webdataset.caption_key='blip'"],
  )
  with pytest.raises(UserError, match=f' 1 {caption}$'):
    next(datasets.pictures_and_captions('webdataset', 'train', 8))
  # The picture is usable without it.
  assert len(list(Batches('webdataset_images', 'train', 1, {'images': 8}, num_epochs=1))) == 1


@pytest.mark.parametrize('ending', ['jpg', 'JPEG', 'jpe', 'JFIF', 'weird name', ''])
def test_pictures_in_folders_have_any_ending(tmp_path, ending):
  picture = io.BytesIO()
  Image.new('RGB', (8, 8), (0, 0, 254)).save(picture, 'jpeg', quality=100)
  name = f'a.b {ending}' if not ending else f'a.b.{ending}'
  (tmp_path / name).write_bytes(picture.getvalue())
  (tmp_path / 'captions.jsonl').write_text(json.dumps({'file': name, 'caption': 'blue'}))
  gin.parse_config(f"folder.path = '{tmp_path}'")
  ((caption, image),) = datasets.pictures_and_captions('folder', 'train', 8)
  assert caption == 'blue' and np.abs(image.astype(int) - (0, 0, 254)).max() <= 2


@pytest.mark.parametrize(
  'content, columns',
  [
    (
      b'{"clip": 0.3, "url": "x", "n": null, "ok": true, "list": [1], "more": {"a": 1}}',
      {'clip': 0.3, 'url': 'x', 'n': None, 'ok': True},
    ),
    (b'[1]', {}),
    (b'{', {}),
    (b'[' * 10**5, {}),
    (b'{"n": ' + b'9' * 10**4 + b'}', {}),
    (b'{"text": "' + b'a' * 2**20 + b'"}', {}),
    (b'\xff', {}),
    (None, {}),
  ],
)
def test_columns_are_the_numbers_and_texts_of_the_json(tmp_path, write_tar, content, columns):
  files = [('a/1.jpg', b'1'), ('a/1.txt', b'one')] + ([('a/1.json', content)] if content else [])
  path = write_tar(tmp_path / '0.tar', files)
  assert list(tar_shards.samples(str(path), None, describe=True)) == [
    {'picture': b'1', 'caption': b'one', 'key': 'a/1', 'columns': columns}
  ]
  assert list(tar_shards.samples(str(path), None)) == [{'picture': b'1', 'caption': b'one'}]
