"""Parameters as sampling takes them: decoder layers apart, kernels of the computation's dtype.

Training keeps the layers in one array. A step that sliced them out of it would copy them all at
every position, which costs as much as the step itself; and to cut them apart in the program that
draws would hold the decoder twice.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.models import parti_config


@flax.struct.dataclass
class Parameters:
  """Parameters of Parti for sampling.

  Attributes:
    shared: all but those of the decoder's layers, a tree as of `Parti.init`.
    layers: a tree for each layer of the decoder.
  """

  shared: Any
  layers: list[Any]


def cut(config: parti_config.PartiConfig, params) -> Parameters:
  """Cuts a tree of numpy or jax arrays, of Parti and without axis names.

  Kernels that are used in `config.dtype` become of that dtype; the others, as those of the logits
  and of norms, stay what they are.
  """
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.astype(_dtype(config, path, leaf.dtype)), params
  )
  shared, stacked = _without_layers(params)
  return Parameters(
    shared,
    [
      jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
      for layer in range(config.decoder_layers)
    ],
  )


def shardings(config: parti_config.PartiConfig, stacked) -> Parameters:
  """Shardings of what `cut` returns.

  Args:
    config: sizes of the network.
    stacked: shardings of the whole parameters, see `rules.parameter_shardings`.
  """
  shared, layers = _without_layers(stacked)
  of_layer = jax.tree.map(
    lambda sharding: NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])), layers
  )
  return Parameters(shared, [of_layer] * config.decoder_layers)


def _without_layers(params):
  """Parameters without the decoder's layers, and these."""
  image_decoder = params['image_decoder']
  decoder = dict(image_decoder['decoder'])
  layers = decoder.pop('layers')
  return params | {'image_decoder': image_decoder | {'decoder': decoder}}, layers


def _dtype(config, path, dtype):
  names = [str(getattr(key, 'key', key)) for key in path]
  return config.compute_dtype if names[-1] == 'kernel' and 'logits' not in names else dtype
