"""Decoders and parsers under mutated input: they return or raise their one error, nothing else.

The corpus in `corpus/TARGET/` was found by atheris (see `run_atheris.py`) and is tried again here.
"""

import importlib.util
import pathlib
import resource
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

FOLDER = pathlib.Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location('fuzz_targets', FOLDER / 'fuzz_targets.py')
fuzz_targets = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz_targets)

_PLACE = st.floats(0, 1, exclude_max=True)
# Where, how many bytes are replaced, and by what.
_EDIT = st.tuples(_PLACE, st.integers(0, 40) | st.just(4000), st.binary(max_size=12))


@st.composite
def mutated(draw, name):
  """An example with up to four changes, or anything at all."""
  data = draw(st.sampled_from(fuzz_targets.EXAMPLES[name]))
  for place, removed, added in draw(st.lists(_EDIT, max_size=4)):
    start = int(place * len(data))
    data = data[:start] + added + data[start + removed :]
  return data


def _search(name, examples, derandomize):
  @hypothesis.settings(
    max_examples=examples,
    deadline=None,
    database=None,
    derandomize=derandomize,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(mutated(name) | st.binary(max_size=200))
  def run(data):
    fuzz_targets.TARGETS[name](data)

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Pillow's, of EXIF.
    run()


@pytest.mark.parametrize('name', fuzz_targets.TARGETS)
def test_mutated_input(name):
  _search(name, 60, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', fuzz_targets.TARGETS)
def test_much_mutated_input(name):
  """Shows that thousands of random mutations find nothing, in bounded memory."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  _search(name, 5000, derandomize=False)
  # KiB: one picture of the most pixels, several times.
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.mark.parametrize('name', fuzz_targets.TARGETS)
def test_corpus(name):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    for path in sorted((FOLDER / 'corpus' / name).glob('*')):
      fuzz_targets.TARGETS[name](path.read_bytes())
    for data in fuzz_targets.EXAMPLES[name]:
      fuzz_targets.TARGETS[name](data)


def test_the_corpus_is_small_and_of_known_targets():
  folders = {path.name for path in (FOLDER / 'corpus').iterdir()}
  assert folders <= set(fuzz_targets.TARGETS) and {'picture', 'tar', 'tfrecord'} <= folders
  assert sum(path.stat().st_size for path in (FOLDER / 'corpus').rglob('*')) < 200_000
