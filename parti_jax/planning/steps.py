"""The steps that a run's gin files describe, ready to be lowered for any devices."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jax.experimental import layout
from jax.sharding import NamedSharding

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.exported_model import model_folder
from parti_jax.models import generators
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer
from parti_jax.partitioning import rules as rules_lib
from parti_jax.planning import least_network
from parti_jax.planning import request as request_lib
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.training import config as config_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer

SAMPLING_BATCH = 32


def train_config() -> config_lib.TrainConfig:
  """The settings of `train`, without data and without an end."""
  return config_lib.configured(task='', steps=checks.LARGEST_INT32)


def training_step(request: request_lib.Request, mesh) -> request_lib.Step:
  """The step of `train`."""
  config = train_config()
  objective = config.objective
  trainer = trainer_lib.Trainer.of_config(config, mesh)
  batch_size = request.batch_size or config.batch_size
  rules_lib.check_batch(batch_size, mesh, trainer.rules, trainer.microbatches)
  settings = {
    'model': objective.name,
    'config': type(objective.model).__name__,
    'remat': objective.model.remat,
    'microbatches': trainer.microbatches,
    'offload_optimizer': config.offload_optimizer,
    'compiler_options': trainer.compiler_options,
  }
  return request_lib.Step(
    lambda: trainer.lower(batch_size),
    mesh,
    batch_size,
    objective.step_flops(batch_size),
    layers.count_parameters(trainer.abstract.params),
    settings,
    least_sent=least_network.of_parameters(
      trainer.abstract.params,
      mesh,
      trainer.rules,
      objective.model.compute_dtype,
      trainer.microbatches,
    ),
    notes=_notes(objective),
  )


def _notes(objective) -> tuple[str, ...]:
  """A plan's note on an objective whose tokenizer is part of the step and not trained yet."""
  if 'tokenizer' not in objective.abstract_constants() or (
    frozen_tokenizer.is_trained(objective.tokenizer)
  ):
    return ()
  return (
    f'{objective.tokenizer} holds no trained tokenizer yet; its sizes are those of '
    f'{type(frozen_tokenizer.planned_config()).__name__} in gin',
  )


def sampling_step(request: request_lib.Request, mesh) -> request_lib.Step:
  """The step that draws the last image token of each image, with a full cache.

  It is the body of the loop over positions. Kernels, keys and values are of the computation's dtype
  or int8; the caches are donated, in the layout that they have in the loop.
  """
  config, rules = sampled_config(), rules_lib.logical_axis_rules()
  images = request.batch_size or SAMPLING_BATCH
  ways = rules_lib.batch_ways(mesh, rules)
  if images % ways or mesh.shape['stage'] > 1:
    raise errors.UserError(
      f'--batch_size={images} images on the mesh {dict(mesh.shape)}: sampling has no pipeline '
      f'stages, and the batch must be a multiple of the {ways} ways in which it is split'
    )
  sequences = images * (2 if request.guided else 1)
  boxed = model_folder.abstract('generator', config)
  params = _abstract_parameters(config, boxed, mesh, rules, request.weights)
  place = functools.partial(_placed, mesh=mesh, rules=rules)
  state = _abstract_state(config, params, sequences, request.cache, place)
  caches, read_slots = state.caches, _read_slots(config, state.caches)
  if mesh.devices.flat[0].platform == 'tpu':
    caches = jax.tree.map(_in_cache_layout, caches)
  batch = ('activation_batch',)
  keys = jax.eval_shape(lambda: decoding.image_keys(0, jnp.arange(images)))
  state = state.replace(caches=None)  # `step` sets them.
  previous = place((images,), jnp.int32, batch)
  arguments = params, caches, state, previous, place(keys.shape, keys.dtype, batch)
  # The caches keep their layout, as in the loop; by itself, XLA would choose one for each.
  results = previous.sharding, jax.tree.map(_format, caches)

  def step(params, caches, state, previous, keys):
    sampling = decoding.Sampling(guided=request.guided).at_each_position(config.image_length)
    carry, position = (previous, state.replace(caches=caches)), state.position
    (token, state), _ = decoding.sample_step(config, params, keys, sampling, carry, position)
    return token, state.caches

  def lower():
    with rules_lib.partitioned(mesh, rules):
      return jax.jit(step, donate_argnums=1, out_shardings=results).lower(*arguments)

  decoder = params['image_decoder']
  layers_read = _read_by_step(decoder['decoder']['layers'])
  read = (layers_read, decoder.get('logits', ()))
  # Parameters that the program doesn't use: the text encoder, and the text's projections to keys and
  # values.
  others = decoder | {'decoder': decoder['decoder'] | {'layers': []}}
  kept = (layers_read, others)
  return request_lib.Step(
    lower,
    mesh,
    images,
    sequences * generators.step_flops(config),
    layers.count_parameters(boxed),
    {
      'model': 'generator',
      'config': type(config).__name__,
      'guided': request.guided,
      'cache_length': max(pattern.num_slots(config.image_length) for pattern in config.patterns),
      'weights': request.weights,
      'cache': request.cache,
    },
    ideal_bytes={
      'parameters': device_parts(read),
      'cache': device_parts((read_slots, state.texts)),
    },
    resident_bytes=device_parts(params) - device_parts(kept),
    notes=('the memory leaves out the image tokenizer, and the caches from before they grow',),
  )


