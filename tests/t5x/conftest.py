"""Lets these tests import `require_t5x`, and gives each of them tasks that are not created yet."""

import pathlib
import sys

import pytest

# pytest's importlib mode puts no folder on the path.
sys.path.append(str(pathlib.Path(__file__).parent))


@pytest.fixture(autouse=True)
def lazy_tasks():
  """Registers our tasks again: seqio's registry would keep those of the test before, with their data."""
  from parti_jax.t5x import tasks

  tasks.register()
