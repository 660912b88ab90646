"""The tensorflow-datasets builder of scenes, and the tasks that read it."""

import json

import gin
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import datasets
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.data import openmoji_scenes_builder
from parti_jax.data import sources
from parti_jax.data import tally
from parti_jax.data import token_cache
from parti_jax.data import views
from parti_jax.data.batches import Batches
from parti_jax.data.sources import openmoji_scenes as scenes_source

SIZE = 32
SETTINGS = openmoji_scenes.Settings(train_size=40, captions=3, seed=5)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(openmoji_scenes, 'HELD_OUT_SIZE', 6)
    folder = tmp_path_factory.mktemp('tfds')
    openmoji_scenes_builder.prepared(SETTINGS, SIZE, str(folder))
  return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(openmoji_scenes, 'HELD_OUT_SIZE', 6)


@pytest.fixture
def configured(data_dir):
  gin.parse_config(
    f"openmoji_scenes.data_dir = '{data_dir}'\nopenmoji_scenes.train_size = 40\n"
    'openmoji_scenes.captions = 3\nopenmoji_scenes.seed = 5'
  )


@pytest.mark.parametrize('split', openmoji_scenes.SPLITS)
def test_examples_are_the_scenes(data_dir, split):
  builder = openmoji_scenes_builder.at_size(SETTINGS, SIZE, str(data_dir))
  expected = {
    scene.to_json(): openmoji_grammar.captions_of(SETTINGS, split, index)
    for index, scene in enumerate(openmoji_scenes.split_scenes(split, SETTINGS))
  }
  assert len(expected) == (40 if split == 'train' else 6)
  for example in builder.as_data_source(split=split):
    text = example['scene'].decode()
    assert [caption.decode() for caption in example['captions']] == expected.pop(text)
    scene = openmoji_scenes.Scene.from_json(text)
    np.testing.assert_array_equal(example['image'], openmoji_scenes.render(scene, SIZE))
  assert not expected


def test_the_card_has_licence_and_attribution():
  info = openmoji_scenes_builder.at_size(openmoji_scenes.Settings(), 128).info
  assert info.redistribution_info.license == 'CC BY-SA 4.0'
  assert 'designed by OpenMoji' in info.description


def test_an_epoch_uses_one_caption_and_another_epoch_others(configured):
  lengths = {'inputs': 48, 'images': SIZE}
  gin.parse_config('drop_text.rate = 0')
  batches = Batches('openmoji_scenes_pairs', 'train', 40, lengths, seed=1, training=True)
  vocabulary = datasets.get_vocabulary()
  known = {
    vocabulary.decode(vocabulary.encode(caption, 48)[0]): index
    for index in range(40)
    for caption in openmoji_grammar.captions_of(SETTINGS, 'train', index)
  }
  epochs = []
  for _ in range(3):
    batch = next(batches)
    assert batch['images'].shape == (40, SIZE, SIZE, 3)
    texts = [vocabulary.decode(ids) for ids in batch['encoder_input_tokens']]
    assert sorted(known[text] for text in texts) == list(range(40))
    for text, image in zip(texts, batch['images']):
      scene = openmoji_scenes.scene('train', known[text], SETTINGS.seed)
      np.testing.assert_array_equal(image, openmoji_scenes.render(scene, SIZE))
    epochs.append({known[text]: text for text in texts})
  changed = [sum(one[i] != other[i] for i in range(40)) for one, other in zip(epochs, epochs[1:])]
  assert all(15 < count < 40 for count in changed)


@pytest.mark.parametrize('training, chosen', [(True, {0, 1, 2}), (False, {0})])
def test_seqio_tasks_choose_captions_too(configured, training, chosen):
  from parti_jax.data import tasks

  gin.parse_config('drop_text.rate = 0')
  task = tasks.get_task('openmoji_scenes_pairs', SIZE)
  lengths = {'inputs': 48, 'images': SIZE}
  vocabulary = datasets.get_vocabulary()
  number = {
    vocabulary.decode(vocabulary.encode(caption, 48)[0]): place
    for index in range(6)
    for place, caption in enumerate(openmoji_grammar.captions_of(SETTINGS, 'unseen_pairs', index))
  }
  with tally.reading(tally.Reading(drop_text=training)):
    dataset = task.get_dataset(lengths, 'unseen_pairs', num_epochs=5)
  found = [number[vocabulary.decode(example['inputs'])] for example in dataset.as_numpy_iterator()]
  assert len(found) == 30 and set(found) == chosen


