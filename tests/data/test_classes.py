"""Pictures of classes: folders, tars and tensorflow-datasets, all with the same captions."""

import json
import pickle
import re

import gin
import numpy as np
import pytest
import tfrecord_files

from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import datasets
from parti_jax.data import sources
from parti_jax.data.batches import Batches
from parti_jax.data.damage import Damaged

KEYS = ['n01440764', 'n01443537', 'n02012849']
NAMES = 'n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\n'
# Class id -> colors of its pictures.
COLORS = {0: [(250, 0, 0), (200, 0, 0)], 1: [(0, 250, 0)], 2: [(0, 0, 250), (0, 0, 200)]}
TEXTS = {0: 'tench', 1: 'goldfish', 2: 'crane'}


@pytest.fixture(name='names')
def fixture_names(tmp_path):
  path = tmp_path / 'LOC_synset_mapping.txt'
  path.write_text(NAMES)
  return path


def pictures(encode):
  """Yields class id, name and encoded picture."""
  for label, colors in COLORS.items():
    for number, color in enumerate(colors):
      yield label, f'{KEYS[label]}_{number}.JPEG', encode(color, image_format='png')


def folders(tmp_path, encode, write_tar):
  del write_tar
  for label, name, picture in pictures(encode):
    (tmp_path / 'train' / KEYS[label]).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'train' / KEYS[label] / name).write_bytes(picture)
  return {'train': 'train'}


def tars_of_classes(tmp_path, encode, write_tar):
  (tmp_path / 'train').mkdir()
  for label, key in enumerate(KEYS):
    files = [(name, data) for found, name, data in pictures(encode) if found == label]
    write_tar(tmp_path / 'train' / f'{key}.tar', files)
  return {'train': 'train'}


def tar_of_tars(tmp_path, encode, write_tar):
  tars_of_classes(tmp_path, encode, write_tar)
  inner = [(f'{key}.tar', (tmp_path / 'train' / f'{key}.tar').read_bytes()) for key in KEYS]
  write_tar(tmp_path / 'ILSVRC2012_img_train.tar', inner)
  return {'train': 'ILSVRC2012_img_train.tar'}


def tar_of_folders(tmp_path, encode, write_tar):
  files = [(f'train/{KEYS[label]}/{name}', data) for label, name, data in pictures(encode)]
  write_tar(tmp_path / 'all.tar', files)
  return {'train': 'all.tar'}


def shards(tmp_path, encode, write_tar):
  (tmp_path / 'shards').mkdir()
  for number, (label, name, data) in enumerate(pictures(encode)):
    files = [(f'{name[:-5]}.jpg', data), (f'{name[:-5]}.cls', f'{label}\n'.encode())]
    write_tar(tmp_path / 'shards' / f'{number:04d}.tar', files)
  return {'train': 'shards/{0000..0004}.tar'}


def records(encode):
  return [
    tfrecord_files.example(image=data, label=[label], file_name=name.encode())
    for label, name, data in pictures(encode)
  ]


def tfds(tmp_path, encode, write_tar):
  del write_tar
  (tmp_path / 'label.labels.txt').write_text('\n'.join(KEYS) + '\n')
  found = records(encode)
  for number, part in enumerate((found[:2], found[2:])):
    path = tmp_path / f'imagenet2012-train.tfrecord-{number:05d}-of-00002'
    path.write_bytes(tfrecord_files.framed(part))
  return {'train': 'imagenet2012-train.tfrecord*'}


def array_records(tmp_path, encode, write_tar):
  del write_tar
  from array_record.python import array_record_module

  (tmp_path / 'label.labels.txt').write_text('\n'.join(KEYS) + '\n')
  found = records(encode)
  for number, part in enumerate((found[:2], found[2:])):
    path = tmp_path / f'imagenet2012-train.array_record-{number:05d}-of-00002'
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in part:
      writer.write(record)
    writer.close()
  return {'train': 'imagenet2012-train.array_record*'}


FORMS = [folders, tars_of_classes, tar_of_tars, tar_of_folders, shards, tfds, array_records]


