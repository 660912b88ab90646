"""Tests costs of HLO text in forms that no small program here compiles to."""

import math

import numpy as np
import pytest

from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import hlo_text
from parti_jax.planning.hlo import replica_groups

MESH = {'data': 2, 'fsdp': 4, 'tensor': 2}


def program(*lines, parameters='p0: f32[8,128]', before=''):
  """Returns a module whose ENTRY has these lines."""
  return hlo_text.parse(
    '\n'.join(
      [
        'HloModule jit_step',
        '',
        before,
        f'ENTRY %main ({parameters}) -> f32[8,128] {{',
        *(f'  {line}' for line in lines),
        '}',
      ]
    )
  )


def test_shapes():
  shape = hlo_text._shape('(bf16[16,1000,64]{1,2,0:T(8,128)(2,1)S(3)}, (s32[], f32[2]))', 0)[0]
  first, scalar, last = shape.arrays()
  assert (first.dims, first.minor_to_major, first.memory_space) == ((16, 1000, 64), (1, 2, 0), 3)
  assert first.logical_bytes() == 16 * 1000 * 64 * 2
  # Positions are padded to 1024, the 64 lie along eights.
  assert first.padded_bytes() == 16 * 1024 * 64 * 2
  assert (
    shape.padded_bytes(hlo_text.MAIN_MEMORY) == scalar.padded_bytes() + last.padded_bytes() == 12
  )
  padded = hlo_text._shape('bf16[16,1000,64]{2,1,0:T(8,128)(2,1)}', 0)[0]
  assert padded.padded_bytes() == 16 * 1000 * 128 * 2


@pytest.mark.parametrize(
  'text, expected, axes',
  [
    ('{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}', [0, 1], ('tensor',)),
    ('[8,2]<=[16]', [0, 1], ('tensor',)),
    ('[8,2]<=[2,8]T(1,0)', [0, 8], ('data',)),
    ('[4,4]<=[2,4,2]T(0,2,1)', [0, 2, 4, 6], ('fsdp',)),
    ('[2,8]<=[2,4,2]T(2,0,1)', [0, 2, 4, 6, 8, 10, 12, 14], ('data', 'fsdp')),
    ("mesh['a'=2,'b'=4,'c'=2] {'b'}", [0, 2, 4, 6], ('fsdp',)),
    ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", [0, 1, 8, 9], ('data', 'tensor')),
    ("mesh['a'=2,'b'=4,'c'=2] {'b':(2)2}", [0, 2], ('fsdp',)),
    ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", [0, 1], ('tensor',)),
    ('{}', list(range(16)), ('data', 'fsdp', 'tensor')),
  ],
)
def test_replica_groups(text, expected, axes):
  module = program(
    '%p0 = f32[8,128] parameter(0)',
    f'ROOT %r = f32[8,128] all-reduce(%p0), channel_id=1, replica_groups={text}, '
    'use_global_device_ids=true, to_apply=%add, metadata={op_name="x"}',
  )
  groups = replica_groups.groups(module.entry.root, 16)
  assert groups[0].tolist() == expected
  assert sorted(groups.ravel()) == list(range(16))
  assert replica_groups.axes(groups, MESH) == axes
  (collective,) = hlo_cost.costs(module, 16).collectives
  size = len(expected)
  assert collective.sent == pytest.approx(2 * 8 * 128 * 4 * (size - 1) / size)


def test_an_unknown_form_of_groups_is_named():
  module = program(
    '%p0 = f32[8,128] parameter(0)',
    'ROOT %r = f32[8,128] all-reduce(%p0), replica_groups=<?>, to_apply=%add',
  )
  with pytest.raises(ValueError, match='r: unknown form of replica groups'):
    hlo_cost.costs(module, 16)


def test_an_all_reduce_followed_by_slices_is_a_reduce_scatter():
  fused = '\n'.join(
    [
      '%fused (a: f32[8,128], i: s32[]) -> f32[4,128] {',
      '  %a = f32[8,128] parameter(0)',
      '  %i = s32[] parameter(1)',
      '  %sum = f32[8,128] all-reduce(%a), replica_groups=[8,2]<=[16], to_apply=%add',
      '  ROOT %d = f32[4,128] dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={4,128}',
      '}',
    ]
  )
  module = program(
    '%p0 = f32[8,128] parameter(0)',
    '%p1 = s32[] parameter(1)',
    'ROOT %r = f32[4,128] fusion(%p0, %p1), kind=kCustom, calls=%fused',
    before=fused,
  )
  (collective,) = hlo_cost.costs(module, 16).collectives
  assert (collective.kind, collective.sent) == ('reduce-scatter', 8 * 128 * 4 / 2)


