"""Continuous batching: pictures that join and leave a running batch are those of `generate`."""

import concurrent.futures
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

import parti_jax
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import parti
from parti_jax.models import pixels
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import continuous
from parti_jax.sampling import running_batch
from parti_jax.sampling import slots

SAMPLED = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
_WORK = continuous.ContinuousSampler._work
# The call before which a picture joins, its prompt, and how it is sampled.
JOINS = [
  (0, 'red apple', {'seed': 3}),
  (0, 'blue ball', {'seed': 2**32 - 1, 'image_index': 5, **SAMPLED}),
  (2, 'green apple', {'temperature': 0.0}),
  (3, 'man cook: medium skin tone', {'guidance_scale': 1.0, 'top_k': 3}),
  (3, 'red apple', {'seed': 3, 'guidance_ramp': 'linear', **SAMPLED}),
  (7, 'red apple', {'seed': 4, 'temperature': 0.5, 'top_p': 0.6}),
  (20, 'red apple', {'seed': 3}),
]


# Parameters large enough for texts and tokens to matter.
random_params = functools.partial(random_parameters.of, factor=2.0)


@pytest.fixture(scope='module')
def folder(parts, tmp_path_factory):
  """A model with a layer of each pattern, and rings that turn within a picture of 3×3 tokens."""
  config = dataclasses.replace(
    parts['generator_config'],
    grid=(3, 3),
    decoder_layers=4,
    conv_kernel=3,
    attention_patterns=('conv', 'row', 'column', 'global'),
  )
  tokenizer = dataclasses.replace(
    tiny_configs.TOKENIZER, image_size=12, codebook_size=config.codebook_size, code_dim=4
  )
  changed = parts | {
    'generator_config': config,
    'generator_params': random_params(parti.Parti(config), parti.example_inputs(config)),
    'tokenizer_config': tokenizer,
    'tokenizer_params': random_params(
      vit_vqgan.ViTVQGAN(tokenizer), vit_vqgan.example_inputs(tokenizer)
    ),
  }
  return model_folder.save(tmp_path_factory.mktemp('models') / 'mixed', dtype='float32', **changed)


@pytest.fixture(scope='module')
def model(folder):
  return parti_jax.load(folder)


@pytest.fixture(scope='module')
def expected(model):
  """The pictures of JOINS, each drawn alone by `generate`."""
  results = []
  for _, prompt, how in JOINS:
    how = dict(how)
    index = how.pop('image_index', 0)
    results.append(model.generate(prompt, 1, first_index=index, batch_size=3, **how))
  assert len({result.tokens.tobytes() for result in results}) == len(JOINS) - 1
  return results


@pytest.fixture
def without_thread(monkeypatch):
  """Leaves it to a test to call `_step`, so that it knows who is in the batch when."""
  monkeypatch.setattr(continuous.ContinuousSampler, '_work', lambda sampler: None)


def turns(sampler, joins=()):
  """Runs calls until all is done; returns the futures of what joins on the way."""
  futures, turn = [], 0
  while len(futures) < len(joins) or sampler.waiting or sampler.running or sampler._batch._drawn:
    for at, prompt, how in joins:
      if at == turn:
        futures.append(sampler.submit(prompt, **how))
    sampler._step()
    turn += 1
  return futures


def check_same(futures, expected):
  for future, wanted in zip(futures, expected, strict=True):
    result = future.result(0)
    np.testing.assert_array_equal(result.tokens, wanted.tokens)
    assert np.abs(result.images.astype(int) - wanted.images).max() <= 1
    assert (result.prompts, result.seed, result.settings, result.model) == (
      wanted.prompts,
      wanted.seed,
      wanted.settings,
      wanted.model,
    )
    np.testing.assert_array_equal(result.image_index, wanted.image_index)


@pytest.mark.parametrize('tokens_per_call', [1, 3])
def test_pictures_that_join_at_any_time_are_those_of_generate(
  model, expected, without_thread, tokens_per_call
):
  sampler = continuous.ContinuousSampler(model, 3, tokens_per_call)
  compiled = slots.advance._cache_size()
  futures = turns(sampler, JOINS)
  check_same(futures, expected)
  # The same picture at another time, among others, and in a slot that was taken before.
  np.testing.assert_array_equal(futures[0].result(0).images, futures[-1].result(0).images)
  assert slots.advance._cache_size() <= compiled + 1


