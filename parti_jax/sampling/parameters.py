"""Parameters as sampling takes them: decoder layers apart, kernels of the computation's dtype.

Training keeps the layers in one array. A step that sliced them out of it would copy them all at
every position, which costs as much as the step itself; and to cut them apart in the program that
draws would hold the decoder twice.
"""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.models import parti_config
from parti_jax.models.nn import layer_stack


def cut(config: parti_config.PartiConfig, params):
  """Cuts a tree of numpy or jax arrays, of Parti and without axis names.

  Kernels that are used in `config.dtype` become of that dtype; the others, as those of the logits
  and of norms, stay what they are.

  Returns:
    The tree with, in place of the decoder's stacked layers, a list of each layer's parameters.
  """
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.astype(_dtype(config, path, leaf.dtype)), params
  )
  return _with_layers(params, lambda layers: layer_stack.unstacked(layers, config.decoder_layers))


def shardings(config: parti_config.PartiConfig, stacked):
  """Shardings of what `cut` returns.

  Args:
    config: sizes of the network.
    stacked: shardings of the whole parameters, see `rules.parameter_shardings`.
  """

  def of_each(layers):
    of_layer = jax.tree.map(
      lambda sharding: NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])), layers
    )
    return [of_layer] * config.decoder_layers

  return _with_layers(stacked, of_each)


def _with_layers(params, change):
  """The tree with the decoder's layers changed by a function."""
  image_decoder = params['image_decoder']
  decoder = image_decoder['decoder']
  decoder = decoder | {'layers': change(decoder['layers'])}
  return params | {'image_decoder': image_decoder | {'decoder': decoder}}


def _dtype(config, path, dtype):
  names = [str(getattr(key, 'key', key)) for key in path]
  return config.compute_dtype if names[-1] == 'kernel' and 'logits' not in names else dtype