def source(tmp_path, splits, **settings):
  bindings = {'path': str(tmp_path), 'splits': splits, **settings}
  gin_config.parse(
    ['gin_configs/tasks/imagenet.gin'],
    [f'classes.{name} = {value!r}' for name, value in bindings.items()],
  )
  return sources.configured('classes')


@pytest.mark.parametrize('form', FORMS)
def test_all_forms_have_the_same_examples(form, tmp_path, encode, write_tar, names):
  splits = form(tmp_path, encode, write_tar)
  found = source(tmp_path, splits, names=str(names))
  examples = list(found.examples('train'))
  expected = [(TEXTS[label].encode(), data) for label, _, data in pictures(encode)]
  assert [(example['caption'], example['picture']) for example in examples] == expected
  opened = found.open_described('train')
  described = list(found.examples('train')) if not hasattr(opened, '__len__') else None
  if described is None:
    described = opened.read(range(len(opened)))
    assert [example['columns']['class'] for example in described] == [0, 0, 1, 2, 2]
    assert [example['key'].split('/')[-1][:11] for example in described] == [
      name.replace('.JPEG', '')[:11] for _, name, _ in pictures(encode)
    ]
    # Workers get the opened split by pickling.
    again = pickle.loads(pickle.dumps(opened)).read([4, 0])
    assert [example['picture'] for example in again] == [expected[4][1], expected[0][1]]
    opened.close()
    assert opened.read([2])[0]['picture'] == expected[2][1]
  with_ids = source(tmp_path, splits, label='id', names=str(names))
  captions = [example['caption'] for example in with_ids.examples('train')]
  assert captions == [b'0', b'0', b'1', b'2', b'2']


def test_batches_and_the_text(tmp_path, encode, write_tar, names):
  splits = folders(tmp_path, encode, write_tar)
  source(tmp_path, splits, names=str(names), template='a photo of a {}')
  with gin.unlock_config():
    gin.parse_config('drop_text.rate = 0.0')
  vocabulary, found = datasets.get_vocabulary(), {}
  for batch in Batches('pairs', 'train', 5, {'inputs': 16, 'images': 8}, seed=3, num_epochs=1):
    for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
      found.setdefault(vocabulary.decode(ids), []).append(int(image.argmax(-1)[0, 0]))
  assert {text: sorted(channels) for text, channels in found.items()} == {
    'a photo of a tench': [0, 0],
    'a photo of a goldfish': [1],
    'a photo of a crane': [2, 2],
  }


@pytest.mark.parametrize('label', ['id', 'name'])
def test_batches_for_a_class_conditional_generator(label, tmp_path, encode, write_tar, names):
  splits = folders(tmp_path, encode, write_tar)
  path = tmp_path / 'classes.json'
  assert main.main(['vocabulary', f'--classes={names}', f'--output={path}']) == 0
  source(tmp_path, splits, names=str(names), label=label)
  with gin.unlock_config():
    gin.parse_config(f"drop_text.rate = 0.5\nvocabulary.path = '{path}'")
  found, lengths = [], {'inputs': 1, 'images': 8}
  for batch in Batches('pairs', 'train', 5, lengths, seed=3, num_epochs=8, training=True):
    for ids, image in zip(batch['encoder_input_tokens'], batch['images']):
      found.append((int(ids[0]), int(image.argmax(-1)[0, 0])))
  # A picture's color is its class, and dropped texts have the id after the last class.
  assert {label for label, color in found if label != color} == {3} and len(found) == 40
  assert {0, 1, 2} < {label for label, _ in found}


def test_a_vocabulary_of_classes_reads_no_captions(tmp_path, names, capsys):
  flags = [f'--classes={names}', f'--output={tmp_path}/classes.json']
  assert main.main(['vocabulary', *flags, '--task=mixture_texts']) == 2
  assert '--classes reads no captions' in capsys.readouterr().err
  assert not (tmp_path / 'classes.json').exists()


