"""Files of many examples, read so that a damaged one gives what can be read of it.

A reader is a generator: it takes a path and yields examples, or says with `Damaged` what it had to
leave out. Either becomes an element of a dataset, so that a damaged example keeps its place in the
order of the examples; the process whose share it falls in counts it (`preprocessors.leave_out`).
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from parti_jax import storage
from parti_jax.data import captions, packed
from parti_jax.data.quiet_tensorflow import tf

# Examples that go from Python to TensorFlow at once, which takes longer than to read one.
_CHUNK = 64
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Damaged:
  """Something that can't be read.

  Attributes:
    reason: what it is, in a few words, for the count.
    name: what it is called in its file, if it has a name.
  """

  reason: str
  name: str = ''


Reader = Callable[[str], Iterator[Mapping[str, bytes] | Damaged]]


# Else TensorFlow warns that it can't make a graph of generators.
@tf.autograph.experimental.do_not_convert
def dataset(read: Reader, file: tf.Tensor, names: Sequence[str]) -> tf.data.Dataset:
  """Reads a file.

  Args:
    read: the reader.
    file: the path or URL, tf.string [].
    names: of what its examples hold.

  Returns:
    A dataset of dicts of tf.string []: `names`, and 'problem', which is '' or says why there is no
    example, as in `described`.
  """
  names = (*names, 'problem')

  def chunks(path: bytes):
    columns, size = {name: [] for name in names}, 0
    for example in _examples(read, path.decode()):
      for name in names:
        columns[name].append(example.get(name, b''))
      size += sum(map(len, example.values()))
      if len(columns['problem']) == _CHUNK or size >= _CHUNK_BYTES:
        yield _arrays(columns)
        columns, size = {name: [] for name in names}, 0
    if columns['problem']:
      yield _arrays(columns)

  signature = {name: tf.TensorSpec([None], tf.string) for name in names}
  return tf.data.Dataset.from_generator(
      chunks, args=(file,), output_signature=signature).unbatch()


def described(reason: str, path: str) -> bytes:
  """Returns the 'problem' of an example: the reason, a tab, and the place to warn of or ''."""
  return f'{reason}\t{path}'.encode('utf-8', 'surrogateescape')


def parts(problem: bytes) -> tuple[str, str]:
  """Returns the reason and the file of which `described` has made a problem."""
  reason, _, path = problem.decode('utf-8', 'surrogateescape').partition('\t')
  return reason, path


def lines(path: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Reads a text file, plain or packed: {'caption': line}.

  Lines end at newlines alone. A file in UTF-16 or UTF-32 begins with a byte order mark.
  """
  with storage.open_file(path) as file:
    try:
      file = packed.unpacked(file, path)
      encoding = storage.encoding_of(file.peek(4)[:4])
      if encoding == 'utf-8-sig':
        yield from _lines(file, b'\n')
      else:
        text = io.TextIOWrapper(file, encoding, newline='\n')
        for line in _lines(text, '\n'):
          yield {'caption': line['caption'].encode('utf-8', 'surrogatepass')}
    except (OSError, UnicodeDecodeError):
      yield Damaged('rest of a damaged text file')


def _lines(file, newline) -> Iterator[Mapping[str, bytes | str]]:
  """Yields the lines of a binary or text file, each cut where it is too long."""
  while line := file.readline(captions.MAX_BYTES + 1):
    yield {'caption': line}
    # The rest of a line that is too long, which must not be kept in memory.
    while line and not line.endswith(newline):
      line = file.readline(captions.MAX_BYTES)


def _examples(read: Reader, path: str) -> Iterator[Mapping[str, bytes]]:
  named = set()
  try:
    for example in read(path):
      if isinstance(example, Damaged):
        yield {'problem': described(example.reason, _place(example, path, named))}
      else:
        yield example
  except OSError:
    yield {'problem': described('file that is gone or cannot be read', path)}


def _place(damaged: Damaged, path: str, named: set[str]) -> str:
  """Returns what a warning names: of several things with names in a file the first of a kind."""
  if not damaged.name:
    return path
  if damaged.reason in named:
    return ''
  named.add(damaged.reason)
  return f'{path}, {damaged.name!r}'


def _arrays(columns: Mapping[str, list[bytes]]) -> dict[str, np.ndarray]:
  # As objects, since numpy's strings lose zeros at their end.
  return {name: np.array(values, object) for name, values in columns.items()}
