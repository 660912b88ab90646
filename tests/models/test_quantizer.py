"""Tests of parti_jax.models.quantizer, against plain definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import quantizer

TABLES = {
  'cosine': quantizer.VectorQuantizer,
  'euclidean': quantizer.EuclideanQuantizer,
  'dot': quantizer.DotQuantizer,
}
LEVELS = (5, 4, 2)


def _draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _table(codes=11, code_dim=3):
  # Of different norms, so that angle, distance and dot product choose different codes.
  return _draw(codes, code_dim, seed=1) * jnp.linspace(0.2, 2.0, codes)[:, None]


def _params(table):
  return {'params': {'codebook': {'table': table}}}


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _nearest(name, latents, table):
  """The tokens, by the definition of each score for one latent and one code."""
  scores = {
    'cosine': lambda z, e: _unit(z) @ _unit(e),
    'euclidean': lambda z, e: -np.sum((z - e) ** 2),
    'dot': lambda z, e: z @ e,
  }
  return np.array(
    [
      [np.argmax([scores[name](z, e) for e in table]) for z in row]
      for row in np.asarray(latents, np.float64)
    ]
  )


@pytest.mark.parametrize('name', TABLES)
@pytest.mark.parametrize('at_once', [2**14, 4])
def test_a_table_gives_the_code_of_the_best_score(monkeypatch, name, at_once):
  monkeypatch.setattr(quantizer, '_CODES_AT_ONCE', at_once)
  latents, table = _draw(3, 20, 3), _table()
  module = TABLES[name](11, 3)
  tokens = module.apply(_params(table), latents, method='nearest')
  assert tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, _nearest(name, latents, table))
  codes = module.apply(_params(table), tokens, method='lookup')
  wanted = np.asarray(table)[tokens]
  np.testing.assert_allclose(codes, _unit(wanted) if name == 'cosine' else wanted, atol=1e-6)


def test_angle_distance_and_dot_product_choose_differently():
  chosen = [_nearest(name, _draw(3, 20, 3), _table()) for name in TABLES]
  for one, other in itertools.combinations(chosen, 2):
    assert np.mean(one != other) > 0.1


@pytest.mark.parametrize('at_once', [2**14, 4])
def test_of_equal_codes_the_first_is_chosen(monkeypatch, at_once):
  monkeypatch.setattr(quantizer, '_CODES_AT_ONCE', at_once)
  table = jnp.tile(_draw(3, 3), (4, 1))
  tokens = quantizer.EuclideanQuantizer(12, 3).apply(
    _params(table), _draw(2, 9, 3, seed=2), method='nearest'
  )
  assert set(np.unique(tokens)) == {0, 1, 2}


def test_euclidean_codes_pass_gradients_straight_to_latents_and_its_loss_pulls_both_sides():
  latents, table = _draw(2, 5, 3), _table()
  module = quantizer.EuclideanQuantizer(11, 3, commitment=0.3)
  codes, tokens, loss = module.apply(_params(table), latents)
  chosen = np.asarray(table)[tokens]
  np.testing.assert_allclose(codes, chosen, atol=1e-6)
  assert float(loss) == pytest.approx(1.3 * float(np.mean((latents - chosen) ** 2)), rel=1e-5)
  weights = _draw(2, 5, 3, seed=3)
  straight = jax.grad(lambda z: jnp.sum(module.apply(_params(table), z)[0] * weights))(latents)
  np.testing.assert_allclose(straight, weights, atol=1e-6)
  of_latents, of_table = jax.grad(
    lambda z, table: module.apply(_params(table), z)[2], argnums=(0, 1)
  )(latents, table)
  np.testing.assert_allclose(of_latents, 0.3 * 2 * (latents - chosen) / 30, atol=1e-6)
  wanted = np.zeros((11, 3))
  np.add.at(wanted, tokens, 2 * (chosen - np.asarray(latents)) / 30)
  np.testing.assert_allclose(of_table, wanted, atol=1e-6)


def test_dot_products_pass_gradients_through_the_softmax_to_all_codes():
  latents, table = _draw(2, 5, 3), _table()
  module = quantizer.DotQuantizer(11, 3, entropy_weight=0.0)
  codes, tokens, _ = module.apply(_params(table), latents)
  np.testing.assert_array_equal(codes, np.asarray(table)[tokens])
  weights = _draw(2, 5, 3, seed=3)

  def smooth(latents, table):
    # Has the gradient of the definition: that of the softmax, and of the chosen rows.
    chances = jax.nn.softmax(latents @ table.T)
    through_chances = chances @ jax.lax.stop_gradient(table)
    return jnp.sum((through_chances + table[tokens]) * weights)

  found = jax.grad(
    lambda z, table: jnp.sum(module.apply(_params(table), z)[0] * weights), argnums=(0, 1)
  )(latents, table)
  wanted = jax.grad(smooth, argnums=(0, 1))(latents, table)
  for ours, theirs in zip(found, wanted):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert np.all(np.any(found[1] != 0, axis=1)) and len(np.unique(tokens)) < 11


def test_the_loss_of_dot_products_is_the_published_one():
  latents, table = _draw(2, 5, 3), _table()
  module = quantizer.DotQuantizer(11, 3, commitment=0.3, entropy_weight=0.2, temperature=0.5)
  _, tokens, loss = module.apply(_params(table), latents)
  error = np.mean((np.asarray(latents) - np.asarray(table)[tokens]) ** 2)
  scores = np.asarray(latents, np.float64).reshape(10, 3) @ np.asarray(table, np.float64).T / 0.5
  chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  entropy = lambda p: -np.sum(p * np.log(p), axis=-1)
  penalty = entropy(chances).mean() - entropy(chances.mean(axis=0))
  assert float(loss) == pytest.approx(2.3 * error + 0.2 * penalty, rel=1e-4)


def test_the_entropy_penalty_is_least_where_choices_are_sure_and_all_codes_used():
  sure = 100.0 * jnp.eye(4)
  assert float(quantizer.entropy_penalty(sure)) == pytest.approx(-np.log(4), abs=1e-4)
  assert float(quantizer.entropy_penalty(sure[:1].repeat(4, 0))) == pytest.approx(0, abs=1e-4)
  assert float(quantizer.entropy_penalty(jnp.zeros((4, 4)))) == pytest.approx(0, abs=1e-4)


def _all_codes(module, count):
  tokens = jnp.arange(count, dtype=jnp.int32)[None]
  return tokens, module.apply({}, tokens, method='lookup')


def test_finite_scalars_have_all_combinations_of_levels_as_codes():
  module = quantizer.FiniteScalarQuantizer(LEVELS)
  _, codes = _all_codes(module, 40)
  values = [[-1, -0.5, 0, 0.5, 1], [-1, -0.5, 0, 0.5], [-1, 0]]
  # The first dimension counts in ones.
  wanted = [code[::-1] for code in itertools.product(*values[::-1])]
  np.testing.assert_allclose(codes[0], wanted)


def test_finite_scalars_round_to_the_nearest_level_and_reach_the_outermost_ones():
  module = quantizer.FiniteScalarQuantizer(LEVELS)
  latents = jnp.asarray([list(itertools.product(np.linspace(-5.1, 5, 30), repeat=3))], jnp.float32)
  codes, tokens, loss = module.apply({}, latents)
  assert float(loss) == 0
  assert set(np.unique(tokens)) == set(range(40))
  bounded = np.asarray(module.apply({}, latents, method='continuous'))
  values = [np.arange(-(level // 2), level - level // 2) / (level // 2) for level in LEVELS]
  for dimension, levels in enumerate(values):
    nearest = levels[np.argmin(np.abs(bounded[..., dimension, None] - levels), axis=-1)]
    np.testing.assert_allclose(codes[..., dimension], nearest, atol=1e-6)
  np.testing.assert_allclose(module.apply({}, tokens, method='lookup'), codes, atol=1e-6)
  np.testing.assert_array_equal(module.apply({}, latents, method='nearest'), tokens)
  np.testing.assert_allclose(
    module.apply({}, jnp.zeros((1, 1, 3)), method='continuous'), np.zeros((1, 1, 3)), atol=1e-6
  )


def test_finite_scalars_pass_gradients_straight_to_the_bounded_latents():
  module = quantizer.FiniteScalarQuantizer(LEVELS)
  latents, weights = _draw(2, 5, 3), _draw(2, 5, 3, seed=3)
  found = jax.grad(lambda z: jnp.sum(module.apply({}, z)[0] * weights))(latents)
  wanted = jax.grad(lambda z: jnp.sum(module.apply({}, z, method='continuous') * weights))(latents)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_lookup_free_codes_are_signs_and_tokens_their_bits():
  module = quantizer.LookupFreeQuantizer(3)
  _, codes = _all_codes(module, 8)
  np.testing.assert_array_equal(codes[0, :, 0], [-1, 1] * 4)
  np.testing.assert_array_equal(codes[0, :, 2], [-1] * 4 + [1] * 4)
  latents = _draw(2, 50, 3)
  found, tokens, _ = module.apply({}, latents)
  np.testing.assert_allclose(found, np.sign(latents), atol=1e-6)
  np.testing.assert_array_equal(module.apply({}, tokens, method='lookup'), np.sign(latents))
  np.testing.assert_array_equal(module.apply({}, latents, method='nearest'), tokens)
  straight = jax.grad(lambda z: jnp.sum(module.apply({}, z)[0]))(latents)
  np.testing.assert_allclose(straight, np.ones(latents.shape), atol=1e-6)


def test_the_entropy_penalty_of_signs_is_that_of_all_codes_where_one_latent_is_given():
  # With one latent the entropy of the mean is that of the choice, so that the penalty is 0; with
  # commitment alone the loss is the mean squared distance to the code.
  latent = 0.3 * _draw(1, 1, 3)
  distance = np.mean((np.abs(latent) - 1) ** 2)
  module = quantizer.LookupFreeQuantizer(3, 0.3, entropy_weight=1.0, temperature=0.5)
  assert float(module.apply({}, latent)[2]) == pytest.approx(0.3 * distance, abs=1e-5)
  # Of several latents, the mean entropy of their choices is that over all eight codes.
  latents = 0.3 * _draw(1, 6, 3, seed=4)
  codes = np.array(list(itertools.product([-1, 1], repeat=3)))
  scores = -np.sum((np.asarray(latents)[0, :, None] - codes) ** 2, axis=-1) / 0.5
  chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  entropy = lambda p: -np.sum(p * np.log(p), axis=-1)
  ones = np.stack([chances[:, codes[:, i] == 1].sum(axis=1).mean() for i in range(3)])
  of_use = np.sum(entropy(np.stack([ones, 1 - ones], axis=-1)))
  distance = np.mean((np.abs(latents) - 1) ** 2)
  wanted = 0.3 * distance + entropy(chances).mean() - of_use
  assert float(module.apply({}, latents)[2]) == pytest.approx(wanted, rel=1e-4)
