"""Reads the manifests: names and shapes of the arrays in published files."""

import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'manifests'


class Listed(NamedTuple):
  """An array of which only the shape is known."""

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)

  def read(self):
    raise AssertionError('the values of a manifest were read')


def read(name):
  """The config and the arrays of a manifest, in which `{0..11}` stands for twelve layers."""
  manifest = json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))
  arrays = {}
  for template, shape in manifest['arrays'].items():
    layers = re.search(r'\{0\.\.(\d+)\}', template)
    for layer in range(int(layers[1]) + 1 if layers else 1):
      arrays[template.replace(layers[0], str(layer)) if layers else template] = Listed(tuple(shape))
  return manifest['settings'], arrays