def test_over_a_mesh_the_pictures_are_the_same(folder, expected, without_thread):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices')
  sharded = parti_jax.load(folder, mesh_lib.make_mesh(data=4, tensor=2))
  sampler = continuous.ContinuousSampler(sharded, 3, 1)
  assert sampler.batch_size == 4
  compiled = slots.advance._cache_size()
  check_same(turns(sampler, JOINS), expected)
  assert slots.advance._cache_size() <= compiled + 1
  assert not sampler._batch._slots.tokens.is_fully_replicated


def test_with_an_int8_cache_the_pictures_are_those_of_generate_with_one(
  folder, expected, without_thread
):
  rounded = parti_jax.load(folder, cache='int8')
  sampler = continuous.ContinuousSampler(rounded, 3, 1)
  futures = turns(sampler, JOINS)
  assert sampler._batch._slots.state.caches[0][0].values.dtype == np.int8
  changed = 0
  for (_, prompt, how), future, float_cache in zip(JOINS, futures, expected):
    how = dict(how)
    wanted = rounded.generate(prompt, 1, first_index=how.pop('image_index', 0), **how)
    np.testing.assert_array_equal(future.result(0).tokens, wanted.tokens)
    assert future.result(0).cache == 'int8'
    changed += not np.array_equal(wanted.tokens, float_cache.tokens)
  assert changed


def test_without_guidance_there_is_one_row_for_each_slot(model, without_thread):
  sampler = continuous.ContinuousSampler(model, 1, guidance_scale=1.0)
  (future,) = turns(sampler, [(0, 'red apple', {'seed': 1})])
  assert len(sampler._batch._slots.state.text_mask) == 1
  wanted = model.generate('red apple', 1, seed=1, guidance_scale=1.0)
  np.testing.assert_array_equal(future.result(0).tokens, wanted.tokens)
  with pytest.raises(UserError, match='guidance_scale=3 needs the pass without text'):
    sampler.submit('red apple', guidance_scale=3.0)


def test_a_cancelled_picture_frees_its_slot(model, expected, without_thread):
  sampler = continuous.ContinuousSampler(model, 1, 1)
  running, waiting, last = (sampler.submit(*JOINS[row][1:2], **JOINS[row][2]) for row in (2, 3, 0))
  sampler._step()
  sampler._step()
  assert (sampler.running, sampler.waiting) == (1, 2)
  # What waits is gone at once, although the slot is still taken.
  assert waiting.cancel()
  sampler._step()
  assert (sampler.running, sampler.waiting) == (1, 1)
  assert concurrent.futures.wait([waiting], 0).done == {waiting}
  assert running.cancel()
  sampler._step()
  assert (sampler.running, sampler.waiting) == (1, 0)
  assert concurrent.futures.wait([running], 0).done == {running}
  assert sampler._batch._running[0].future is last
  turns(sampler)
  check_same([last], expected[:1])


@pytest.mark.parametrize(
  'behind, asked, running, waiting',
  [
    (1, 3, 0, 3),  # Enough wait for all three slots, the last of which are free one call later.
    (1, 2, 1, 1),
    (2, 3, 3, 2),  # The wait would be too long.
  ],
)
def test_free_slots_wait_for_others_that_are_free_soon(
  model, expected, without_thread, behind, asked, running, waiting
):
  sampler = continuous.ContinuousSampler(model, 3, 1)
  ask = lambda count: [sampler.submit(JOINS[0][1], **JOINS[0][2]) for _ in range(count)]
  futures = ask(1)
  for _ in range(behind):
    sampler._step()
  futures += ask(2)
  while sampler.running != 2:
    sampler._step()
  futures += ask(asked)
  sampler._step()
  assert (sampler.running, sampler.waiting) == (running, waiting)
  turns(sampler)
  check_same(futures, expected[:1] * len(futures))


@pytest.mark.parametrize('batch_size, order', [(2, ['wait', 'ask', 'wait']), (1, ['ask', 'wait'])])
def test_with_free_slots_pictures_join_once_the_previous_call_is_over(
  model, without_thread, monkeypatch, batch_size, order
):
  sampler = continuous.ContinuousSampler(model, batch_size, 1)
  sampler.submit(JOINS[0][1])
  sampler._step()
  found = []

  def ask(count):
    found.append('ask')
    return []

  with monkeypatch.context() as patch:
    patch.setattr(jax, 'block_until_ready', lambda arrays: found.append('wait'))
    sampler._batch.step(ask, 0)
  assert found == order
  turns(sampler)


