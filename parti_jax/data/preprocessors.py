"""seqio preprocessors: each calls the step of `examples` for one example.

They start from examples {'picture': encoded bytes, 'caption': text, 'problem': text} as
`seqio_source` gives them. An example that can't be used is left out and counted (see `tally`).

The first one numbers the examples, since what is random about an example follows from its number.
"""

import numpy as np

from parti_jax.data import captions
from parti_jax.data import examples
from parti_jax.data import image_decoding
from parti_jax.data import order
from parti_jax.data import seqio_source
from parti_jax.data import tally
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf
from parti_jax.data.vocabulary import TextVocabulary


@seqio.map_over_dataset(num_seeds=1)
def _with_seed(numbered, seed):
  number_, example = numbered
  return {**example, 'number': number_, 'seed': tf.stack(seed)}


def number(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Adds 'number', int64 [], from 0 in the order of reading, and 'seed', int64 [2]."""
  return _with_seed(dataset.enumerate())


def leave_out(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Leaves out and counts what a source could not read, and takes the feature 'problem' away.

  Args:
    dataset: of examples with 'problem', tf.string []: '' or as `seqio_source.described` has it.

  Returns:
    The dataset without 'problem'.
  """
  skipped = tally.current().skipped

  def count(problem: bytes):
    reason, place = seqio_source.parts(problem)
    skipped.add(reason, place)
    return False

  def usable(example):
    problem = example['problem']
    # Python is asked about damaged examples alone.
    return tf.cond(
      problem == '',
      lambda: True,
      lambda: tf.ensure_shape(tf.numpy_function(count, [problem], tf.bool), []),
    )

  return dataset.filter(usable).map(
    lambda example: {name: value for name, value in example.items() if name != 'problem'}
  )


def decode_images(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Replaces 'picture' by 'images', uint8 [size, size, 3] with size = sequence_length['images']."""
  size = sequence_length['images']
  reading, decode_and_note = tally.current(), image_decoding.configured()

  def decode(data: bytes):
    try:
      image, notes = decode_and_note(data, size)
    except image_decoding.UndecodablePicture as error:
      reading.skipped.add(str(error))
      return np.zeros([size, size, 3], np.uint8), False
    for note in notes:
      reading.shortened.add(note)
    return image, True

  def convert(example):
    picture = example.pop('picture')
    image, usable = tf.numpy_function(decode, [picture], [tf.uint8, tf.bool], stateful=False)
    return {**example, 'images': tf.ensure_shape(image, [size, size, 3])}, usable

  return _map_and_filter(dataset, convert)


def tokenize_captions(
  dataset: tf.data.Dataset, sequence_length, vocabulary: TextVocabulary, keep: bool = False
) -> tf.data.Dataset:
  """Replaces 'caption' by 'inputs', int32 [text_length] with length sequence_length['inputs'].

  Args:
    dataset: examples with 'caption'.
    sequence_length: seqio's feature lengths.
    vocabulary: makes ids of texts.
    keep: whether the cleaned text stays as 'inputs_pretokenized', tf.string [].

  Returns:
    The dataset without 'caption', and without the examples whose caption can't be used; see
    `examples.caption_ids`.
  """
  length = sequence_length['inputs']
  reading = tally.current()

  def encode(caption: bytes):
    try:
      ids, text, changes = examples.caption_ids(caption, vocabulary, length)
    except captions.UnusableCaption as error:
      reading.skipped.add(str(error))
      return np.zeros([length], np.int32), b'', False
    for change in changes:
      reading.shortened.add(change)
    return ids, text.encode(), True

  def convert(example):
    caption = example.pop('caption')
    ids, text, usable = tf.numpy_function(
      encode, [caption], [tf.int32, tf.string, tf.bool], stateful=False
    )
    kept = {'inputs_pretokenized': tf.ensure_shape(text, [])} if keep else {}
    return {**example, **kept, 'inputs': tf.ensure_shape(ids, [length])}, usable

  return _map_and_filter(dataset, convert)


def drop_text(
  dataset: tf.data.Dataset, sequence_length, vocabulary: TextVocabulary
) -> tf.data.Dataset:
  """Replaces the text of some examples by the empty text, see `examples.drop_rate`.

  Which ones follows from the seed of the dataset and from their numbers.

  Args:
    dataset: examples with 'inputs', int32 [text_length], and 'number' and 'seed' of `number`.
    sequence_length: seqio's feature lengths.
    vocabulary: tells what the empty text looks like.

  Returns:
    The dataset with the same features.
  """
  rate = examples.drop_rate()
  if not tally.current().drop_text or rate == 0:
    return dataset
  empty = examples.empty_text(vocabulary, sequence_length['inputs'])

  def draw(number_: int, seed: np.ndarray):
    mixed = order.mixed(0, 'draws', *map(int, seed.astype(np.uint64)))
    return examples.draws(mixed, int(number_), 1)[0]

  def drop(example):
    drawn = tf.numpy_function(draw, [example['number'], example['seed']], tf.float64)
    return {
      **example,
      'inputs': tf.where(tf.ensure_shape(drawn, []) < rate, empty, example['inputs']),
    }

  return dataset.map(drop, num_parallel_calls=tf.data.AUTOTUNE)


def rename_tokens(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Renames 'tokens', int32 [image_tokens], to 'targets'."""
  return dataset.map(
    lambda example: {
      'targets' if name == 'tokens' else name: value for name, value in example.items()
    }
  )


def _map_and_filter(dataset: tf.data.Dataset, convert) -> tf.data.Dataset:
  """Applies `convert`, which gives an example and whether it can be used, and keeps the usable."""
  converted = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return converted.filter(lambda _, usable: usable).map(lambda example, _: example)