def test_a_collective_that_overlaps_with_several_fusions_counts_once():
  gather = (
    'all-gather({}), channel_id=7, replica_groups=[8,2]<=[16], dimensions={{0}}, '
    'frontend_attributes={{chain_id="1"}}'
  )
  fused = [
    [
      '%start (a: f32[4,128]) -> (f32[4,128], f32[8,128]) {',
      '  %a = f32[4,128] parameter(0)',
      f'  %g = f32[8,128] {gather.format("%a")}',
      '  ROOT %c = (f32[4,128], f32[8,128]) custom-call(%g), '
      'custom_call_target="AsyncCollectiveStart"',
      '}',
    ],
    [
      '%beside (a: f32[4,128], b: f32[8,128], c: f32[64,64], d: f32[64,32]) -> '
      '(f32[64,32], f32[4,128], f32[8,128]) {',
      '  %a = f32[4,128] parameter(0)',
      '  %b = f32[8,128] parameter(1)',
      '  %c = f32[64,64] parameter(2)',
      '  %d = f32[64,32] parameter(3)',
      f'  %g = f32[8,128] {gather.format("%a")}',
      '  %p = f32[64,32] dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
      '  ROOT %t = (f32[64,32], f32[4,128], f32[8,128]) tuple(%p, %a, %g)',
      '}',
    ],
    [
      '%done (a: f32[4,128], b: f32[8,128]) -> f32[8,128] {',
      '  %a = f32[4,128] parameter(0)',
      '  %b = f32[8,128] parameter(1)',
      f'  %g = f32[8,128] {gather.format("%a")}',
      '  ROOT %c = f32[8,128] custom-call(%a, %b, %g), custom_call_target="AsyncCollectiveDone"',
      '}',
    ],
  ]
  module = program(
    '%p0 = f32[4,128] parameter(0)',
    '%x = f32[64,64] parameter(1)',
    '%y = f32[64,32] parameter(2)',
    '%s = (f32[4,128], f32[8,128]) fusion(%p0), kind=kCustom, calls=%start',
    '%s0 = f32[4,128] get-tuple-element(%s), index=0',
    '%s1 = f32[8,128] get-tuple-element(%s), index=1',
    '%m = (f32[64,32], f32[4,128], f32[8,128]) fusion(%s0, %s1, %x, %y), kind=kOutput, '
    'calls=%beside',
    '%m1 = f32[4,128] get-tuple-element(%m), index=1',
    '%m2 = f32[8,128] get-tuple-element(%m), index=2',
    'ROOT %e = f32[8,128] fusion(%m1, %m2), kind=kCustom, calls=%done',
    before='\n'.join('\n'.join(lines) + '\n' for lines in fused),
  )
  costs = hlo_cost.costs(module, 16)
  (collective,) = costs.collectives
  assert (collective.kind, collective.count, collective.whole) == ('all-gather', 1, 8 * 128 * 4)
  assert costs.product_flops == 2 * 64 * 64 * 32
  # Operand and result of the collective, then those of the product.
  assert costs.hbm_bytes == 4 * (4 * 128 + 8 * 128 + 64 * 64 + 64 * 32 + 64 * 32)


def test_sends_between_slices():
  send = (
    '%s{0} = (f32[8,128], u32[], token[]) send(%p0, %t), channel_id={0}, '
    'is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name='
    '"xla_megascale_runtime",_xla_megascale_transfer_type="{1}"}}'
  )
  module = program(
    '%p0 = f32[8,128] parameter(0)',
    '%t = token[] after-all()',
    send.format(1, 'ALL_REDUCE'),
    send.format(2, 'ALL_GATHER'),
    send.format(3, 'ONE_TO_ONE'),
    '%d = token[] send-done(%s1), channel_id=1, is_host_transfer=true',
    'ROOT %r = f32[8,128] negate(%p0)',
  )
  size, groups = 8 * 128 * 4, np.arange(16).reshape(2, 8).T
  costs = hlo_cost.costs(module, 16, slice_groups=groups)
  assert [(found.kind, found.sent) for found in costs.collectives] == [
    ('all-reduce', size),
    ('all-gather', size),
    ('collective-permute', size),
  ]
  assert replica_groups.axes(costs.collectives[0].groups, MESH) == ('data',)
  assert costs.hbm_bytes == 3 * size + 2 * size  # Each is read once.
  unknown = hlo_cost.costs(module, 16)
  assert not unknown.collectives and len(unknown.notes) == 3


def test_a_collective_of_another_core():
  called = '\n'.join(
    [
      '%called (a: f32[8,128]) -> f32[16,128] {',
      '  %a = f32[8,128] parameter(0)',
      '  ROOT %g = f32[16,128] all-gather(%a), replica_groups=[8,2]<=[16], dimensions={0}',
      '}, execution_thread="sparsecore"',
      '',
    ]
  )
  module = program(
    '%p0 = f32[8,128] parameter(0)',
    '%c = ((f32[8,128]), f32[16,128], u32[]{:S(8)}) call-start(%p0), '
    'async_execution_thread="sparsecore", to_apply=%called',
    'ROOT %r = f32[16,128] call-done(%c)',
    before=called,
  )
  costs = hlo_cost.costs(module, 16)
  (collective,) = costs.collectives
  assert (collective.kind, collective.whole) == ('all-gather', 16 * 128 * 4)
  assert costs.hbm_bytes == (8 + 16) * 128 * 4


