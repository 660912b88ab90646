"""Published constants of TPU chips, for the roofline.

Peak FLOP/s, memory and memory bandwidth come from Google's documentation of each TPU. The one-way
bandwidth of a link is the documented bidirectional bandwidth of a chip over twice its number of
links. The documentation of v4 doesn't give one, so it comes from the TPU v4 paper.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's constants.

  Attributes:
    kind: name of the chip in a topology.
    devices: number of JAX devices per chip.
    peak_flops: dense bfloat16 FLOP/s.
    hbm_bytes: bytes of main memory.
    hbm_usable: bytes of main memory that libtpu leaves to a program, from its message about a
      program that is too large.
    hbm_bandwidth: bytes/s of the main memory.
    torus_dimensions: dimensions of the network between chips; a chip has two links in each.
    link_bandwidth: bytes/s of a link, one way.
    closes_at: in two dimensions, a dimension is a ring instead of a line if its size is a multiple
      of this; in three, all are rings if all sizes are multiples.
    dcn_bandwidth: bytes/s of a chip's share of the data-center network, between slices.
    source: source of the numbers.
  """

  kind: str
  devices: int
  peak_flops: float
  hbm_bytes: float
  hbm_usable: float
  hbm_bandwidth: float
  torus_dimensions: int
  link_bandwidth: float
  closes_at: int
  dcn_bandwidth: float
  source: str


_GIB = 2**30
_DOCS = 'https://docs.cloud.google.com/tpu/docs/'

CHIPS = {
  chip.kind: chip
  for chip in (
    Chip(
      'v4',
      1,
      275e12,
      32 * _GIB,
      30.75 * _GIB,
      1200e9,
      3,
      50e9,
      4,
      6.25e9,
      f'{_DOCS}v4; links: arXiv 2304.01433, table 4; data-center network: as v5p, none is '
      'published',
    ),
    Chip('v5e', 1, 197e12, 16 * _GIB, 15.75 * _GIB, 819e9, 2, 50e9, 16, 3.125e9, f'{_DOCS}v5e'),
    Chip('v5p', 1, 459e12, 95 * _GIB, 95 * _GIB, 2765e9, 3, 100e9, 4, 6.25e9, f'{_DOCS}v5p'),
    Chip('v6e', 1, 918e12, 32 * _GIB, 31.25 * _GIB, 1600e9, 2, 100e9, 16, 12.5e9, f'{_DOCS}v6e'),
    Chip(
      'tpu7x', 2, 2307e12, 192 * _GIB, 189.5 * _GIB, 7380e9, 3, 100e9, 4, 12.5e9, f'{_DOCS}tpu7x'
    ),
  )
}
