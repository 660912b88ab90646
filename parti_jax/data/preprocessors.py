"""seqio preprocessors; each calls the step of `examples` for one example.

They start from the examples of `seqio_source`: {'picture': encoded bytes, 'caption': text,
'problem': text}. Unusable examples are skipped and counted by `tally`.

The first preprocessor numbers the examples, because their random numbers depend on the position.
"""

import numpy as np

from parti_jax.core import image_sizes
from parti_jax.data import captions
from parti_jax.data import examples
from parti_jax.data import image_decoding
from parti_jax.data import order
from parti_jax.data import seqio_source
from parti_jax.data import tally
from parti_jax.data import text_tokenizer
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf


@seqio.map_over_dataset(num_seeds=1)
def _with_seed(numbered, seed):
  number_, example = numbered
  return {**example, 'number': number_, 'seed': tf.stack(seed)}


def number(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Adds 'number', int64 [], counting from 0 in reading order, and 'seed', int64 [2]."""
  return _with_seed(dataset.enumerate())


def leave_out(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Skips and counts examples that a source could not read, and removes the feature 'problem'.

  Args:
    dataset: examples with 'problem', tf.string []: '', or a problem from `seqio_source.described`.

  Returns:
    The dataset without 'problem'.
  """
  skipped = tally.current().skipped

  def count(problem: bytes):
    reason, location = seqio_source.parts(problem)
    skipped.add(reason, location)
    return False

  def usable(example):
    problem = example['problem']
    # Calls Python only for damaged examples.
    return tf.cond(
      problem == '',
      lambda: True,
      lambda: tf.ensure_shape(tf.numpy_function(count, [problem], tf.bool), []),
    )

  return dataset.filter(usable).map(
    lambda example: {name: value for name, value in example.items() if name != 'problem'}
  )


def decode_images(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Replaces 'picture' by 'images', uint8 [height, width, 3] of the size sequence_length['images']."""
  size = sequence_length['images']
  shape = [*image_sizes.sides(size), 3]
  reading, decode_and_note = tally.current(), image_decoding.configured()

  def decode(data: bytes):
    try:
      image, notes = decode_and_note(data, size)
    except image_decoding.UndecodablePicture as error:
      reading.skipped.add(str(error))
      return np.zeros(shape, np.uint8), False
    for note in notes:
      reading.shortened.add(note)
    return image, True

  def convert(example):
    picture = example.pop('picture')
    image, usable = tf.numpy_function(decode, [picture], [tf.uint8, tf.bool], stateful=False)
    return {**example, 'images': tf.ensure_shape(image, shape)}, usable

  return _map_and_filter(dataset, convert)


def tokenize_captions(
  dataset: tf.data.Dataset,
  sequence_length,
  vocabulary: text_tokenizer.TextTokenizer,
  keep: bool = False,
) -> tf.data.Dataset:
  """Replaces 'caption' by 'inputs', int32 [text_length] with length sequence_length['inputs'].

  Args:
    dataset: examples with 'caption', and 'number' and 'seed' of `number`, which choose one of several
      captions if the reader trains; otherwise the first is used.
    sequence_length: seqio's feature lengths.
    vocabulary: the text vocabulary.
    keep: whether to keep the cleaned text as 'inputs_pretokenized', tf.string [].

  Returns:
    The dataset without 'caption', and without the examples whose caption
    `examples.caption_ids` rejects.
  """
  length = sequence_length['inputs']
  reading = tally.current()

  def encode(caption: bytes, number_: int, seed: np.ndarray):
    caption = captions.choose(caption, _draw(number_, seed) if reading.drop_text else 0.0)
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
      encode,
      [caption, example['number'], example['seed']],
      [tf.int32, tf.string, tf.bool],
      stateful=False,
    )
    kept = {'inputs_pretokenized': tf.ensure_shape(text, [])} if keep else {}
    return {**example, **kept, 'inputs': tf.ensure_shape(ids, [length])}, usable

  return _map_and_filter(dataset, convert)


def _draw(number_: int, seed: np.ndarray) -> np.float64:
  """Returns the random number of an example, from what `number` added to it."""
  mixed = order.mixed(0, 'draws', *map(int, seed.astype(np.uint64)))
  return examples.draws(mixed, int(number_), 1)[0]


def drop_text(
  dataset: tf.data.Dataset, sequence_length, vocabulary: text_tokenizer.TextTokenizer
) -> tf.data.Dataset:
  """Replaces the text of some examples by the empty text, at the rate `examples.drop_rate`.

  The choice depends on the seed of the dataset and the numbers of the examples.

  Args:
    dataset: examples with 'inputs', int32 [text_length], and 'number' and 'seed' of `number`.
    sequence_length: seqio's feature lengths.
    vocabulary: encodes the empty text.

  Returns:
    The dataset with the same features.
  """
  rate = examples.drop_rate()
  if not tally.current().drop_text or rate == 0:
    return dataset
  empty = examples.empty_text(vocabulary, sequence_length['inputs'])

  def drop(example):
    drawn = tf.numpy_function(_draw, [example['number'], example['seed']], tf.float64)
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
  """Applies `convert`, which returns an example and whether it is usable, and keeps the usable."""
  converted = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return converted.filter(lambda _, usable: usable).map(lambda example, _: example)