def test_evaluation_uses_the_first_caption(configured):
  batches = Batches('openmoji_scenes_texts', 'validation', 6, {'inputs': 48})
  vocabulary = datasets.get_vocabulary()
  firsts = [openmoji_grammar.captions_of(SETTINGS, 'validation', index)[0] for index in range(6)]
  for _ in range(3):
    texts = [vocabulary.decode(ids) for ids in next(batches)['encoder_input_tokens']]
    assert sorted(texts) == sorted(
      vocabulary.decode(vocabulary.encode(text, 48)[0]) for text in firsts
    )


def test_captions_need_no_pictures(configured, monkeypatch):
  monkeypatch.setattr(openmoji_scenes, 'render', lambda *_: pytest.fail('drawn'))
  source = sources.configured('openmoji_scenes')
  found = list(source.captions('train'))
  assert len(found) == 120
  assert found[:3] == openmoji_grammar.captions_of(SETTINGS, 'train', 0)


def test_pictures_and_captions(configured):
  found = list(datasets.pictures_and_captions('openmoji_scenes', 'validation', SIZE))
  expected = {openmoji_grammar.captions_of(SETTINGS, 'validation', i)[0] for i in range(6)}
  assert {caption for caption, _ in found} == expected


def test_a_token_cache_keeps_all_captions(configured, tmp_path):
  prepare = views.Preparation(SIZE)
  opened = sources.configured('openmoji_scenes', SIZE).open('train')
  found = [prepare(example, 0.0) for example in opened.read(range(40))]
  assert not any(notes for _, notes in found)
  info = {'codebook_size': 8, 'image_tokens': 2, 'tokenizer': 'x'}
  examples = [(features['caption'], np.array([1, 7])) for features, _ in found]
  token_cache.write_token_cache(str(tmp_path / 'cache'), examples, info)
  gin.parse_config(f"token_cache.path = '{tmp_path}/cache'\ndrop_text.rate = 0")
  batches = Batches(
    'cached_tokens', 'train', 40, {'inputs': 48, 'targets': 2}, seed=1, training=True
  )
  vocabulary = datasets.get_vocabulary()
  first, second = (
    [vocabulary.decode(ids) for ids in next(batches)['encoder_input_tokens']] for _ in range(2)
  )
  expected = {
    vocabulary.decode(vocabulary.encode(caption, 48)[0])
    for caption in sources.configured('openmoji_scenes').captions('train')
  }
  assert set(first) | set(second) <= expected and 55 < len({*first, *second}) <= 80


def test_the_name_of_the_source():
  assert sources.kind('openmoji_scenes') == sources.kind('openmoji_scenes_b') == 'openmoji_scenes'
  assert sources.kind('openmoji_b') == 'openmoji'
  assert datasets.split_name('openmoji_scenes_images') == ('openmoji_scenes', 'images')


def test_unknown_splits(configured):
  source = scenes_source.configured()
  for split in ('test', 'train[:x%]', 'unseen'):
    with pytest.raises(UserError, match='no split'):
      source.open(split)
  assert len(sources.configured('openmoji_scenes', SIZE).open('train[:50%]')) == 20


def test_scenes_of_another_version_are_refused(data_dir, monkeypatch):
  folder = data_dir / 'openmoji_scenes' / '32_40_3_5' / '1.0.0'
  assert set(json.loads((folder / 'metadata.json').read_text())) == {'scenes', 'renderer'}
  monkeypatch.setattr(openmoji_grammar, 'digest', lambda settings: 'another')
  with pytest.raises(UserError, match='32_40_3_5.*delete this folder'):
    openmoji_scenes_builder.prepared(SETTINGS, SIZE, str(data_dir))


def test_several_captions():
  data = captions.several(['a cat', 'Käse', 'x'])
  assert captions.alternatives(data) == [b'a cat', 'Käse'.encode(), b'x']
  assert captions.clean(data) == ('a cat', ['all captions but the first left out'])
  draws = [(number + 0.5) / 997 for number in range(997)]
  chosen = [captions.choose(data, draw) for draw in draws]
  assert all(chosen.count(text) > 250 for text in captions.alternatives(data))
  assert captions.choose(b'one', 0.7) == b'one' and captions.alternatives(b'one') == [b'one']
