"""Tests the traffic of a program by module and pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import hlo_scopes
from parti_jax.planning.hlo import hlo_text

LAYER = 'decoder/while/body/closed_call'


@pytest.mark.parametrize(
  'origin, module, part',
  [
    (f'jit(step)/jvp(Parti)/{LAYER}/block/mlp/dot_general', 'Parti/decoder/block/mlp', 'forward'),
    (
      f'jit(step)/transpose(jvp(Parti))/{LAYER}/checkpoint/block/mlp/dot_general',
      'Parti/decoder/block/mlp',
      'backward',
    ),
    (
      f'jit(step)/transpose(jvp(Parti))/{LAYER}/checkpoint/rematted_computation/block/'
      'block._after_self_attention/shard_map/attention_forward/pallas_call',
      'Parti/decoder/block/attention_forward',
      'recomputed',
    ),
    ('jit(step)/while/body/closed_call/jvp()/reduce_sum', 'reduce_sum', 'forward'),
    ('jit(step)/mul', 'mul', 'update'),
    ('copy-start', 'copy-start', 'update'),
  ],
)
def test_names_of_origins(origin, module, part):
  assert (hlo_scopes.module_of(origin), hlo_scopes.pass_of(origin)) == (module, part)


class _TwoLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(512, name='narrow')(nn.tanh(nn.Dense(4096, name='wide')(x)))


def test_the_shares_of_a_program():
  """They add up to its traffic, and the gradient of the wide layer's kernel is written."""
  model, x = _TwoLayers(), jnp.ones((8, 512))
  loss = lambda variables: jnp.sum(jnp.square(model.apply(variables, x)))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
  costs = hlo_cost.costs(hlo_text.parse(compiled.as_text()), 1)
  assert sum(costs.traffic.values()) == pytest.approx(costs.hbm_bytes)
  shares = hlo_scopes.largest(costs.traffic)
  assert sum(entry.share for entry in shares) == pytest.approx(1)
  assert [entry.bytes for entry in shares] == sorted((s.bytes for s in shares), reverse=True)
  backward = {entry.scope: entry.bytes for entry in shares if entry.part == 'backward'}
  assert backward['_TwoLayers/wide'] >= 512 * 4096 * 4
  assert {entry.scope for entry in shares if entry.part == 'forward'} >= {
    '_TwoLayers/wide',
    '_TwoLayers/narrow',
  }
  assert hlo_scopes.largest(costs.traffic, 1) == shares[:1]
