"""Our seqio tasks under t5x: settled when used, texts dropped in training alone, losses reported."""

import json
import logging
import os

import gin
import numpy as np
import pytest
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import token_cache
from parti_jax.data.batches import Batches
from parti_jax.data.feature_converter import PairFeatureConverter
from parti_jax.data.feature_converter import PartiFeatureConverter
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.vocabulary import EOS_ID
from parti_jax.t5x import tasks

INFO = {'codebook_size': 40, 'image_tokens': 4, 'tokenizer': 'abc'}
LENGTHS = {'inputs': 12, 'targets': 4}


@pytest.fixture(name='cache')
def _cache(tmp_path):
  """Writes token caches; each example's four tokens are its number."""

  def write(train, validation=3, captions=lambda i: f'woman firefighter {i}', name='cache'):
    folder = str(tmp_path / name)
    for split, count in (('train', train), ('validation', validation)):
      examples = [(captions(i), np.full(4, i, np.int32)) for i in range(count)]
      token_cache.write_token_cache(folder, examples, INFO, split)
    gin.parse_config(f"token_cache.path = '{folder}'")
    return folder

  return write


def _read(count, split='train', **kwargs):
  """Returns examples of openmoji_tokens as t5x reads them, converted."""
  converter = PartiFeatureConverter(pack=False, use_custom_packing_ops=False)
  dataset = seqio.get_dataset(
    'openmoji_tokens',
    LENGTHS,
    converter,
    dataset_split=split,
    seed=3,
    verbose=False,
    shard_info=seqio.ShardInfo(0, 1),
    **kwargs,
  )
  return list(dataset.take(count).as_numpy_iterator())


def _numbers(examples):
  return [int(example['decoder_target_tokens'][0]) for example in examples]


def _dropped(examples):
  return [example['encoder_input_tokens'][0] == EOS_ID for example in examples]


def test_a_task_is_created_when_it_is_first_used(cache):
  task = seqio.get_mixture_or_task('openmoji_tokens')
  assert isinstance(task, seqio.Task) and list(task.output_features) == ['inputs', 'targets']
  # A mixture may be made before gin has been read.
  seqio.MixtureRegistry.remove('test_mixture')
  mixture = seqio.MixtureRegistry.add('test_mixture', ['cached_tokens'], default_rate=1)
  with pytest.raises(UserError, match='token_cache.path is not set'):
    _ = task.splits
  cache(5)
  assert set(task.splits) == {'train', 'validation'}
  assert task.num_input_examples('train') == 5
  assert task.output_features['inputs'].vocabulary == tasks.text_vocabulary()
  assert task.output_features['targets'].vocabulary.vocab_size == 40
  assert len(list(mixture.get_dataset(LENGTHS, 'train', shuffle=False, num_epochs=1))) == 5
  # What is settled stays, as a run's data should; registered again it follows gin again.
  cache(6, name='other')
  assert task.num_input_examples('train') == 5
  tasks.register()
  assert seqio.get_mixture_or_task('openmoji_tokens').num_input_examples('train') == 6


def test_all_tasks_are_registered():
  assert {
    'openmoji_tokens',
    'cached_tokens',
    'openmoji_images',
    'folder_pairs',
    'tfrecord_images',
    'webdataset_pairs',
    'text_texts',
    'openmoji_texts',
    'images',
    'pairs',
    'texts',
  } <= set(seqio.TaskRegistry.names())


def test_training_drops_texts_and_shuffles_each_epoch_anew(cache):
  cache(30)
  gin.parse_config('drop_text.rate = 0.5')
  examples = _read(60, shuffle=True, num_epochs=None)
  dropped, numbers = _dropped(examples), _numbers(examples)
  assert 15 <= sum(dropped) <= 45
  assert dropped[:30] != dropped[30:]  # Other texts in each epoch.
  assert sorted(numbers[:30]) == sorted(numbers[30:]) == list(range(30))
  assert numbers[:30] != numbers[30:]
  again = _read(60, shuffle=True, num_epochs=None)
  assert (dropped, numbers) == (_dropped(again), _numbers(again))


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('shuffle, num_epochs', [(False, 1), (True, 40), (True, None)])
def test_texts_are_dropped_where_a_split_is_read_without_end(cache, split, shuffle, num_epochs):
  cache(30, validation=30)
  gin.parse_config('drop_text.rate = 0.5')
  dropped = _dropped(_read(60, split, shuffle=shuffle, num_epochs=num_epochs))
  assert any(dropped) == (num_epochs is None)