def _abstract_state(config, params, sequences: int, cache: str, place) -> transformer.DecoderState:
  """Returns the shapes of a decoder's state with whole caches, on the mesh."""
  unplaced = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  texts = jax.ShapeDtypeStruct((sequences, config.text_length), jnp.int32)
  init = lambda params, texts: decoding.init_state(
    config, params, texts, config.image_length, cache
  )
  state = jax.eval_shape(init, unplaced, texts)
  batch, axes = ('activation_batch',), ('activation_heads', 'activation_length', None)
  of_heads = lambda leaf: place(leaf.shape, leaf.dtype, (batch + axes)[: leaf.ndim])
  of_rows = lambda leaf: place(leaf.shape, leaf.dtype, batch)
  return state.replace(
    caches=jax.tree.map(of_heads, state.caches),
    texts=jax.tree.map(of_heads, state.texts),
    text_mask=of_rows(state.text_mask),
    start=jax.tree.map(of_rows, state.start),
  )


def _read_slots(config, caches):
  """Returns the shapes of what a step reads of each layer's cache."""

  def part(leaf, count: int):
    shape = (*leaf.shape[:2], count, *leaf.shape[3:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

  found = []
  for layer, cache in enumerate(caches):
    pattern = generators.layer_pattern(config, layer)
    count = pattern.read(0, pattern.num_slots(pattern.length))[1]
    found.append(jax.tree.map(functools.partial(part, count=count), cache))
  return found


def sampled_config() -> generators.Config:
  """Sizes of the model of a run, or those that gin gives without a run."""
  objective = gin.get_bindings(config_lib.TrainConfig).get('objective')
  config = parti_config.PartiConfig() if objective is None else objective.model
  if type(config) not in generators.CONFIGS.values():
    raise errors.UserError(f'--what=sample: the run trains a {objective.name}, not the generator')
  return config


def _abstract_parameters(config, boxed, mesh, rules, weights):
  """Returns the shapes of the parameters for sampling: the result of `parameters.for_sampling`."""
  placed = parameters.shardings(config, rules_lib.parameter_shardings(boxed, mesh, rules))
  convert = functools.partial(parameters.for_sampling, config, weights=weights)
  params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    jax.eval_shape(convert, nn.meta.unbox(boxed)),
    placed,
  )
  if weights == 'int8':
    params = jax.tree_util.tree_map_with_path(parameters.quantized, params)
  return params


def _in_cache_layout(leaf) -> jax.ShapeDtypeStruct:
  if leaf.ndim < 4:  # The scales of int8 vectors.
    return leaf
  return jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=layout.Format(decoding.CACHE_LAYOUT, leaf.sharding)
  )


def _format(leaf: jax.ShapeDtypeStruct):
  return leaf.sharding if leaf.format.layout is None else leaf.format


def _read_by_step(layers_apart):
  """Parameters of layers except those that compute the text's keys and values once for all steps."""
  return [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers_apart)
    if 'project_memory' not in jax.tree_util.keystr(path)
  ]


def _placed(shape, dtype, names, mesh, rules) -> jax.ShapeDtypeStruct:
  names = names + (None,) * (len(shape) - len(names))
  axes = nn.logical_to_mesh_axes(names, rules)
  assert axes is not None
  sharding = NamedSharding(mesh, axes)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def device_parts(abstract) -> float:
  """Bytes that a device holds of a tree of jax.ShapeDtypeStruct with shardings."""
  return float(
    sum(
      leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
      for leaf in jax.tree.leaves(abstract)
    )
  )
