"""What the tests of CLIP and of SigLIP share."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from parti_jax.importers import files
from parti_jax.importers import key_map


def read(reader, module, example_inputs, config, paths, ignored):
  """Parameters of a module, as our reader finds them in files of weights."""
  weights = files.open_weights([str(path) for path in paths])
  found = reader(config, weights.arrays)
  variables = jax.eval_shape(module.init, jax.random.key(0), *example_inputs(config))
  expected = flax.traverse_util.flatten_dict(nn.meta.unbox(variables['params']), sep='/')
  shapes = {path: leaf.shape for path, leaf in expected.items()}
  key_map.check(found, weights.arrays, shapes, 'the file', ignored)
  params = jax.tree.map(np.asarray, key_map.convert(found, weights.arrays))
  return flax.traverse_util.unflatten_dict(params, sep='/')


def apply(module, params, *inputs, method=None):
  """Calls the module on arrays."""
  inputs = [jax.numpy.asarray(part) for part in inputs]
  return jax.jit(lambda *inputs: module.apply({'params': params}, *inputs, method=method))(*inputs)


def randomize(model, torch, seed=0):
  """Gives a torch model parameters that are all different: biases and norms, too."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      if name.endswith(('logit_scale', 'logit_bias')):
        parameter.copy_(1.5 + noise / 10)
      elif 'norm' in name or '.ln_' in name:
        parameter.copy_(('weight' in name) + noise / 5)
      else:
        parameter.copy_(noise / 4)
  return model.eval()


def pictures(count, size, seed=0):
  """Pictures in [0, 1]."""
  return np.random.default_rng(seed).uniform(size=(count, size, size, 3)).astype(np.float32)


def texts(count, length, end_id, pad=0, largest=None, seed=0):
  """Token ids up to the largest, the end, and padding; the first text has no padding."""
  draw = np.random.default_rng(seed)
  tokens = np.full((count, length), pad, np.int32)
  for row in range(count):
    used = length if not row else int(draw.integers(2, length))
    tokens[row, : used - 1] = draw.integers(2, largest or end_id, used - 1)
    tokens[row, used - 1] = end_id
  return tokens
