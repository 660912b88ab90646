"""What needs TensorFlow: our tasks under seqio, tasks of its registry, and TFRecord files."""

import json

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tfrecord_files

from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import tasks
from parti_jax.data.batches import Batches
from parti_jax.data.readers import tfrecords

IMAGES = {'images': 8}


def test_mixtures_of_seqio(numbered):
  numbered(6)
  tasks.get_task('folder_images')
  seqio.MixtureRegistry.add('half_and_half', [('folder_images', 1)])
  try:
    batches = Batches('half_and_half', 'train', 6, IMAGES, num_epochs=1)
    assert sorted(next(batches)['images'][:, 0, 0, 0].tolist()) == list(range(6))
  finally:
    seqio.MixtureRegistry.remove('half_and_half')


def test_unknown_task():
  with pytest.raises(UserError, match="'folder_picture'.*openmoji_images.*mixture_tokens"):
    Batches('folder_picture', 'train', 1, IMAGES)


def test_a_task_works_with_seqio_alone(numbered):
  numbered(6)
  tasks.get_task('folder_images')
  dataset = seqio.get_mixture_or_task('folder_images').get_dataset(IMAGES, 'train', seed=0)
  assert sorted(int(e['images'][0, 0, 0]) for e in dataset) == list(range(6))


def test_a_third_party_task_is_padded():
  captions = ['red circle', 'green circle', 'woman firefighter']
  vocabulary = datasets.get_vocabulary()
  texts = tf.data.Dataset.from_tensor_slices({'inputs': captions})
  seqio.TaskRegistry.remove('made_elsewhere')
  seqio.TaskRegistry.add(
    'made_elsewhere',
    seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: texts, splits=['train']),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features={'inputs': seqio.Feature(seqio.SentencePieceVocabulary(vocabulary.path))},
  )
  batch = next(Batches('made_elsewhere', 'train', 3, {'inputs': 12}, shuffle=False, num_epochs=1))
  np.testing.assert_array_equal(
    batch['encoder_input_tokens'], [vocabulary.encode(text, 12)[0] for text in captions]
  )


@pytest.fixture(name='mixture')
def _mixture(tmp_path, encode):
  """A mixture of 9 and 4 pictures, weighted 3:1; green is the folder, red the picture's number.

  The first picture of each folder is damaged.
  """
  for source, count in (('a', 9), ('b', 4)):
    folder = tmp_path / source
    folder.mkdir()
    rows = []
    for number in range(count):
      picture = encode((number, 'ab'.index(source), 0)) if number else b'bad'
      (folder / f'{number}.png').write_bytes(picture)
      rows.append(json.dumps({'file': f'{number}.png', 'caption': f'woman {number}'}))
    (folder / 'captions.jsonl').write_text('\n'.join(rows))
    gin.parse_config(f"folder_{source}/folder.path = '{folder}'")
  gin.parse_config("folder.splits = {'train': 'captions.jsonl', 'validation': 'captions.jsonl'}")
  gin.parse_config("mixture.sources = {'folder_a': 3, 'folder_b': 1}")
  return tasks.get_task('mixture_images')


def test_seqio_mixes_as_our_mixtures_do(mixture):
  assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
    'folder_a_images': 0.75,
    'folder_b_images': 0.25,
  }

  def read(split='train', **kwargs):
    dataset = mixture.get_dataset(IMAGES, split, seed=3, **kwargs)
    return [
      tuple(example['images'][0, 0, 1::-1].tolist())
      for example in dataset.take(40).as_numpy_iterator()
    ]

  found = read()
  for start in range(37):
    assert 2 <= sum(source == 0 for source, _ in found[start : start + 4]) <= 4
  assert [sum(source == 0 for source, _ in found[:count]) for count in (4, 20, 40)] == [3, 15, 30]
  assert found == read() != read(shuffle=False)
  assert sorted(read('validation', num_epochs=1)) == sorted(
    (source, number) for source, count in ((0, 9), (1, 4)) for number in range(1, count)
  )
  with pytest.raises(UserError, match=r"mixture\.sources.*folder_a.*'test'"):
    mixture.get_dataset(IMAGES, 'test')


@pytest.mark.parametrize('packing', [None, 'GZIP', 'ZLIB'])
def test_tfrecords_of_tensorflow(tmp_path, packing):
  """They are read, and tfrecord_files writes the same."""
  features = {'image': [b'x', b'\xff'], 'caption': b'a dog', 'width': [3, -4], 'clip': [0.5]}
  kinds = {
    'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=features['image'])),
    'caption': tf.train.Feature(bytes_list=tf.train.BytesList(value=[features['caption']])),
    'width': tf.train.Feature(int64_list=tf.train.Int64List(value=features['width'])),
    'clip': tf.train.Feature(float_list=tf.train.FloatList(value=features['clip'])),
    'none': tf.train.Feature(),
  }
  example = tf.train.Example(features=tf.train.Features(feature=kinds))
  assert tf.train.Example.FromString(tfrecord_files.example(**features, none=[])) == example
  records = [b'', b'abc', bytes(100_000), example.SerializeToString()]
  path = tmp_path / 'train.tfrecord'
  with tf.io.TFRecordWriter(str(path), packing) as writer:
    for record in records:
      writer.write(record)
  if packing is None:
    assert path.read_bytes() == tfrecord_files.framed(records)
  assert [found['record'] for found in tfrecords.raw(str(path))] == records
  read = tfrecords.parsed(records[-1], {'caption': 'caption'}, describe=True)
  assert read['caption'] == b'a dog' and read['columns'] == {'clip': 0.5}