def test_digest_changes_with_the_classes(tmp_path, encode, write_tar, names):
  splits = folders(tmp_path, encode, write_tar)
  digest = source(tmp_path, splits, names=str(names)).open('train').digest()
  assert source(tmp_path, splits, names=str(names)).open('train').digest() == digest
  assert source(tmp_path, splits, label='id').open('train').digest() != digest
  moved = tmp_path / 'train' / KEYS[0] / f'{KEYS[0]}_0.JPEG'
  moved.rename(tmp_path / 'train' / KEYS[1] / moved.name)
  assert source(tmp_path, splits, names=str(names)).open('train').digest() != digest


def test_classes_are_those_of_the_first_split_without_names(tmp_path, encode):
  for split, classes in (('train', 'abc'), ('val', 'bc')):
    for name in classes:
      (tmp_path / split / f'class_{name}').mkdir(parents=True)
      (tmp_path / split / f'class_{name}' / '1.png').write_bytes(encode((1, 2, 3)))
  splits = {'train': 'train', 'validation': 'val'}
  found = source(tmp_path, splits)
  assert [e['caption'] for e in found.examples('validation')] == [b'class b', b'class c']
  found = source(tmp_path, splits, label='id')
  assert [e['caption'] for e in found.examples('validation')] == [b'1', b'2']
  (tmp_path / 'val' / 'class_d').mkdir()
  with pytest.raises(UserError, match="val has the class 'class_d', which is not among the 3"):
    found.open('validation')


@pytest.mark.parametrize(
  'form, settings, message',
  [
    (folders, {}, 'have only the names of their folders, such as n01440764'),
    (folders, {'label': 'number', 'names': True}, "label='number' is unknown"),
    (folders, {'template': 'a photo', 'names': True}, "template='a photo' must have {} once"),
    (folders, {'template': 'a {}', 'label': 'id'}, 'does not apply to label=id'),
    (shards, {}, 'set classes.names to a file of their names'),
    (tars_of_classes, {}, 'have only the names of their folders'),
  ],
)
def test_settings_without_use(form, settings, message, tmp_path, encode, write_tar, names):
  splits = form(tmp_path, encode, write_tar)
  if settings.get('names'):
    settings = settings | {'names': str(names)}
  with pytest.raises(UserError, match=re.escape(message)):
    source(tmp_path, splits, **settings).open('train')


@pytest.mark.parametrize('form', [folders, tar_of_tars, tfds])
def test_other_classes_than_those_of_the_names(form, tmp_path, encode, write_tar, names):
  splits = form(tmp_path, encode, write_tar)
  names.write_text(NAMES.replace('n02012849', 'n02012850'))
  with pytest.raises(UserError, match="the class 'n02012849'|not those of .*label.labels.txt"):
    source(tmp_path, splits, names=str(names)).open('train')


def test_more_classes_than_names(tmp_path, encode, write_tar, names):
  splits = shards(tmp_path, encode, write_tar)
  names.write_text('\n'.join(NAMES.splitlines()[:2]))
  with pytest.raises(UserError, match='train has the class 2, but classes.names has 2 classes'):
    source(tmp_path, splits, names=str(names)).open('train')


def test_a_subset_of_the_classes(tmp_path, encode, names, caplog):
  (tmp_path / 'train' / KEYS[2]).mkdir(parents=True)
  (tmp_path / 'train' / KEYS[2] / '1.png').write_bytes(encode((1, 2, 3)))
  found = source(tmp_path, {'train': 'train'}, names=str(names))
  assert [example['caption'] for example in found.examples('train')] == [b'crane']
  assert 'pictures of 1 of 3 classes' in caplog.text


def test_tars_that_are_damaged(tmp_path, encode, write_tar, names):
  splits = tar_of_folders(tmp_path, encode, write_tar)
  path = tmp_path / 'all.tar'
  whole = path.read_bytes()
  found = source(tmp_path, splits, names=str(names))
  for damaged, message in (
    (whole[:700], 'not a whole, uncompressed tar'),
    (whole[:2600], 'not a whole, uncompressed tar'),
    (whole[:1024] + b'x' * 512 + whole[1536:], 'damaged header'),
    (b'\x1f\x8b' + whole, 'not a whole, uncompressed tar'),
    (b'', 'not a whole, uncompressed tar'),
  ):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f'all.tar.*{message}'):
      found.open('train')
  path.write_bytes(whole)
  opened = found.open('train')
  path.write_bytes(whole[:600])  # Cut after it was opened.
  assert isinstance(opened.read([4])[0], Damaged)


