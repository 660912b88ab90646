"""Names of the files of a model folder; doesn't import JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parti_jax.data import text_tokenizer

CONFIG_FILE = 'config.json'
VOCABULARY_FILE = text_tokenizer.FILE_NAME


def parameter_file(name: str) -> str:
  """Returns the name of the file with the parameters of a network."""
  return f'{name}.safetensors'


def stored_name(name: str, config: Mapping[str, Any]) -> str:
  """Returns a network's name in config.json and in the name of its parameter file.

  Args:
    name: the network's name.
    config: the content of config.json.
  """
  # Version 1 of the format called the generator 'parti'.
  return 'parti' if name == 'generator' and config.get('format_version') == 1 else name
