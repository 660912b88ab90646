"""Random parameters of tiny networks, drawn by NumPy.

Compiling the initialization of even a tiny network takes a second, and most tests need no more than
some parameters. Those of here have about the standard deviations of the networks' own ones, but they
are other numbers: tests of the initialization, and of training that must start well, use `init`.
"""

import math

import flax.linen as nn
import jax
import numpy as np

from parti_jax.models.nn import layers

_OF_LPIPS = {f'head_{stage}': 1.0 for stage in range(5)}
_CONSTANTS = {
  'bias': 0.0,
  'gain': 1.0,
  'log_scale': 2.6,
  'lora_b': 0.0,
  'scale': 1.0,
  'slope': 0.25,
}
_CONSTANTS |= _OF_LPIPS
_STANDARD_DEVIATIONS = {
  'begin': 0.02,
  'class_embedding': 0.1,
  'class_token': 0.02,
  'direction': 1.0,
  'lora_a': 0.3,
  'mask': 0.02,
  'no_text': 0.1,
  'probe': 0.02,
  'table': 0.02,
}


def _fan_in(shape, names):
  """The fan-in of a kernel, which may have logical axis names."""
  if names and names[0] == 'layers':
    shape, names = shape[1:], names[1:]
  if not names or names[0] == 'kernel_rows':
    return math.prod(shape[:-1])
  return math.prod(shape[:2] if names[0] == 'heads' else shape[:1])


def _standard_deviation(name, shape, names):
  if name == 'kernel':
    return _fan_in(shape, names) ** -0.5
  if name == 'table' and names and names[0] == 'codebook':
    return 1.0
  return _STANDARD_DEVIATIONS[name]


def like(abstract, seed=0, factor=1.0):
  """Draws parameters for a tree of shapes, which keeps its boxes with axis names, if it has any.

  Args:
    abstract: a tree as of `jax.eval_shape(module.init, ...)['params']`.
    seed: of the random numbers.
    factor: what all values are multiplied by.

  Returns:
    A tree of NumPy arrays; `jax.device_put` makes JAX arrays of them, where code outside of `jax.jit`
    needs those. Kernels, embeddings and the like are normal, the scales of norms 1 and biases 0,
    times the factor.

  Raises:
    KeyError: for a parameter whose name is not known here.
  """
  random = np.random.default_rng(seed)
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)

  def draw(path, leaf):
    shape_of, name = (leaf.value if is_box(leaf) else leaf), path[-1].key
    shape, names = shape_of.shape, getattr(leaf, 'names', None)
    if name in _CONSTANTS:
      value = np.full(shape, _CONSTANTS[name])
    else:
      value = random.normal(0, _standard_deviation(name, shape, names), shape)
    value = np.asarray(factor * value, shape_of.dtype)
    return leaf.replace_boxed(value) if is_box(leaf) else value

  return jax.tree_util.tree_map_with_path(draw, abstract, is_leaf=is_box)


def of_objective(objective, seed=0):
  """Draws the parameters of a training objective, JAX arrays without boxes, as `like` does.

  Args:
    objective: the objective.
    seed: of the random numbers.
  """
  with layers.only_shapes():
    boxed = jax.eval_shape(objective.init, jax.random.key(0))
  return jax.device_put(nn.meta.unbox(like(boxed, seed)))


def of(module, inputs, seed=0, factor=1.0):
  """Draws the parameters of a module, without boxes, as `like` does; computes nothing else.

  Args:
    module: the network.
    inputs: what it is initialized with.
    seed: of the random numbers.
    factor: what all values are multiplied by.
  """
  return nn.meta.unbox(like(shapes(module, inputs), seed, factor))


def shapes(module, inputs):
  """Returns the shapes and dtypes of a module's parameters, boxed with their logical axis names.

  Args:
    module: the network.
    inputs: what it is initialized with.
  """
  with layers.only_shapes():
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
