"""TFRecords of tf.train.Example, written without TensorFlow.

test_seqio_tasks.py compares them with those that TensorFlow writes.
"""

import struct

import google_crc32c
from tensorflow_datasets.proto import tf_example_generated_pb2


def example(**features) -> bytes:
  """Returns a serialised tf.train.Example.

  Args:
    **features: values of each feature, a list of bytes, ints or floats; [] for a feature that has
      no kind. A single `bytes` stands for a list of one.
  """
  message = tf_example_generated_pb2.Example()
  for name, values in features.items():
    values = [values] if isinstance(values, bytes) else values
    feature = message.features.feature[name]
    if not values:
      continue
    kind = {bytes: 'bytes_list', int: 'int64_list', float: 'float_list'}[type(values[0])]
    getattr(feature, kind).value.extend(values)
  return message.SerializeToString()


def framed(records) -> bytes:
  """Returns the content of a TFRecord file."""
  return b''.join(
    part + masked_checksum(part)
    for record in records
    for part in (struct.pack('<Q', len(record)), record)
  )


def masked_checksum(data: bytes) -> bytes:
  """Returns the checksum that follows a length or a record."""
  crc = google_crc32c.value(data)
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
