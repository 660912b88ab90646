"""The PyTorch network of the GPU benchmark against Parti with the same parameters.

It needs torch, and is skipped where that isn't installed.
"""

import dataclasses
import pathlib
import sys

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import parti
from parti_jax.models.nn import layers
from parti_jax.training.objectives import generator_objective

torch = pytest.importorskip('torch')

sys.path.append(str(pathlib.Path(__file__).parents[2] / 'benchmarks'))

import gpu_measurements  # noqa: E402
import torch_parti  # noqa: E402

SMALL = gpu_measurements.Settings(small=True, repeats=3)
# Names of our parameters -> names of PyTorch's.
PARTS = {
  'text_encoder/token_embedding': 'piece_embedding',
  'text_encoder/position_embedding': 'text_position_embedding',
  'text_encoder/encoder/norm': 'encoder_norm',
  'text_encoder/encoder/layers': 'encoder',
  'image_decoder/begin': 'begin',
  'image_decoder/token_embedding': 'token_embedding',
  'image_decoder/row_embedding': 'row_embedding',
  'image_decoder/column_embedding': 'column_embedding',
  'image_decoder/decoder/norm': 'decoder_norm',
  'image_decoder/decoder/layers': 'decoder',
  'image_decoder/logits': 'logits',
}


def matrix(name, kernel):
  """A kernel as PyTorch's [outputs, inputs]."""
  joined = 2 if name.endswith('project_out') and 'attention' in name else 1
  return kernel.reshape(np.prod(kernel.shape[:joined]), -1).T


def state_dict(params):
  """Our parameters under PyTorch's names."""
  found = {}
  for path, leaf in flax.traverse_util.flatten_dict(params, sep='/').items():
    prefix = next(part for part in PARTS if path.startswith(part))
    rest = path[len(prefix) + 1 :].split('/')
    for number, part in enumerate(leaf) if prefix.endswith('/layers') else [(None, leaf)]:
      *module, kind = rest
      name = '.'.join([PARTS[prefix], *([] if number is None else [str(number)]), *module])
      value = matrix(name, part) if kind == 'kernel' else part
      found[name if name == 'begin' else f'{name}.weight'] = torch.tensor(np.asarray(value))
  return found


def both(pattern):
  """A tiny Parti and its parameters, and PyTorch's network with the same ones."""
  config = gpu_measurements.tiny_config(attention_patterns=(pattern,), dropout=0.0)
  params = nn.meta.unbox(parti.Parti(config).init(jax.random.key(0), *parti.example_inputs(config)))
  params = jax.tree.map(lambda leaf: 3 * leaf, params['params'])
  model = torch_parti.Parti(config)
  model.load_state_dict(state_dict(params), strict=True)
  return config, params, model


def as_tensors(batch):
  return [torch.as_tensor(part, dtype=torch.int64) for part in batch]


@pytest.mark.parametrize('small', [True, False])
def test_number_of_parameters(small):
  config = gpu_measurements.model_config(dataclasses.replace(SMALL, small=small))
  ours = jax.eval_shape(parti.Parti(config).init, jax.random.key(0), *parti.example_inputs(config))
  with torch.device('meta'):
    model = torch_parti.Parti(config)
  count = sum(parameter.numel() for parameter in model.parameters())
  assert count == layers.count_parameters(ours['params'])
  assert small or count > 350e6


@pytest.mark.parametrize('pattern', ['conv', 'global'])
def test_same_loss_and_gradients(pattern):
  config, params, model = both(pattern)
  batch = gpu_measurements.random_batch(config, 3)
  arrays = dict(zip(('encoder_input_tokens', 'decoder_target_tokens'), map(jnp.asarray, batch)))
  arrays['decoder_loss_weights'] = jnp.ones(batch[1].shape)
  objective = generator_objective.GeneratorObjective(config)
  loss = lambda params: objective.loss(params, arrays, None, jnp.int32(0))[0]
  expected, gradients = jax.value_and_grad(loss)(params)
  found = model.loss(*as_tensors(batch))
  found.backward()
  assert found.item() == pytest.approx(float(expected), rel=1e-5)
  named = dict(model.named_parameters())
  for name, gradient in state_dict(gradients).items():
    scale = float(gradient.abs().max())  # The large weights amplify float32 rounding.
    torch.testing.assert_close(named[name].grad, gradient, rtol=0, atol=2e-3 * scale, msg=name)


def test_same_flops():
  """FLOPs as PyTorch counts them; 'global' counts all pairs of positions in both."""
  from torch.nn import attention
  from torch.utils import flop_counter

  config, _, model = both('global')
  with attention.sdpa_kernel(attention.SDPBackend.MATH), torch.no_grad():
    with flop_counter.FlopCounterMode(display=False) as counter:
      model(*as_tensors(gpu_measurements.random_batch(config, 2)))
  assert counter.get_total_flops() == 2 * parti.forward_flops(config)


@pytest.mark.parametrize('pattern', ['conv', 'global'])
def test_sampling_with_a_cache_equals_the_whole_sequence(pattern):
  config, _, model = both(pattern)
  (texts, _), scale = as_tensors(gpu_measurements.random_batch(config, 2)), 2.0
  torch.manual_seed(0)
  tokens = torch_parti.Sampler(model, 2, scale).draw(texts)
  assert tokens.shape == (2, config.image_length) and len(tokens.unique()) > 3
  empty = torch.zeros_like(texts)
  empty[:, 0] = 1
  with torch.no_grad():
    with_text, without = (model(part, tokens) for part in (texts, empty))
  guided = without + scale * (with_text - without)
  torch.manual_seed(0)
  for position in range(config.image_length):
    noise = -torch.empty_like(guided[:, position]).exponential_().log()
    assert torch.equal((guided[:, position] + noise).argmax(-1), tokens[:, position])


def test_measurements_of_the_benchmark():
  """The sections that compare with PyTorch, with both of them."""
  step = gpu_measurements.torch_training(SMALL, 'conv')
  assert step['batch_size'] == 4 and step['seconds'] > 0
  found = gpu_measurements.with_mfu(
    SMALL, {'parti_jax, conv, block_inputs': step | {'peak': 1e9}, 'PyTorch, conv': dict(step)}
  )
  assert found['ratios'] == {'conv': 1.0}
  drawn = gpu_measurements.torch_sampling(SMALL, 2)
  assert drawn['tokens_per_second'] == pytest.approx(32 / drawn['seconds'])