def test_training_reads_as_our_own_loop_does(cache):
  cache(30)
  gin.parse_config('drop_text.rate = 0.0')
  ours = next(Batches('openmoji_tokens', 'train', 30, LENGTHS, shuffle=False))
  tasks.register()
  for name, values in ours.items():
    theirs = [example[name] for example in _read(30, shuffle=False, num_epochs=None)]
    np.testing.assert_array_equal(values, theirs)


def test_examples_keep_their_caption(cache):
  cache(2, captions=lambda i: f' café {i}\n')
  dataset = seqio.get_mixture_or_task('cached_tokens').get_dataset(LENGTHS, 'train', shuffle=False)
  assert [example['inputs_pretokenized'].decode() for example in dataset.as_numpy_iterator()] == [
    'café 0',
    'café 1',
  ]


def test_what_is_left_out_is_told(cache, caplog):
  cache(9, captions=lambda i: '' if i % 2 else f'apple {i}')
  caplog.set_level(logging.WARNING, 'absl')
  assert _numbers(_read(9, shuffle=False, num_epochs=1)) == [0, 2, 4, 6, 8]
  told = [record.getMessage() for record in caplog.records]
  # Whenever the count has doubled, and not for every example.
  assert told == [
    f'openmoji_tokens, train: skipped, in all epochs so far: {count} no caption'
    for count in (1, 2, 4)
  ]


def test_no_usable_example(cache):
  folder = cache(3, captions=lambda i: '')
  with pytest.raises(UserError, match=f'no usable example in .*{folder}; skipped 3 no caption'):
    _read(1, num_epochs=None)


@pytest.mark.parametrize(
  'lengths, named',
  [
    ({'inputs': 12, 'targets': 3}, r"4 tokens per picture, but feature_lengths\['targets'\] = 3"),
    ({'inputs': 12}, 'feature_lengths gives inputs'),
    (None, 'feature_lengths gives none'),
  ],
)
def test_lengths_that_do_not_fit(cache, lengths, named):
  cache(1)
  with pytest.raises(UserError, match=named):
    seqio.get_mixture_or_task('openmoji_tokens').get_dataset(lengths, 'train')


def test_pictures_are_drawn_at_the_size_that_is_asked_for(tmp_path):
  gin.parse_config(f"openmoji.data_dir = '{os.path.join(tmp_path, 'none')}'")
  task = seqio.get_mixture_or_task('pairs')
  assert task.name == 'pairs' and set(task.output_features) == {'images', 'inputs'}
  assert task.resolved(32).source is not task.resolved(64).source
  assert task.resolved(32) is task.resolved(32)
  assert task.resolved(32).source.place == task.source.place


def test_captioned_pictures_of_a_folder(tmp_path):
  lines = []
  for number in range(3):
    Image.new('RGB', (16, 16), (number, 0, 0)).save(tmp_path / f'{number}.png')
    lines.append(json.dumps({'file': f'{number}.png', 'caption': f'red {number}'}))
  (tmp_path / '1.png').write_bytes(b'no picture')
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
  gin.parse_config(f"folder.path = '{tmp_path}'\ndata.source = 'folder'")
  dataset = seqio.get_dataset(
    'pairs',
    {'images': 8, 'inputs': 12},
    PairFeatureConverter(pack=False),
    dataset_split='train',
    shuffle=False,
    num_epochs=1,
    verbose=False,
  )
  images = [example['images'] for example in dataset.as_numpy_iterator()]
  assert [(image.shape, image[0, 0, 0]) for image in images] == [((8, 8, 3), 0), ((8, 8, 3), 2)]


def test_a_variant_of_a_task_is_read_by_the_same_rules(cache, caplog):
  cache(30, validation=30, captions=lambda i: f'apple {i}' if i else '')
  gin.parse_config('drop_text.rate = 0.5')
  variant = seqio.get_mixture_or_task('openmoji_tokens').replace(name='mine', metric_fns=[])
  assert variant.name == 'mine' and not variant.metric_fns
  with_metric = variant.replace(metric_fns=[tasks.metrics.log_likelihood])
  assert len(with_metric.metric_objs) == len(with_metric.replace(name='other').metric_objs) == 1

  def dropped(task, count, split, **kwargs):
    dataset = task.get_dataset(LENGTHS, split, shuffle=False, **kwargs).take(count)
    texts = [example['inputs'][0] == EOS_ID for example in dataset.as_numpy_iterator()]
    assert len(texts) == count
    return sum(texts)

  for task in (variant, variant.replace(name='other')):
    assert dropped(task, 29, 'validation', num_epochs=1) == 0
    assert 5 <= dropped(task, 29, 'train', num_epochs=None) <= 24
    with pytest.raises(UserError, match=f'^{task.name} has the features inputs, targets, but'):
      task.get_dataset({'inputs': 12}, 'train')
  assert 'mine, validation: skipped, in all epochs so far: 1 no caption' in caplog.text