def _loop(condition, body_adds='%one', start='constant(0)'):
  before = '\n'.join(
    [
      '%cond (t: (s32[], f32[8,128])) -> pred[] {',
      '  %t = (s32[], f32[8,128]) parameter(0)',
      '  %i = s32[] get-tuple-element(%t), index=0',
      '  %n = s32[] constant(12)',
      f'  ROOT %c = pred[] compare({condition}',
      '}',
      '',
      '%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {',
      '  %t = (s32[], f32[8,128]) parameter(0)',
      '  %i = s32[] get-tuple-element(%t), index=0',
      '  %one = s32[] constant(1)',
      '  %x = f32[8,128] get-tuple-element(%t), index=1',
      f'  %next = s32[] add(%i, {body_adds})',
      '  %k = f32[128,128] constant({...})',
      '  %d = f32[8,128] dot(%x, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
      '  ROOT %r = (s32[], f32[8,128]) tuple(%next, %d)',
      '}',
    ]
  )
  return program(
    '%p0 = f32[8,128] parameter(0)',
    f'%z = s32[] {start}',
    '%init = (s32[], f32[8,128]) tuple(%z, %p0)',
    '%w = (s32[], f32[8,128]) while(%init), condition=%cond, body=%body, '
    'metadata={op_name="a/while"}',
    'ROOT %o = f32[8,128] get-tuple-element(%w), index=1',
    before=before,
  )


@pytest.mark.parametrize(
  'arguments, turns',
  [
    ({'condition': '%i, %n), direction=LT'}, 12),
    ({'condition': '%i, %n), direction=LE'}, 13),
    ({'condition': '%n, %i), direction=GT'}, 12),
    ({'condition': '%i, %n), direction=LT', 'start': 'constant(5)'}, 7),
  ],
)
def test_trip_counts_of_loops(arguments, turns):
  costs = hlo_cost.costs(_loop(**arguments), 1)
  assert costs.product_flops == turns * 2 * 8 * 128 * 128 and not costs.notes


def test_a_loop_with_an_unknown_trip_count_is_noted():
  costs = hlo_cost.costs(_loop('%i, %n), direction=LT', start='custom-call(), x=1'), 1)
  assert costs.product_flops == 2 * 8 * 128 * 128
  assert costs.notes == {'the trip count of the loop a/while is unknown; counted once'}


def _kernel(config):
  """A kernel with two results that gets the same array as two operands, and another one."""
  part, whole = 'bf16[2,4,512,64]', 'bf16[3,2,4,512,64]'
  return program(
    f'%p0 = {whole} parameter(0)',
    f'%p1 = {part} parameter(1)',
    f'ROOT %k = ({part}, {part}) custom-call(%p0, %p0, %p1), '
    'custom_call_target="tpu_custom_call", metadata={op_name="a/attention_forward/pallas_call"}'
    + config,
  )


def test_a_kernel_states_its_flops():
  config = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"768"}}}'
  costs = hlo_cost.costs(_kernel(config), 1)
  assert costs.kernel_flops == 768 and costs.flops == 768
  assert costs.kernels == {'attention_forward': 1} and not costs.notes


def test_a_kernel_that_does_not_state_its_flops_is_noted():
  costs = hlo_cost.costs(_kernel(''), 1)
  assert costs.kernel_flops == 0
  assert costs.notes == {'the kernel attention_forward has no FLOPs estimate; not counted'}


def test_an_array_that_a_kernel_gets_twice_is_read_once():
  assert hlo_cost.costs(_kernel(''), 1).hbm_bytes == (3 + 1 + 2) * 2 * 4 * 512 * 64 * 2


def test_on_chip_and_host_memory_do_not_count_as_main_memory():
  module = program(
    '%p0 = f32[1024,1024]{1,0:T(8,128)} parameter(0)',
    '%s = (f32[1024,1024]{1,0:T(8,128)S(1)}, f32[1024,1024]{1,0:T(8,128)}, u32[]{:S(2)}) '
    'copy-start(%p0)',
    '%d = f32[1024,1024]{1,0:T(8,128)S(1)} copy-done(%s)',
    '%n = f32[1024,1024]{1,0:T(8,128)S(1)} negate(%d)',
    'ROOT %h = f32[1024,1024]{1,0:T(8,128)S(5)} copy(%n)',
  )
  costs = hlo_cost.costs(module, 1)
  size = math.prod((1024, 1024)) * 4
  assert (costs.hbm_bytes, costs.host_bytes) == (size, size)
