"""Converts parameters for sampling: a tree per decoder layer, and kernels in another dtype.

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

from parti_jax.models import generators
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import quantization


def for_sampling(
  config: generators.Config, params: dict[str, Any], weights: str = 'float'
) -> dict[str, Any]:
  """Converts the parameters of a generator for sampling.

  Kernels that the network uses in `config.dtype` become this dtype. Other parameters, such as those
  of the logits and of norms, keep theirs. So do, with int8 weights, the kernels that `quantized`
  then rounds.

  Args:
    config: sizes of the network.
    params: a tree of NumPy, JAX or lazily read arrays, without axis names.
    weights: a name in `sampling_settings.WEIGHTS`.

  Returns:
    The tree, with a list of the parameters of each decoder layer in place of the stacked layers.
  """

  def converted(path, leaf):
    kept = weights == 'int8' and _contracted(path) is not None
    return leaf if kept else leaf.astype(_dtype(config, path, leaf.dtype))

  params = jax.tree_util.tree_map_with_path(converted, params)
  return _with_layers(params, lambda layers: layer_stack.unstacked(layers, config.decoder_layers))


def shardings(config: generators.Config, stacked: dict[str, Any]) -> dict[str, Any]:
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


def quantized(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
  """Quantizes a parameter if it is a kernel of the image-token decoder.

  The text encoder, which runs once for each batch, is not quantized.

  Args:
    path: where the parameter is in the result of `for_sampling`.
    leaf: the parameter, on the devices where its quantized form shall be, or the shape of one.

  Returns:
    A QuantizedKernel, or the unchanged parameter.
  """
  contracted = _contracted(path)
  if contracted is None:
    return leaf
  quantize = jax.jit(
    quantization.quantize,
    static_argnums=1,
    out_shardings=quantization.shardings(leaf.sharding, contracted),
  )
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return quantize.eval_shape(leaf, contracted)
  return quantize(leaf, contracted)


def _with_layers(params: dict[str, Any], change: Callable[[Any], list]) -> dict[str, Any]:
  """Applies a function to the decoder's layers in a tree."""
  image_decoder = params['image_decoder']
  decoder = image_decoder['decoder']
  decoder = decoder | {'layers': change(decoder['layers'])}
  return params | {'image_decoder': image_decoder | {'decoder': decoder}}


def _names(path) -> list[str]:
  return jax.tree_util.keystr(path, simple=True, separator='/').split('/')


def _contracted(path) -> int | None:
  """Returns the number of contracted axes of a kernel in a layer; None for what stays as it is."""
  names = _names(path)
  if names[0] != 'image_decoder' or names[-1] != 'kernel':
    return None
  # From heads and head_dim; the other projections contract embed or mlp.
  return 2 if names[-2] == 'project_out' and 'attention' in names[-3] else 1


def _dtype(config, path, dtype):
  names = _names(path)
  return config.compute_dtype if names[-1] == 'kernel' and 'logits' not in names else dtype
