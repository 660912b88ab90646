"""OpenMoji's names and scenes as one mixture: its shares, both readers, and what stays held out."""

import itertools
import types

import gin
import numpy as np
import pytest
import seqio

from parti_jax.core import gin_config
from parti_jax.data import captions as captions_lib
from parti_jax.data import datasets
from parti_jax.data import openmoji
from parti_jax.data import openmoji_builder
from parti_jax.data import openmoji_scenes
from parti_jax.data import sources
from parti_jax.data import tasks
from parti_jax.data import token_cache
from parti_jax.data.batches import Batches

FILE = 'gin_configs/tasks/openmoji_names_and_scenes.gin'
SIZE, TEXT = 16, 40
LENGTHS = {
  'mixture_images': {'images': SIZE},
  'mixture_pairs': {'inputs': TEXT, 'images': SIZE},
  'mixture_texts': {'inputs': TEXT},
  'mixture_tokens': {'inputs': TEXT, 'targets': 4},
}


@pytest.fixture(name='few', scope='module')
def _few(tmp_path_factory):
  """A folder with few pictures of both data sets, at `SIZE`."""
  pictures = openmoji.pictures()
  some = [
    picture
    for split in openmoji.SPLITS
    for picture in [found for found in pictures if found.split == split][:8]
  ]
  # Of the builder alone: others keep what they know of all pictures.
  stand_in = types.SimpleNamespace(
    **{
      **vars(openmoji),
      'pictures': lambda: some,
      'pixels_digest': lambda: openmoji.PIXELS_DIGEST,
    }
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(openmoji_builder, 'openmoji', stand_in)
    patch.setattr(openmoji_scenes, 'HELD_OUT_SIZE', 3)
    yield str(tmp_path_factory.mktemp('few'))


@pytest.fixture(name='mixture')
def _mixture(few, tmp_path):
  """The gin file, with few pictures, few captions and a token cache of each data set."""
  bindings = [f'{name}.data_dir = {few!r}' for name in ('openmoji', 'openmoji_scenes')]
  for index, name in enumerate(('names', 'scenes')):
    folder = str(tmp_path / name)
    info = {'codebook_size': 64, 'image_tokens': 4, 'tokenizer': 'f' * 16}
    examples = [(f'{name} {number}', np.full(4, 30 * index + number)) for number in range(8)]
    token_cache.write_token_cache(folder, examples, info)
    bindings.append(f'token_cache_{name}/token_cache.path = {folder!r}')
  gin_config.parse([FILE], [*bindings, 'openmoji.captions = 6', 'openmoji_scenes.train_size = 12'])


def _set(bindings):
  with gin.unlock_config():
    gin.parse_config(bindings)


def _of_tokens(task):
  if task == 'mixture_tokens':
    _set("mixture.sources = {'token_cache_names': %NAMES_RATE, 'token_cache_scenes': %SCENES_RATE}")


@pytest.mark.parametrize('task', LENGTHS)
def test_every_batch_has_both_by_their_rates(mixture, task):
  _of_tokens(task)
  batches = Batches(task, 'train', 5, LENGTHS[task], seed=1, training=True)
  for number in range(1, 7):
    batch = next(batches)
    seen = {'scenes' in name: count for name, count in batches.state()['seen'].items()}
    assert seen == {False: 2 * number, True: 3 * number}
  if 'images' in LENGTHS[task]:
    assert batch['images'].shape == (5, SIZE, SIZE, 3) and batch['images'].std() > 0
  if 'inputs' in LENGTHS[task]:
    assert batch['encoder_input_tokens'].shape == (5, TEXT)
  _set('NAMES_RATE = 1.0\nSCENES_RATE = 0.25')
  batches = Batches(task, 'train', 5, LENGTHS[task], seed=1, training=True)
  next(batches)
  assert sorted(batches.state()['seen'].values()) == [1, 4]


@pytest.mark.parametrize('task', ['mixture_images', 'mixture_pairs', 'mixture_tokens'])
def test_seqio_reads_the_same_examples(mixture, task):
  _of_tokens(task)
  lengths = LENGTHS[task]
  found = seqio.get_mixture_or_task(tasks.get_task(task, SIZE).name).get_dataset(
    lengths, 'train', seed=2, num_epochs=1
  )
  theirs = list(found.as_numpy_iterator())
  ours = list(
    itertools.chain.from_iterable(
      _examples(batch) for batch in Batches(task, 'train', 4, lengths, num_epochs=1)
    )
  )
  assert len(theirs) == len(ours) == (16 if task == 'mixture_tokens' else 20)
  name = 'targets' if 'targets' in lengths else 'images'
  key = {'targets': 'decoder_target_tokens'}.get(name, name)
  of = lambda examples, key: sorted(np.asarray(each[key], np.int32).tobytes() for each in examples)
  assert of(theirs, name) == of(ours, key)


def _examples(batch):
  return [dict(zip(batch, row)) for row in zip(*batch.values())]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_no_other_split_is_read(mixture, split):
  vocabulary = datasets.get_vocabulary()
  batches = Batches('mixture_texts', split, 8, LENGTHS['mixture_texts'], num_epochs=1)
  found = {vocabulary.decode(row) for batch in batches for row in batch['encoder_input_tokens']}
  shown = lambda caption: vocabulary.decode(vocabulary.encode(caption, TEXT)[0])
  of_split = lambda source, name: {
    shown(caption.decode())
    for example in source.examples(name, pictures=False)
    for caption in captions_lib.alternatives(example['caption'])[:1]
  }
  both = [sources.configured(name) for name in ('openmoji', 'openmoji_scenes')]
  assert found == of_split(both[0], split) | of_split(both[1], split)
  held_out = of_split(both[0], 'unseen_combinations')
  assert held_out and not found & held_out