def test_an_error_of_one_picture_leaves_the_others_alone(
  model, expected, without_thread, monkeypatch
):
  sampler = continuous.ContinuousSampler(model, 3, 1)
  futures = [sampler.submit(JOINS[0][1], **JOINS[0][2])]
  sampler._step()
  with monkeypatch.context() as patch:
    patch.setattr(slots, 'encode', _raising)
    futures.append(sampler.submit('blue ball'))
    sampler._step()
  assert sampler.running == 1
  turns(sampler)
  check_same(futures[:1], expected[:1])
  with pytest.raises(RuntimeError, match='out of memory'):
    futures[1].result(0)


def test_after_an_error_of_the_batch_later_pictures_are_sampled(
  model, expected, without_thread, monkeypatch
):
  sampler = continuous.ContinuousSampler(model, 3, 1)
  lost = sampler.submit('blue ball')
  sampler._step()
  with monkeypatch.context() as patch:
    patch.setattr(slots, 'advance', _raising)
    sampler._step()
  with pytest.raises(RuntimeError, match='out of memory'):
    lost.result(0)
  assert sampler.running == 0
  check_same(turns(sampler, JOINS[:1]), expected[:1])


def test_an_error_of_the_last_picture_does_not_reach_the_next_ones(
  model, expected, without_thread, monkeypatch
):
  sampler = continuous.ContinuousSampler(model, 3, 9)
  lost = sampler.submit('blue ball')
  sampler._step()
  assert (len(sampler._batch._drawn), sampler.running) == (1, 0)

  def deleted(part):
    part.delete()  # Stands for what a failed call has left: any use of it is an error.
    return part

  jax.tree.map(deleted, (sampler._batch._slots, sampler._batch._drawn[0].arrays))
  sampler._step()
  with pytest.raises(RuntimeError, match='deleted'):
    lost.result(0)
  check_same(turns(sampler, JOINS[:1]), expected[:1])


def test_an_error_before_pictures_have_joined_reaches_all_of_them(
  model, without_thread, monkeypatch
):
  sampler = continuous.ContinuousSampler(model, 3, 1)
  futures = [sampler.submit('blue ball', seed=seed) for seed in range(3)]
  monkeypatch.setattr(slots.Requests, 'set', _raising)
  sampler._step()
  for future in futures:
    with pytest.raises(RuntimeError, match='out of memory'):
      future.result(0)
  assert (sampler.running, sampler.waiting) == (0, 0)


def test_the_end_of_the_thread_reaches_pictures_at_all_stages(model, without_thread, monkeypatch):
  sampler = continuous.ContinuousSampler(model, 1, 9)
  futures = [sampler.submit('blue ball', seed=seed) for seed in range(3)]
  sampler._step()
  assert (len(sampler._batch._drawn), sampler.running, sampler.waiting) == (1, 0, 2)

  def ending(*unused_args, **unused_kwargs):
    raise SystemExit('the end')

  monkeypatch.setattr(slots, 'advance', ending)
  with pytest.raises(SystemExit):
    _WORK(sampler)
  for future in futures:
    assert str(future.exception(0)) == 'the end'
  with pytest.raises(UserError, match='closed'):
    sampler.submit('red apple')


def test_after_an_exception_in_its_context_nobody_waits_for_a_slot(model, without_thread):
  with pytest.raises(KeyboardInterrupt):
    with continuous.ContinuousSampler(model, 1, 1) as sampler:
      running, waiting = sampler.submit('red apple', seed=3), sampler.submit('blue ball')
      sampler._step()
      raise KeyboardInterrupt
  assert waiting.cancelled() and not running.done()
  turns(sampler)
  assert running.result(0).prompts == ['red apple']


def _raising(*args, **kwargs):
  raise RuntimeError('out of memory')


def test_threads_share_a_sampler(model, expected):
  found = {}
  with continuous.ContinuousSampler(model, 3, 1) as sampler:

    def ask(row):
      found[row] = sampler.submit(JOINS[row][1], **JOINS[row][2])
      found[row].result()

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(len(JOINS))]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  check_same([found[row] for row in range(len(JOINS))], expected)


def test_closing_finishes_what_was_asked_for(model, expected):
  sampler = continuous.ContinuousSampler(model, 3, 1)
  futures = [sampler.submit(prompt, **how) for _, prompt, how in JOINS]
  sampler.close()
  check_same(futures, expected)
  with pytest.raises(UserError, match='closed'):
    sampler.submit('red apple')
  sampler.close()  # A second time there is nothing to do.
  assert not sampler._thread.is_alive()