def test_shards_with_a_bad_class(tmp_path, encode, write_tar, names):
  (tmp_path / 'shards').mkdir()
  good = [('a.jpg', encode((1, 2, 3))), ('a.cls', b'1')]
  found = source(tmp_path, {'train': 'shards'}, names=str(names))
  write_tar(tmp_path / 'shards' / '0.tar', [*good, ('b.jpg', encode((1, 2, 3)))])
  with pytest.raises(UserError, match='b.jpg has no .cls file'):
    found.open('train')
  write_tar(tmp_path / 'shards' / '0.tar', [*good, ('b.cls', b'one')])
  with pytest.raises(UserError, match='b.cls is not the number of a class'):
    found.open('train')


def test_damaged_records(tmp_path, encode, names):
  (tmp_path / 'label.labels.txt').write_text('\n'.join(KEYS))
  bad = [
    b'\xff\xff',
    tfrecord_files.example(image=encode((1, 2, 3)), label=[7]),
    tfrecord_files.example(image=encode((1, 2, 3))),
    tfrecord_files.example(label=[1]),
  ]
  path = tmp_path / 'x-train.tfrecord-00000-of-00001'
  path.write_bytes(tfrecord_files.framed(bad))
  found = source(tmp_path, {'train': 'x-train.*'}, names=str(names))
  reasons = [example.reason for example in found.examples('train')]
  assert reasons[:2] == [
    'record that is not a tf.train.Example',
    'label that is not the number of a known class',
  ]
  assert reasons[2:] == ['record without one image and one label'] * 2


def test_nothing_there(tmp_path, names):
  found = source(tmp_path, {'train': 'train'}, names=str(names))
  with pytest.raises(UserError, match='is neither a folder with a folder of pictures'):
    found.open('train')
  (tmp_path / 'train' / KEYS[0]).mkdir(parents=True)
  with pytest.raises(UserError, match='have no pictures'):
    found.open('train')


# Files of names.


def test_names_of_several_forms(tmp_path):
  index = {str(number): [key, TEXTS[number]] for number, key in enumerate(KEYS)}
  for name, content in (
    ('a.txt', NAMES),
    ('a.json', json.dumps(index)),
    ('b.txt', NAMES.replace(' ', '\t', 1)),
  ):
    (tmp_path / name).write_text(content)
    found = class_names.read(str(tmp_path / name))
    assert list(found.keys) == KEYS and list(found.names) == list(TEXTS.values())
  (tmp_path / 'c.txt').write_text('great white shark\n\nhen\n')
  assert list(class_names.read(str(tmp_path / 'c.txt')).names) == ['great white shark', 'hen']


def test_classes_of_the_same_name_are_told_apart(tmp_path):
  path = tmp_path / 'names.txt'
  path.write_text(
    'n02012849 crane\nn03126707 crane\nn03710637 maillot\nn03710721 maillot, tank suit\n'
  )
  assert list(class_names.read(str(path)).names) == [
    'crane (n02012849)',
    'crane (n03126707)',
    'maillot (n03710637)',
    'maillot (tank suit)',
  ]


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', '', 'has no class'),
    ('a.txt', 'hen\nhen\n', "has the class 'hen' twice"),
    ('a.txt', 'n02119789 1 kit_fox\nn02100735 2 English_setter\n', 'order of their WordNet ids'),
    ('a.json', '{"1": ["n01", "x"]}', 'not of the expected form'),
    ('a.json', '[]', 'has no class'),
    ('a.json', '{"0": "x"}', 'not of the expected form'),
  ],
)
def test_files_of_names_of_another_form(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=f'{name}.*{message}'):
    class_names.read(str(tmp_path / name))


def test_ids_as_texts(tmp_path):
  texts = class_names.of_keys(KEYS).texts('id')
  assert texts == ['0', '1', '2'] and np.array(texts).astype(int).tolist() == [0, 1, 2]
