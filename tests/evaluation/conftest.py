"""Lets these tests import their fakes: pytest's importlib mode doesn't add folders to the path."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