def test_closing_may_cancel_what_waits(model, without_thread, expected):
  sampler = continuous.ContinuousSampler(model, 1, 1)
  running, waiting = sampler.submit('red apple', seed=3), sampler.submit('blue ball')
  sampler._step()
  sampler.close(cancel_waiting=True)
  assert waiting.cancelled() and not running.done()
  turns(sampler)
  check_same([running], expected[:1])


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'prompt': ' '}, 'prompt 1 is empty'),
    ({'prompt': 7}, 'prompt=7'),
    ({'seed': -1}, 'seed=-1'),
    ({'image_index': 2**31}, 'image_index=2147483648'),
    ({'temperature': -1.0}, 'temperature=-1 is negative'),
    ({'exit_threshold': 0.5}, 'exit_threshold=0.5 is not possible with continuous batching'),
    ({'guidance_skip_threshold': 0.5}, 'guidance_skip_threshold=0.5 is not possible'),
    ({'speculative_window': 4}, 'speculative_window=4 is not possible'),
  ],
)
def test_requests_that_no_slot_can_sample(model, without_thread, arguments, message):
  sampler = continuous.ContinuousSampler(model, 2)
  with pytest.raises(UserError, match=message):
    sampler.submit(**{'prompt': 'red apple'} | arguments)
  assert sampler.waiting == 0


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'batch_size': 0}, 'batch_size=0'),
    ({'tokens_per_call': 2}, 'does not divide the 9 image tokens of a picture; choose .* 1, 3, 9$'),
    ({'speculative_window': 4}, 'speculative_window=4 is not possible'),
    ({'guidance': 2.0}, 'unknown setting'),
  ],
)
def test_samplers_that_cannot_be(model, arguments, message):
  with pytest.raises(UserError, match=message):
    continuous.ContinuousSampler(model, **arguments)


@pytest.mark.parametrize(
  'total, pieces',
  [
    (0, []),
    (1, [(0, 1, 1)]),
    (2, [(0, 1, 1), (1, 1, 1)]),
    (3, [(0, 4, 3)]),
    (6, [(0, 4, 4), (4, 1, 1), (5, 1, 1)]),
    (9, [(0, 16, 9)]),
    (16, [(0, 16, 16)]),
  ],
)
def test_batches_of_few_sizes(total, pieces):
  sizes = running_batch._sizes(16, 1)
  assert sizes == [1, 4, 16]
  assert list(running_batch._pieces(total, sizes)) == pieces


def test_batches_over_a_mesh_are_divisible():
  assert running_batch._sizes(24, 8) == [8, 24]
  assert running_batch._sizes(8, 8) == [8]
  assert list(running_batch._pieces(11, [8, 24])) == [(0, 8, 8), (8, 8, 3)]


