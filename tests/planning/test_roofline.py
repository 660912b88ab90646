"""Tests the model of the network and the roofline against times computed by hand."""

import types

import numpy as np
import pytest

from parti_jax.planning import chips
from parti_jax.planning import roofline
from parti_jax.planning.hlo import hlo_cost

V4, V5E = chips.CHIPS['v4'], chips.CHIPS['v5e']
WHOLE = 8e9


def fake_mesh(dims, slices=1, cores=1):
  """Returns a mesh of fake chips in C order of their coordinates."""
  devices = [
    types.SimpleNamespace(coords=place + (0,) * (3 - len(place)), slice_index=index)
    for index in range(slices)
    for place in np.ndindex(*dims)
    for _ in range(cores)
  ]
  return types.SimpleNamespace(devices=np.array(devices), shape={'all': len(devices)})


def seconds(kind, groups, mesh, chip):
  collective = hlo_cost.Collective(kind, WHOLE, np.array(groups), 1, 'x')
  return roofline.Network(mesh, chip).seconds(collective)


@pytest.mark.parametrize(
  'kind, groups, expected',
  [
    # A ring of four: two links, three quarters of the whole over each pair of them.
    ('all-gather', [[0, 1, 2, 3]], WHOLE * 3 / 4 / (2 * 50e9)),
    ('reduce-scatter', [[0, 16, 32, 48]], WHOLE * 3 / 4 / (2 * 50e9)),
    ('all-reduce', [[0, 1, 2, 3]], 2 * WHOLE * 3 / 4 / (2 * 50e9)),
    # All three dimensions: six links.
    ('all-gather', [list(range(64))], WHOLE * 63 / 64 / (6 * 50e9)),
    # A part of a ring is a line.
    ('all-gather', [[0, 1]], WHOLE / 2 / 50e9),
    # Chips with another chip between them share its links with the neighboring groups.
    ('all-gather', [[0, 2]], WHOLE / 2 / (50e9 / 2)),
    ('all-to-all', [[0, 1, 2, 3]], WHOLE * 4 / 8 / 50e9),
    ('collective-permute', [[0, 1], [1, 0]], WHOLE / 50e9),
    # In a ring, the last chip is next to the first.
    ('collective-permute', [[3, 0], [0, 1]], WHOLE / 50e9),
  ],
)
def test_collectives_on_a_torus(kind, groups, expected):
  found, dcn = seconds(kind, groups, fake_mesh((4, 4, 4)), V4)
  assert found == pytest.approx(expected) and not dcn


def test_a_small_slice_of_v5e_has_no_rings():
  line, _ = seconds('all-gather', [[0, 1, 2, 3]], fake_mesh((4, 4)), V5E)
  ring, _ = seconds('all-gather', [list(range(16))], fake_mesh((16, 16)), V5E)
  assert line == pytest.approx(WHOLE * 3 / 4 / 50e9)
  assert ring == pytest.approx(WHOLE * 15 / 16 / (2 * 50e9))


def test_between_slices_each_chip_sends_its_share():
  mesh = fake_mesh((4, 4, 4), slices=2)
  found, dcn = seconds('all-reduce', [[0, 1, 2, 3, 64, 65, 66, 67]], mesh, V4)
  within = 2 * WHOLE * 3 / 4 / (2 * 50e9)
  across = 2 * WHOLE / 4 * (1 / 2) / V4.dcn_bandwidth
  assert dcn and found == pytest.approx(within + across)


def test_two_devices_of_one_chip_need_no_link():
  mesh = fake_mesh((4, 4, 4), cores=2)
  assert seconds('all-gather', [[0, 1]], mesh, chips.CHIPS['tpu7x']) == (0.0, False)


def test_groups_of_a_chips_devices_share_its_links():
  mesh, chip = fake_mesh((4, 4, 4), cores=2), chips.CHIPS['tpu7x']
  alone = WHOLE * 3 / 4 / (2 * chip.link_bandwidth)
  apart, _ = seconds('all-gather', [[0, 2, 4, 6], [1, 3, 5, 7]], mesh, chip)
  together, _ = seconds('all-gather', [list(range(8))], mesh, chip)
  assert (apart, together) == pytest.approx((2 * alone, alone))
  permuted, _ = seconds('collective-permute', [[0, 2], [1, 3]], mesh, chip)
  assert permuted == pytest.approx(2 * WHOLE / chip.link_bandwidth)


def test_a_permutation_to_another_slice_sends_whole_arrays():
  found, dcn = seconds('collective-permute', [[0, 64]], fake_mesh((4, 4, 4), slices=2), V4)
  assert dcn and found == pytest.approx(WHOLE / V4.dcn_bandwidth)


def test_a_three_dimensional_torus_closes_only_with_whole_cubes():
  line, _ = seconds('all-gather', [[0, 1, 2, 3]], fake_mesh((2, 2, 4)), V4)
  assert line == pytest.approx(WHOLE * 3 / 4 / 50e9)


def test_pairs_of_a_permutation_all_count():
  # The first eight pairs are the same; the last pair of the second permutation is further apart.
  near = [[place, place + 1] for place in range(0, 16, 2)]
  mesh = fake_mesh((4, 4, 4))
  network = roofline.Network(mesh, V4)
  times = [
    network.seconds(
      hlo_cost.Collective('collective-permute', WHOLE, np.array(near + [last]), 1, 'x')
    )[0]
    for last in ([16, 17], [16, 18])
  ]
  assert times == pytest.approx([WHOLE / 50e9, 2 * WHOLE / 50e9])


def test_times_and_utilisation():
  costs = hlo_cost.Costs(product_flops=275e12, kernel_flops=27.5e12, hbm_bytes=600e9)
  costs.collectives.append(
    hlo_cost.Collective('all-gather', WHOLE, np.array([[0, 1, 2, 3]]), 5, 'x')
  )
  sums = roofline.summarize(costs.collectives, fake_mesh((4, 4, 4)), V4)
  (entry,) = sums
  assert (entry.kind, entry.axes, entry.count) == ('all-gather', ('all',), 5)
  assert entry.bytes_sent == 5 * WHOLE * 3 / 4
  times = roofline.times(costs, sums, V4)
  assert (times.compute, times.hbm, times.interconnect) == pytest.approx((1.1, 0.5, 0.3))
  assert times.bound == 'compute' and times.sum == pytest.approx(1.9)
  assert roofline.mfu(64 * 220e12, times.longest, V4, 64) == pytest.approx(0.8 / 1.1)
