"""The shapes of a network's parameters, kept between starts: tracing a network to find them is slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jaxtyping import PyTree

from parti_jax.core import start_cache
from parti_jax.exported_model import parameter_files


def of(name: str, config: Any, abstract: Callable[[str, Any], PyTree]) -> PyTree:
  """Returns a tree of jax.ShapeDtypeStruct, the parameters of a network.

  Args:
    name: the network's name in `model_folder.NETWORKS`.
    config: the network's config.
    abstract: traces the network, given the name and the config, if no earlier start has done so.
  """
  key = None
  if start_cache.is_package_code(config):
    key = start_cache.key('shapes', name, type(config), config)
  shapes = None if key is None else _decoded(start_cache.read(key))
  if shapes is None:
    shapes = parameter_files.shapes(abstract(name, config))
    if key is not None:
      start_cache.write(key, json.dumps(shapes).encode())
  structs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
  return flax.traverse_util.unflatten_dict(structs, sep='/')


def _decoded(content: bytes | None) -> dict[str, tuple[int, ...]] | None:
  """Returns the shapes in an entry of the cache; None if there are none."""
  try:
    found = json.loads(content or b'null')
    return {path: tuple(map(int, shape)) for path, shape in found.items()}
  except (ValueError, TypeError, AttributeError):
    return None