def previews_of(model, tokens, rows, grid=(3, 3)):
  """The picture of the first rows, with the last of them repeated, and blank below."""
  squares = np.asarray(tokens).reshape(grid)
  filled = squares[np.minimum(np.arange(grid[0]), rows - 1)].reshape(1, -1)
  decoded = model.tokenizer.apply(
    {'params': model.tokenizer_params}, jnp.asarray(filled), method='detokenize'
  )
  image = np.array(pixels.to_bytes(decoded))[0]
  image[rows * len(image) // grid[0] :] = slots.BLANK
  return image


@pytest.mark.parametrize(
  'tokens_per_call, previews, rows',
  [(1, None, [1, 2]), (3, None, [1, 2]), (9, None, []), (1, 1, [1]), (3, 9, [1, 2]), (1, 0, [])],
)
def test_previews_show_the_rows_that_are_there(
  model, expected, without_thread, tokens_per_call, previews, rows
):
  sampler = continuous.ContinuousSampler(model, 3, tokens_per_call)
  seen = {row: [] for row in range(len(JOINS))}
  joins = [
    (at, prompt, how | ({'on_preview': seen[row].append, 'previews': previews} if row % 2 else {}))
    for row, (at, prompt, how) in enumerate(JOINS)
  ]
  futures = turns(sampler, joins)
  check_same(futures, expected)
  for row, shown in seen.items():
    assert [preview.rows for preview in shown] == (rows if row % 2 else [])
    for preview in shown:
      assert preview.of_rows == 3
      wanted = previews_of(model, expected[row].tokens, preview.rows)
      assert np.abs(preview.image.astype(int) - wanted).max() <= 1


def test_previews_are_as_far_apart_as_possible():
  assert continuous._preview_at((8, 8), 3) == (16, 32, 48)
  assert continuous._preview_at((8, 2), None) == tuple(range(2, 16, 2))
  assert continuous._preview_at((1, 4), None) == ()


def test_an_error_of_a_preview_is_that_of_its_picture(model, expected, without_thread):
  sampler = continuous.ContinuousSampler(model, 2, 3)
  bad = sampler.submit('blue ball', on_preview=_raising)
  good = sampler.submit(JOINS[0][1], **JOINS[0][2])
  turns(sampler)
  with pytest.raises(RuntimeError, match='out of memory'):
    bad.result(0)
  check_same([good], expected[:1])
  # The last preview of this one is handed out when its tokens are complete.
  late = sampler.submit('blue ball', on_preview=_raising, previews=1)
  turns(sampler)
  assert str(late.exception(0)) == 'out of memory'


def test_previews_end_with_a_cancelled_picture(model, without_thread):
  sampler = continuous.ContinuousSampler(model, 1, 3)
  seen = []
  future = sampler.submit('blue ball', on_preview=seen.append)
  sampler._step()
  future.cancel()
  turns(sampler)
  assert seen == [] and future.cancelled()
  with pytest.raises(UserError, match='previews=-1'):
    sampler.submit('blue ball', on_preview=seen.append, previews=-1)


def kept_of(tokens, places):
  """Tokens to take over: those of a picture at some places."""
  return np.where(np.isin(np.arange(9), places), np.asarray(tokens).reshape(-1), -1)


@pytest.mark.parametrize('places', [(), (0, 1), (4,), (3, 4, 5, 8), range(9)])
def test_a_picture_that_keeps_its_own_tokens_stays(model, expected, without_thread, places):
  sampler = continuous.ContinuousSampler(model, 3, 3)
  joins = [
    (at, prompt, how | ({'kept': kept_of(expected[row].tokens, places)} if row % 2 == 0 else {}))
    for row, (at, prompt, how) in enumerate(JOINS)
  ]
  check_same(turns(sampler, joins), expected)


def test_kept_tokens_are_taken_over_and_shape_what_follows(model, expected, without_thread):
  sampler = continuous.ContinuousSampler(model, 2, 3)
  how = JOINS[1][2]
  kept = kept_of(expected[0].tokens, (0, 4, 7))
  seen = []
  (future,) = turns(sampler, [(0, JOINS[1][1], how | {'kept': kept, 'on_preview': seen.append})])
  tokens = future.result(0).tokens[0, 0]
  np.testing.assert_array_equal(tokens[kept >= 0], kept[kept >= 0])
  free = np.flatnonzero(kept < 0)
  assert (tokens[free] != expected[1].tokens[0, 0, free]).any()
  # What was sampled is what keeping it as well would give.
  (again,) = turns(
    sampler, [(0, JOINS[1][1], how | {'kept': np.where(free[3] > np.arange(9), tokens, kept)})]
  )
  np.testing.assert_array_equal(again.result(0).tokens[0, 0], tokens)
  # A preview shows kept tokens that are further down, too: those at row 1, column 1 and so on.
  blank = (seen[0].image == slots.BLANK).all(axis=-1)
  size = len(blank) // 3
  for place in range(9):
    part = blank[place // 3 * size :, place % 3 * size :][:size, :size]
    assert part.all() == (place >= 3 and kept[place] < 0)
  # The next picture in the slot keeps nothing.
  check_same(turns(sampler, JOINS[:1]), expected[:1])


@pytest.mark.parametrize(
  'kept, message',
  [
    (np.zeros(8, np.int32), 'kept is int32 .8., expected int32 .9.'),
    (np.zeros(9), 'kept is float64'),
    (np.full(9, -2), 'neither -1 nor'),
    (np.full(9, 12), 'neither -1 nor one of the 12 codes'),
  ],
)
def test_tokens_that_cannot_be_kept(model, without_thread, kept, message):
  sampler = continuous.ContinuousSampler(model, 1)
  with pytest.raises(UserError, match=message):
    sampler.submit('red apple', kept=kept)


def test_a_negative_prompt_is_on_the_other_side_of_guidance(model, without_thread):
  sampler = continuous.ContinuousSampler(model, 2, 3)
  joins = [
    (0, 'red apple', {'seed': 3, 'negative': 'blue ball', 'guidance_scale': 3.0}),
    (1, 'red apple', {'seed': 3, 'guidance_scale': 3.0}),
  ]
  steered, plain = turns(sampler, joins)
  wanted = model.generate('red apple', 1, seed=3, guidance_scale=3.0)
  np.testing.assert_array_equal(plain.result(0).tokens, wanted.tokens)
  assert not np.array_equal(steered.result(0).tokens, wanted.tokens)
  with pytest.raises(UserError, match='negative is the other side of guidance'):
    sampler.submit('red apple', negative='blue ball', guidance_scale=1.0)
  with pytest.raises(UserError, match='negative=7'):
    sampler.submit('red apple', negative=7)
