"""Masks of masked language modeling: their statistics, what they spare, what decides them."""

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.models import masked_language
from parti_jax.models.nn import layers

VOCABULARY = 50


def _texts(count, length, seed=0):
  """Texts of any number of pieces, ended by 1 and padded with 0; some pieces are unknown."""
  draw = np.random.default_rng(seed)
  texts = draw.integers(masked_language.SPECIAL_IDS, VOCABULARY, (count, length)).astype(np.int32)
  texts[draw.random((count, length)) < 0.05] = 2
  for row, pieces in enumerate(draw.integers(0, length, count)):
    texts[row, pieces], texts[row, pieces + 1 :] = 1, 0
  return texts


def _mask(texts, rows=None, key=0):
  keys = layers.dropout_keys(jax.random.key(key), len(texts))
  if rows is not None:
    keys = keys.replace(rows=jnp.asarray(rows, jnp.uint32))
  return jax.tree.map(
    np.asarray, jax.jit(masked_language.mask_text, static_argnums=2)(texts, keys, VOCABULARY)
  )


def _chosen(text, length):
  found = np.zeros((len(text.places), length), bool)
  for row, (places, weights) in enumerate(zip(text.places, text.weights)):
    found[row, places[weights > 0]] = True
  return found


def test_fifteen_percent_are_chosen_and_of_these_80_10_10():
  texts = _texts(2000, 64)
  text = _mask(texts)
  chosen, pieces = _chosen(text, 64), texts >= masked_language.SPECIAL_IDS
  # As many as BERT's data has: 15% rounded, at least one, exactly.
  wanted = [max(1, int(0.15 * count + 0.5)) if count else 0 for count in pieces.sum(1)]
  np.testing.assert_array_equal(chosen.sum(1), wanted)
  np.testing.assert_array_equal(masked_language.count_chosen(jnp.asarray(texts)), wanted)
  assert text.places.shape == (2000, masked_language.most_chosen(64))
  assert not chosen[~pieces].any()
  np.testing.assert_array_equal(np.take_along_axis(texts, text.places, axis=1), text.targets)

  replaced = (text.tokens != texts) & ~text.masked
  assert not (text.masked | replaced)[~chosen].any()
  count = chosen.sum()
  assert abs(text.masked.sum() / count - 0.8) < 0.02
  # One in 47 random pieces is the one that stood there.
  assert abs(replaced.sum() / count - 0.1 * 46 / 47) < 0.02
  random = text.tokens[replaced]
  assert random.min() == masked_language.SPECIAL_IDS and random.max() == VOCABULARY - 1
  # All places of long texts are chosen alike.
  long = pieces.sum(1) > 40
  by_place = chosen[long][:, :40].sum(0) / pieces[long][:, :40].sum(0)
  assert by_place.max() < 0.22 and by_place.min() > 0.08


def test_texts_without_a_piece_have_nothing_chosen():
  text = _mask(np.array([[1, 0, 0, 0], [2, 1, 0, 0], [7, 1, 0, 0]], np.int32))
  np.testing.assert_array_equal(text.weights, [[0], [0], [1]])
  np.testing.assert_array_equal(
    text.masked.any(1) | (text.tokens[:, 0] != [1, 2, 7]),
    [False, False, text.masked[2, 0] or text.tokens[2, 0] != 7],
  )
  assert text.targets[2, 0] == 7


def test_masks_follow_from_the_key_and_the_place_in_the_whole_batch():
  texts = _texts(64, 12)
  whole = _mask(texts)
  # As a microbatch has them: every fourth example, with its place in the batch.
  part = _mask(texts[1::4], rows=np.arange(1, 64, 4))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1::4], b), whole, part)
  other = _mask(texts, key=1)
  assert (_chosen(whole, 12) != _chosen(other, 12)).any()
  same_text = _mask(np.repeat(texts[:1] * 0 + 5, 64, axis=0))
  assert len(np.unique(_chosen(same_text, 12), axis=0)) > 5


def test_in_evaluation_they_follow_from_the_text_alone():
  texts = _texts(32, 12)
  keys = masked_language.keys_of_texts(jnp.asarray(texts))
  again = masked_language.keys_of_texts(jnp.asarray(texts[::-1]))
  np.testing.assert_array_equal(keys.rows[::-1], again.rows)
  assert len(np.unique(keys.rows)) == len(np.unique(texts, axis=0))
