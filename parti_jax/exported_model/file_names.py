"""Names of the files of a model folder; doesn't import JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG_FILE = 'config.json'
VOCABULARY_FILE = 'vocabulary.model'


def parameter_file(name: str) -> str:
  """Returns the name of the file with the parameters of a network."""
  return f'{name}.safetensors'


def vocabulary_file(name: str) -> str:
  """Returns the name of the file with the text tokenizer that only this network uses."""
  return f'{name}_vocabulary.model'


def inputs_entry(name: str) -> str:
  """Returns the name of config.json's entry on how the inputs of a network are made."""
  return f'{name}_inputs'


def stored_name(name: str, config: Mapping[str, Any]) -> str:
  """Returns a network's name in config.json and in the name of its parameter file.

  Args:
    name: the network's name.
    config: the content of config.json.
  """
  # Version 1 of the format called the generator 'parti'.
  return 'parti' if name == 'generator' and config.get('format_version') == 1 else name
