"""seqio preprocessors: decode the picture, tokenise the caption, drop text for guidance.

They start from examples {'picture': encoded bytes, 'caption': text, 'problem': text} as the sources
give them. An example that can't be used is left out and counted (see `tally`).

The first one numbers the examples. What is random about an example follows from its number, so that
reading may start at any of them and need not decode those before.
"""

import gin
import numpy as np

from parti_jax.data import captions, decoding, example_files, tally
from parti_jax.data.quiet_tensorflow import seqio, tf
from parti_jax.data.vocabulary import EOS_ID, TextVocabulary
from parti_jax.errors import UserError


@seqio.map_over_dataset(num_seeds=1)
def _with_seed(numbered, seed):
  number, example = numbered
  return {**example, 'number': number, 'seed': tf.stack(seed)}


def number(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Adds 'number', int64 [], from 0 in the order of reading, and 'seed', int64 [2], of its own.

  Starts where the reading does (see `tally.Reading`): what comes before is read, but not decoded.
  """
  return _with_seed(dataset.enumerate()).skip(tally.current().start)


def leave_out(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Leaves out and counts what a source could not read, and takes the feature 'problem' away.

  Args:
    dataset: of examples with 'number', and 'problem', tf.string []: '' or as
      `example_files.described` has it.

  Returns:
    The dataset without 'problem'.
  """
  skipped = tally.current().skipped

  def count(problem: bytes, number: int):
    reason, place = example_files.parts(problem)
    skipped.add(reason, number, place)
    return False

  def usable(example):
    problem = example['problem']
    # Python is asked about damaged examples alone.
    return tf.cond(
        problem == '', lambda: True,
        lambda: tf.ensure_shape(
            tf.numpy_function(count, [problem, example['number']], tf.bool), []))

  return dataset.filter(usable).map(
      lambda example: {name: value for name, value in example.items() if name != 'problem'})


def decode_images(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
  """Replaces 'picture' by 'images', uint8 [size, size, 3] with size = sequence_length['images']."""
  size = sequence_length['images']
  reading, decode_and_note = tally.current(), decoding.configured()

  def decode(data: bytes, number: int):
    try:
      image, notes = decode_and_note(data, size)
    except decoding.UndecodablePicture as error:
      reading.skipped.add(str(error), number)
      return np.zeros([size, size, 3], np.uint8), False
    for note in notes:
      reading.shortened.add(note, number)
    return image, True

  def convert(example):
    picture = example.pop('picture')
    image, usable = tf.numpy_function(
        decode, [picture, example['number']], [tf.uint8, tf.bool], stateful=False)
    return {**example, 'images': tf.ensure_shape(image, [size, size, 3])}, usable

  return _map_and_filter(dataset, convert)


def tokenize_captions(
    dataset: tf.data.Dataset, sequence_length, vocabulary: TextVocabulary, keep: bool = False
) -> tf.data.Dataset:
  """Replaces 'caption' by 'inputs', int32 [text_length] with length sequence_length['inputs'].

  Examples whose caption can't be used are left out, see `captions.clean`. Captions that are longer
  than the text length are cut, and counted as shortened, as are those from which something was
  taken out.

  Args:
    dataset: examples with 'caption' and 'number'.
    sequence_length: seqio's feature lengths.
    vocabulary: makes ids of texts.
    keep: whether the cleaned text stays as 'inputs_pretokenized', tf.string [].

  Returns:
    The dataset without 'caption'.
  """
  length = sequence_length['inputs']
  reading = tally.current()

  def encode(caption: bytes, number: int):
    try:
      text, changes = captions.clean(caption)
      ids, cut = vocabulary.encode(text, length)
      if ids[0] == EOS_ID and not cut:
        # Of what the vocabulary does not keep; it would look like the text that guidance drops.
        raise captions.UnusableCaption('no caption')
    except captions.UnusableCaption as error:
      reading.skipped.add(str(error), number)
      return np.zeros([length], np.int32), b'', False
    for change in changes + ([f'caption cut to {length} tokens'] if cut else []):
      reading.shortened.add(change, number)
    return ids, text.encode(), True

  def convert(example):
    caption = example.pop('caption')
    ids, text, usable = tf.numpy_function(
        encode, [caption, example['number']], [tf.int32, tf.string, tf.bool], stateful=False)
    kept = {'inputs_pretokenized': tf.ensure_shape(text, [])} if keep else {}
    return {**example, **kept, 'inputs': tf.ensure_shape(ids, [length])}, usable

  return _map_and_filter(dataset, convert)


@gin.configurable
def drop_text(
    dataset: tf.data.Dataset, sequence_length, vocabulary: TextVocabulary, rate: float = 0.1
) -> tf.data.Dataset:
  """Replaces the text of some examples by the empty text, for classifier-free guidance.

  The paper drops it for 10% of the training examples (section 3). Which ones follows from the
  seed of the dataset.

  Args:
    dataset: examples with 'inputs', int32 [text_length], and 'seed' of `number`.
    sequence_length: seqio's feature lengths.
    vocabulary: tells what the empty text looks like.
    rate: share of the examples that lose their text, 0 to 1.

  Returns:
    The dataset with the same features.

  Raises:
    UserError: if the rate is no such number.
  """
  if type(rate) not in (int, float) or not 0 <= rate <= 1:
    raise UserError(f'drop_text.rate={rate!r} must be a number from 0 to 1')
  if not tally.current().drop_text or rate == 0:
    return dataset
  empty, _ = vocabulary.encode('', sequence_length['inputs'])

  def drop(example):
    dropped = tf.random.stateless_uniform([], example['seed']) < rate
    return {**example, 'inputs': tf.where(dropped, empty, example['inputs'])}

  return dataset.map(drop, num_parallel_calls=tf.data.AUTOTUNE)


def _map_and_filter(dataset: tf.data.Dataset, convert) -> tf.data.Dataset:
  """Applies `convert`, which gives an example and whether it can be used, and keeps the usable."""
  converted = dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return converted.filter(lambda _, usable: usable).map(lambda example, _: example)
