"""Converts parameters for sampling: a tree per decoder layer, and kernels in the compute dtype.

Training stacks the layers in one array. Slicing them out of it would copy them at every position,
which costs as much as the step itself. Slicing them within the compiled program would hold the
decoder in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.models import parti_config
from parti_jax.models.nn import layer_stack


def for_sampling(config: parti_config.PartiConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Converts the parameters of `Parti` for sampling.

  Kernels that the network uses in `config.dtype` become this dtype. Other parameters, such as those
  of the logits and of norms, keep theirs.

  Args:
    config: sizes of the network.
    params: a tree of NumPy or JAX arrays, without axis names.

  Returns:
    The tree, with a list of the parameters of each decoder layer in place of the stacked layers.
  """
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.astype(_dtype(config, path, leaf.dtype)), params
  )
  return _with_layers(params, lambda layers: layer_stack.unstacked(layers, config.decoder_layers))


def shardings(config: parti_config.PartiConfig, stacked: dict[str, Any]) -> dict[str, Any]:
  """Returns the shardings of the result of `for_sampling`.

  Args:
    config: sizes of the network.
    stacked: shardings of the original parameters, the result of `rules.parameter_shardings`.
  """

  def of_each(layers):
    of_layer = jax.tree.map(
      lambda sharding: NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])), layers
    )
    return [of_layer] * config.decoder_layers

  return _with_layers(stacked, of_each)


def _with_layers(params: dict[str, Any], change: Callable[[Any], list]) -> dict[str, Any]:
  """Applies a function to the decoder's layers in a tree."""
  image_decoder = params['image_decoder']
  decoder = image_decoder['decoder']
  decoder = decoder | {'layers': change(decoder['layers'])}
  return params | {'image_decoder': image_decoder | {'decoder': decoder}}


def _dtype(config, path, dtype):
  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  return config.compute_dtype if names[-1] == 'kernel' and 'logits' not in names else dtype
