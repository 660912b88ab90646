"""What the tests against the original libraries share."""

import pytest


@pytest.fixture(autouse=True)
def _gradients():
  """Turns gradients of PyTorch on, which min-dalle turns off when it is imported."""
  torch = pytest.importorskip('torch')
  with torch.set_grad_enabled(True):
    yield
