"""Reads tar shards of samples: files of the same name and different endings.

img2dataset writes 000000012.jpg, 000000012.txt and 000000012.json one after another.
"""

import json
import os
import tarfile
from collections.abc import Iterator

from absl import logging

from parti_jax.data import tally
from parti_jax.data.quiet_tensorflow import tf

_PICTURE_ENDINGS = ('jpg', 'jpeg', 'png', 'webp', 'gif')


def dataset(file: tf.Tensor, caption_key: str) -> tf.data.Dataset:
  """Reads a shard.

  Args:
    file: its path, tf.string [].
    caption_key: the key of the caption in a sample's .json file, used where it has no .txt file.

  Returns:
    A dataset of {'picture', 'caption'}, both tf.string []. A sample without one of them has the
    empty string there. A shard that breaks off gives the samples before the break; a warning
    names it and it is counted as skipped.
  """
  skipped = tally.current().skipped
  text = tf.TensorSpec([], tf.string)

  def samples(path: bytes):
    yield from _samples(path.decode(), caption_key, skipped)

  return tf.data.Dataset.from_generator(
      samples, args=(file,), output_signature={'picture': text, 'caption': text}
  )


def _samples(path: str, caption_key: str, skipped: tally.Tally) -> Iterator[dict[str, bytes]]:
  """Yields the samples of a shard."""
  sample, current = {}, None
  try:
    with tf.io.gfile.GFile(path, 'rb') as file, tarfile.open(fileobj=file, mode='r|*') as shard:
      for member in shard:
        if not member.isfile():
          continue
        folder, base = os.path.split(member.name)
        name, _, ending = base.partition('.')
        if (folder, name) != current:
          if sample:
            yield _as_example(sample, caption_key)
          sample, current = {}, (folder, name)
        sample[ending.lower()] = shard.extractfile(member).read()
  except (tarfile.TarError, EOFError, OSError, tf.errors.OpError) as error:
    logging.warning('The tar shard %s breaks off: %s', path, error)
    skipped.add('rest of a damaged tar shard')
    # The last sample may lack files that come after the break.
    sample = {}
  if sample:
    yield _as_example(sample, caption_key)


def _as_example(sample: dict[str, bytes], caption_key: str) -> dict[str, bytes]:
  picture = next((sample[ending] for ending in _PICTURE_ENDINGS if ending in sample), b'')
  return {'picture': picture, 'caption': _caption(sample, caption_key)}


def _caption(sample: dict[str, bytes], caption_key: str) -> bytes:
  """Returns the caption of a sample, b'' where it has none."""
  if 'txt' in sample:
    return sample['txt']
  try:
    caption = json.loads(sample.get('json', b'{}')).get(caption_key)
  except (ValueError, AttributeError):
    return b''
  return caption.encode() if isinstance(caption, str) else b''
