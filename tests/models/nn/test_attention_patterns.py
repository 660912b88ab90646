"""The patterns against their definition by loops over the grid, and what a cache keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.models import parti_config
from parti_jax.models.nn import attention_patterns

GRIDS = [(3, 5), (4, 4), (5, 3), (7, 1)]
CASES = [
  (name, grid, kernel)
  for name in attention_patterns.PATTERNS
  for grid in GRIDS
  for kernel in ((1, 3, 5, 9) if name == 'conv' else (11,))
]


def _seen(name, grid, kernel, query):
  """Positions that a query sees: every cell of the grid is asked, one after the other."""
  seen = []
  for row in range(grid[0]):
    for column in range(grid[1]):
      key, (own_row, own_column) = row * grid[1] + column, divmod(query, grid[1])
      if key > query:
        continue
      above = own_row - row
      if {
        'global': True,
        'conv': above <= kernel // 2 and abs(own_column - column) <= kernel // 2,
        'row': above == 0 or (above == 1 and column >= own_column),
        'column': column == own_column,
      }[name]:
        seen.append(key)
  return seen


@pytest.mark.parametrize('name, grid, kernel', CASES)
def test_a_pattern_sees_what_its_definition_says(name, grid, kernel):
  pattern = attention_patterns.AttentionPattern(name, grid, kernel)
  for query in range(pattern.length):
    np.testing.assert_array_equal(
      pattern.mask[query].nonzero()[0], _seen(name, grid, kernel, query)
    )


@pytest.mark.parametrize(
  'name, counts, farthest',
  [
    ('conv', 5 * 11 + 6, 5 * 32 + 5),
    ('row', 33, 32),
    ('column', 17, 16 * 32),
    ('global', 16 * 32 + 17, 16 * 32 + 16),
  ],
)
def test_the_middle_of_the_papers_grid(name, counts, farthest):
  pattern, middle = attention_patterns.AttentionPattern(name, (32, 32), 11), 16 * 32 + 16
  assert pattern.mask[middle].sum() == counts
  assert middle - pattern.mask[middle].argmax() == farthest


@pytest.mark.parametrize('name, grid, kernel', CASES)
def test_a_cache_holds_what_is_still_seen_and_a_step_reads_it(name, grid, kernel):
  pattern = attention_patterns.AttentionPattern(name, grid, kernel)
  # A cache of all positions, and one that serves only the first few.
  for positions in (pattern.length, 5):
    slots = pattern.num_slots(positions)
    read = jax.jit(
      jax.vmap(
        lambda position, slots=slots: (
          pattern.slot_of(position, slots),
          *pattern.read(position, slots)[::2],
          pattern.positions_in_slots(position, slots),
        )
      )
    )
    places, firsts, visible, before = map(np.asarray, read(jnp.arange(positions)))
    count = pattern.read(0, slots)[1]
    held = np.full(slots, -1)
    for query in range(positions):
      np.testing.assert_array_equal(np.maximum(before[query], -1), held)
      held[places[query]] = query
      seen = held[firsts[query] : firsts[query] + count][visible[query]]
      np.testing.assert_array_equal(np.sort(seen), _seen(name, grid, kernel, query))


@pytest.mark.parametrize(
  'name, slots, read',
  [('conv', 166, 166), ('row', 33, 33), ('column', 1024, 32), ('global', 1024, 1024)],
)
def test_slots_on_the_papers_grid(name, slots, read):
  pattern = attention_patterns.AttentionPattern(name, (32, 32), 11)
  assert pattern.num_slots(1024) == slots
  assert pattern.read(0, slots)[1] == read
  # No slot is one too many: some position sees the oldest one that is kept.
  assert (np.arange(1024) - pattern.mask.argmax(axis=1)).max() == pattern.span - 1


@pytest.mark.parametrize('name', attention_patterns.PATTERNS)
def test_in_its_order_a_column_is_a_block(name):
  pattern = attention_patterns.AttentionPattern(name, (4, 3), 3)
  mask = pattern.ordered_mask
  if name == 'column':
    np.testing.assert_array_equal(mask, np.kron(np.eye(3), np.tril(np.ones((4, 4)))) > 0)
  else:
    np.testing.assert_array_equal(mask, pattern.mask)
  np.testing.assert_array_equal(np.sort(pattern.order), np.arange(12))


def test_a_schedule_is_repeated_over_the_layers():
  config = parti_config.PartiConfig(
    decoder_layers=8, attention_patterns=('row', 'column', 'row', 'conv'), conv_kernel=5
  )
  names = [config.layer_pattern(layer).name for layer in range(8)]
  assert names == ['row', 'column', 'row', 'conv'] * 2
  assert {pattern.kernel for pattern in config.patterns} == {5}
  # What means the same is the same, also as a list out of a JSON file.
  twice = parti_config.PartiConfig(decoder_layers=8, attention_patterns=['row', 'conv'] * 2)
  assert twice.attention_patterns == ('row', 'conv')


@pytest.mark.parametrize(
  'patterns, message',
  [
    (('conv',) * 5, 'a schedule of 5 does not divide PartiConfig.decoder_layers=12'),
    (('causal',), "'causal' is not one of conv, row, column, global"),
    ('conv', "'conv' must be a tuple of patterns, such as"),
    ((), 'must be a tuple'),
  ],
)
def test_a_schedule_that_is_none_is_named(patterns, message):
  with pytest.raises(UserError, match=f'PartiConfig.attention_patterns=.*{message}'):
    parti_config.PartiConfig(attention_patterns=patterns)


def test_older_files_name_one_pattern_for_all_layers():
  legacy = parti_config.LEGACY_DEFAULTS
  assert legacy['attention_patterns'] == ('global',)
  assert parti_config.upgrade_config({'width': 8}) == legacy | {'width': 8}
  older = {'attention_pattern': 'causal', 'conv_kernel': 5}
  assert parti_config.upgrade_config(older) == legacy | {'conv_kernel': 5}
  upgraded = parti_config.upgrade_config({'attention_pattern': 'conv'})
  assert upgraded == legacy | {'attention_patterns': ('conv',)}
