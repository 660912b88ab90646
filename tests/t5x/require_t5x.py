"""Skips a module of tests where t5x is absent; to be imported before t5x."""

import pytest
import tried_t5x

pytest.importorskip(
  't5x.models', reason='t5x is not installed; docs/t5x.md says how. ' + tried_t5x.SENTENCE
)
