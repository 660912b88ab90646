"""Lets these tests import `require_t5x`: pytest's importlib mode puts no folder on the path."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