def test_a_mixture_of_token_caches(cache):
  mixture = seqio.get_mixture_or_task('mixture_tokens')
  assert isinstance(mixture, seqio.Mixture)
  with pytest.raises(UserError, match='mixture.sources is not set'):
    _ = mixture.tasks
  for name, captions in (('a', 'woman {}'), ('b', 'firefighter {}')):
    folder = cache(7, validation=2, captions=captions.format, name=name)
    gin.parse_config(f"token_cache_{name}/token_cache.path = '{folder}'")
  gin.parse_config("mixture.sources = {'token_cache_a': 2, 'token_cache_b': 6.0}")
  assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {
    'token_cache_a_tokens': 0.25,
    'token_cache_b_tokens': 0.75,
  }

  def read(count, split='train', **kwargs):
    dataset = seqio.get_dataset(
      'mixture_tokens',
      LENGTHS,
      PartiFeatureConverter(pack=False),
      dataset_split=split,
      seed=3,
      verbose=False,
      shard_info=seqio.ShardInfo(0, 1),
      **kwargs,
    )
    texts = [example['encoder_input_tokens'] for example in dataset.take(count)]
    decode = datasets.get_vocabulary().decode
    return [decode(text.numpy().tolist()) for text in texts]

  gin.parse_config('drop_text.rate = 0.0')
  found = read(400, num_epochs=None)
  assert sum(text.startswith('woman') for text in found) == 100
  for start in range(0, 396):
    assert 1 <= sum(text.startswith('fire') for text in found[start : start + 4]) <= 4
  assert sorted({len(set(found[start : start + 36])) for start in range(0, 360, 36)}) == [14]
  # Evaluation has every example, whatever the weights.
  assert sorted(read(9, 'validation', num_epochs=1)) == [
    'firefighter 0',
    'firefighter 1',
    'woman 0',
    'woman 1',
  ]
  with pytest.raises(UserError, match="mixture.sources, token_cache_a: .*no finished split 'test'"):
    read(1, 'test')
  # Each task has the metrics of a token cache.
  evaluator = seqio.Evaluator(
    'mixture_tokens',
    PartiFeatureConverter(pack=False),
    eval_split='validation',
    sequence_length=LENGTHS,
  )
  assert [task.name for task in evaluator.eval_tasks] == [
    'token_cache_a_tokens',
    'token_cache_b_tokens',
  ]


def test_a_mixture_of_tokens_of_two_tokenizers_is_refused(cache, monkeypatch):
  for name, tokenizer in (('a', 'abc'), ('b', 'xyz')):
    monkeypatch.setitem(INFO, 'tokenizer', tokenizer)
    folder = cache(6, name=name)
    gin.parse_config(f"token_cache_{name}/token_cache.path = '{folder}'")
  gin.parse_config("mixture.sources = {'token_cache_a': 1, 'token_cache_b': 1}")
  with pytest.raises(UserError, match='mixture.sources: .*token cache .*/a.*token cache .*/b'):
    seqio.get_mixture_or_task('mixture_tokens').get_dataset(LENGTHS, 'train')


def test_packing_is_refused():
  with pytest.raises(UserError, match='DatasetConfig.pack'):
    PartiFeatureConverter(pack=True, use_custom_packing_ops=False)


def test_the_evaluator_gives_captions_and_tokens_to_the_metrics(cache, monkeypatch):
  cache(5, validation=3)
  seen = {}

  def metric(targets, predictions):
    seen.update(targets=targets, predictions=predictions)
    return {'right': 1.0}

  monkeypatch.setitem(tasks._METRICS, 'openmoji_tokens', (metric, tasks.metrics.log_likelihood))
  tasks.register()
  evaluator = seqio.Evaluator(
    'openmoji_tokens',
    PartiFeatureConverter(pack=False),
    eval_split='validation',
    sequence_length=LENGTHS,
  )
  decodes = np.arange(8).reshape(2, 4)
  metrics, _ = evaluator.evaluate(
    compute_metrics=True,
    predict_fn=lambda dataset: [(i, decodes + i) for i, _ in dataset.as_numpy_iterator()],
    score_fn=lambda dataset: [(i, -4.0 * i) for i, _ in dataset.as_numpy_iterator()],
  )
  assert metrics.result() == {
    'openmoji_tokens': {'right': 1.0, 'log_likelihood': -4.0, 'log_likelihood_per_token': -1.0}
  }
  assert seen['targets'] == [
    {'caption': f'woman firefighter {i}', 'tokens': [i] * 4} for i in range(3)
  ]
  assert seen['predictions'] == [(decodes + i).tolist() for i in range(3)]
