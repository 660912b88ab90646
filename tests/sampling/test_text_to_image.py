"""Prompts to pictures through the library."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import images
from parti_jax.sampling import text_to_image

PROMPTS = ['red apple', 'waving hand: dark skin tone', 'blue ball']


@pytest.fixture(scope='module')
def pipeline(tiny_folder):
  return parti_jax.load(tiny_folder)


@pytest.fixture(scope='module')
def drawn(pipeline):
  return pipeline.generate(PROMPTS, num_images=3, seed=7)


def test_shapes_and_what_it_was_drawn_from(pipeline, drawn):
  assert (pipeline.image_size, pipeline.codebook_size, pipeline.model_name) == (8, 12, 'tiny')
  assert drawn.images.shape == (3, 3, 8, 8, 3) and drawn.images.dtype == np.uint8
  assert drawn.tokens.shape == (3, 3, 4)
  assert (drawn.prompts, drawn.seed) == (PROMPTS, 7)
  assert (drawn.settings.guidance_scale, drawn.settings.top_p) == (2.0, 0.99)
  assert len(np.unique(drawn.images.reshape(9, -1), axis=0)) > 4


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_the_same_pictures_in_any_batch(pipeline, drawn, batch_size):
  again = pipeline.generate(PROMPTS, num_images=3, seed=7, batch_size=batch_size)
  np.testing.assert_array_equal(again.images, drawn.images)


def test_the_same_pictures_in_another_order_and_alone(pipeline, drawn):
  turned = pipeline.generate(PROMPTS[::-1], num_images=3, seed=7, batch_size=5)
  np.testing.assert_array_equal(turned.images, drawn.images[::-1])
  fewer = pipeline.generate(PROMPTS[1], num_images=2, seed=7)
  np.testing.assert_array_equal(fewer.images[0], drawn.images[1, :2])


def test_pictures_may_be_numbered_from_elsewhere(pipeline, drawn):
  later = pipeline.generate(PROMPTS, num_images=2, seed=7, first_index=[1, 0, 1])
  assert later.image_index.tolist() == [[1, 2], [0, 1], [1, 2]]
  for row, start in enumerate([1, 0, 1]):
    np.testing.assert_array_equal(later.images[row], drawn.images[row, start : start + 2])


def test_seed_prompt_and_settings_matter(pipeline, drawn):
  for change in (
    {'seed': 8},
    {'guidance_scale': 9.0},
    {'temperature': 5.0},
    {'top_k': 1},
    {'guidance_ramp': 'linear'},
  ):
    other = pipeline.generate(PROMPTS, num_images=3, **{'seed': 7} | change)
    assert np.any(other.tokens != drawn.tokens), change


def test_easy_tokens_take_less_where_the_settings_say_so(pipeline, drawn):
  assert drawn.usage is None
  skipping = {'exit_threshold': 0.0, 'guidance_skip_threshold': 0.0}
  result = pipeline.generate(PROMPTS, num_images=3, seed=7, batch_size=5, **skipping)
  assert result.usage.layers.tolist() == [[[1] * 4] * 3] * 3
  assert result.usage.unguided.shape == (3, 3, 4) and result.usage.unguided.all()
  assert result.usage.computed.shape == (3, 3, 4, 2)
  assert '1.00 of 2 layers per token' in result.usage.summary(pipeline.decoder_layers)
  off = pipeline.generate(PROMPTS, num_images=3, seed=7, exit_threshold=1.0)
  assert off.usage is None
  np.testing.assert_array_equal(off.tokens, drawn.tokens)


def test_a_window_of_drafts_takes_fewer_passes(pipeline, drawn):
  assert drawn.passes is None
  # The window is longer than a picture.
  settings = {'num_images': 3, 'seed': 7, 'batch_size': 5, 'speculative_window': 9}
  result = pipeline.generate(PROMPTS, **settings, speculative_rule='equal')
  np.testing.assert_array_equal(result.images, drawn.images)
  assert result.passes.needed.shape == result.passes.computed.shape == (3, 3)
  assert np.all((result.passes.needed >= 1) & (result.passes.needed <= result.passes.computed))
  assert np.all(result.passes.computed <= 4)
  mean = result.passes.needed.mean()
  summary = result.passes.summary(4)
  assert summary.startswith(f'{mean:.1f} decoder passes per picture of 4 tokens')
  assert summary.endswith(f'{4 / mean:.2f} tokens accepted per pass')
  ratio = pipeline.generate(PROMPTS, **settings)
  assert ratio._metadata()['speculative_window'] == '9'
  assert np.any(ratio.tokens != drawn.tokens)
  alone = pipeline.generate(PROMPTS[1:2], **settings)
  np.testing.assert_array_equal(alone.tokens[0], ratio.tokens[1])
  greedy = pipeline.generate(PROMPTS, **settings, temperature=0)
  np.testing.assert_array_equal(
    greedy.tokens, pipeline.generate(PROMPTS, num_images=3, seed=7, temperature=0).tokens
  )


def test_greedy_pictures_of_a_prompt_are_alike(pipeline):
  greedy = pipeline.generate(PROMPTS, num_images=2, temperature=0)
  np.testing.assert_array_equal(greedy.images[:, 0], greedy.images[:, 1])
  likeliest = pipeline.generate(PROMPTS, num_images=2, top_k=1)
  np.testing.assert_array_equal(greedy.images, likeliest.images)


@pytest.mark.parametrize(
  'extreme, limit',
  [
    ({'temperature': 1e-39}, {'temperature': 0}),
    ({'temperature': 1e-46}, {'temperature': 0}),
    ({'temperature': 1e-19}, {'temperature': 0}),
    ({'top_p': 1e-46}, {'temperature': 0}),
    ({'top_p': 1e-39}, {'temperature': 0}),
    ({'top_k': 3_000_000_000}, {'top_k': 0}),
    ({'guidance_scale': 1 + 1e-9}, {'guidance_scale': 1}),
  ],
)
def test_extreme_settings_draw_as_their_limits(pipeline, extreme, limit):
  one, other = (
    pipeline.generate(PROMPTS, num_images=2, **settings).tokens for settings in (extreme, limit)
  )
  np.testing.assert_array_equal(one, other)
  assert len(np.unique(one)) > 1


@pytest.mark.parametrize('extreme', [{'temperature': 1e-39}, {'top_p': 1e-46}])
def test_extreme_settings_draw_as_their_limits_in_bfloat16(tiny_folder, monkeypatch, extreme):
  monkeypatch.setattr(model_folder, '_compute_dtype', lambda *_: 'bfloat16')
  in_bfloat16 = parti_jax.load(tiny_folder)
  one, other = (
    in_bfloat16.generate(PROMPTS, num_images=2, **settings).tokens
    for settings in (extreme, {'temperature': 0})
  )
  np.testing.assert_array_equal(one, other)


def test_pictures_whose_settings_differ_a_little_are_kept_apart(pipeline, tmp_path):
  for temperature in (0.1234567, 0.1234568):
    pipeline.generate('red apple', num_images=1, temperature=temperature).save(tmp_path)
  assert len(os.listdir(tmp_path)) == 2


def test_pictures_are_the_decoded_tokens(parts, drawn):
  tokenizer = vit_vqgan.ViTVQGAN(parts['tokenizer_config'])
  pixels = tokenizer.apply(
    {'params': parts['tokenizer_params']},
    jnp.asarray(drawn.tokens.reshape(9, -1)),
    method='detokenize',
  )
  difference = np.asarray(pixels) * 255 - drawn.images.reshape(pixels.shape)
  assert np.abs(difference).max() < 0.51


def test_tokenize_and_reconstruct(parts, pipeline):
  pictures = np.random.default_rng(0).integers(0, 256, (67, 8, 8, 3)).astype(np.uint8)
  tokenizer = vit_vqgan.ViTVQGAN(parts['tokenizer_config'])
  tokens = tokenizer.apply(
    {'params': parts['tokenizer_params']}, jnp.asarray(pictures) / 255, method='tokenize'
  )
  np.testing.assert_array_equal(pipeline.tokenize(pictures), tokens)
  pixels = tokenizer.apply({'params': parts['tokenizer_params']}, tokens, method='detokenize')
  back = pipeline.reconstruct(pictures)
  assert back.dtype == np.uint8
  assert np.abs(np.asarray(pixels) * 255 - back).max() < 0.51
  assert pipeline.tokenize(pictures[:0]).shape == (0, 4)


def test_on_a_mesh_the_pictures_are_the_same(tiny_folder, drawn):
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  mesh = mesh_lib.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
  sharded = text_to_image.load(tiny_folder, mesh)
  result = sharded.generate(PROMPTS, num_images=3, seed=7)
  np.testing.assert_array_equal(result.tokens, drawn.tokens)
  assert np.abs(result.images.astype(int) - drawn.images).max() <= 1


@pytest.mark.parametrize('prompts', ['', '  ', ['red apple', '\t'], []])
def test_no_prompt(pipeline, prompts):
  with pytest.raises(UserError, match='prompt'):
    pipeline.generate(prompts)


@pytest.mark.parametrize(
  'name, value',
  [
    ('num_images', 0),
    ('num_images', -3),
    ('seed', -1),
    ('seed', 2**32),
    ('top_p', 0.0),
    ('top_k', -1),
    ('temperature', -1.0),
    ('guidance_scale', -0.5),
    ('batch_size', 0),
    ('guidance_ramp', 'steep'),
  ],
)
def test_bad_arguments_are_named(pipeline, name, value):
  with pytest.raises(UserError, match=f'^{name}='):
    pipeline.generate('red apple', **{name: value})


@pytest.mark.parametrize(
  'name, value',
  [
    ('num_images', 1.7),
    ('num_images', 4.0),
    ('num_images', 2**31),
    ('num_images', '1'),
    ('num_images', None),
    ('num_images', [1]),
    ('seed', 2**64),
    ('seed', 1.0),
    ('seed', True),
    ('seed', float('nan')),
    ('batch_size', 2.0),
    ('batch_size', 2**64),
    ('batch_size', '8'),
    ('first_index', 1.7),
    ('first_index', 2**31),
    ('first_index', 2**32),
    ('first_index', -1),
    ('first_index', '1'),
    ('first_index', None),
    ('first_index', float('nan')),
    ('first_index', True),
    ('first_index', 2**31 - 1),
    ('first_index', np.array([2**32])),
    ('first_index', [1.5]),
    ('first_index', [[1]]),
    ('first_index', np.zeros((1, 1), int)),
    ('first_index', {0: 1}),
    ('first_index', ['1']),
    ('rank', 'no'),
    ('upscale', None),
    ('progress', 'x'),
    ('top_k', 2.0),
    ('temperature', '1'),
    ('guidance_ramp', ['linear']),
  ],
)
def test_arguments_of_another_type_are_named_in_one_line(pipeline, name, value):
  with pytest.raises(UserError, match=rf'^{name}(\[0\])?=') as caught:
    pipeline.generate('red apple', **{'num_images': 2} | {name: value})
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('first_index', [[0, 1], [], np.array([1, 2, 3]), (4,) * 5])
def test_first_indices_are_one_for_each_prompt(pipeline, first_index):
  with pytest.raises(UserError, match=f'^first_index has {len(first_index)} numbers for 1 prompt'):
    pipeline.generate('red apple', num_images=1, first_index=first_index)


@pytest.mark.parametrize(
  'first_index', [2**31 - 2, np.int64(2**31 - 2), [2**31 - 2], np.array([2**31 - 2], np.uint32)]
)
def test_the_last_index_is_that_of_an_int32(pipeline, first_index):
  drawn = pipeline.generate('red apple', num_images=2, first_index=first_index)
  assert drawn.image_index.tolist() == [[2**31 - 2, 2**31 - 1]]


@pytest.mark.parametrize(
  'prompts, message',
  [
    (None, 'prompts=None must be a string'),
    (5, 'prompts=5 must be a string'),
    (b'red apple', "prompts=b'red apple' must be"),
    (np.array('red apple'), 'prompts=array'),
    ({'red apple': 1}, 'prompts='),
    (['red apple', 5], 'prompt 2 is 5, which is not a string'),
    ([['red apple']], r"prompt 1 is \['red apple'\]"),
    ([None], 'prompt 1 is None'),
    ('\ud800 apple', 'prompt 1 has characters that are not Unicode'),
  ],
)
def test_what_are_no_prompts(pipeline, prompts, message):
  with pytest.raises(UserError, match=f'^{message}') as caught:
    pipeline.generate(prompts, num_images=1)
  assert '\n' not in str(caught.value)


def test_prompts_may_come_from_anywhere(pipeline):
  asked = ['red apple', 'blue ball']
  for prompts in (tuple(asked), np.array(asked), iter(asked), dict.fromkeys(asked).keys()):
    assert pipeline.generate(prompts, num_images=1, temperature=0).prompts == asked


def test_more_pictures_than_memory_are_refused_before_anything_is_drawn(pipeline):
  with pytest.raises(UserError, match='2,147,483,647 pictures'):
    pipeline.generate('red apple', num_images=2**31 - 1)


def test_settings_that_there_are_not_are_named(pipeline):
  with pytest.raises(UserError, match="^unknown setting 'guidance'; the settings are guidance_s"):
    pipeline.generate('red apple', guidance=3)


@pytest.mark.parametrize(
  'call',
  [
    lambda pipeline, drawn: pipeline.tokenize(None),
    lambda pipeline, drawn: pipeline.tokenize([[1], [1, 2]]),
    lambda pipeline, drawn: pipeline.reconstruct(5),
    lambda pipeline, drawn: drawn.grid(0),
    lambda pipeline, drawn: drawn.grid('8'),
    lambda pipeline, drawn: drawn.grid(1.5),
    lambda pipeline, drawn: drawn.save(None),
    lambda pipeline, drawn: drawn.save(5),
    lambda pipeline, drawn: drawn.save('gs://bucket/out'),
    lambda pipeline, drawn: drawn.save_grid(5),
    lambda pipeline, drawn: drawn.save_grid('out', 0),
    lambda pipeline, drawn: parti_jax.load(5),
    lambda pipeline, drawn: parti_jax.load(b'demo'),
    lambda pipeline, drawn: parti_jax.load(''),
    lambda pipeline, drawn: parti_jax.load('a\0b'),
    lambda pipeline, drawn: parti_jax.load(['demo']),
    lambda pipeline, drawn: model_folder.load(5),
    lambda pipeline, drawn: model_folder.load(None),
  ],
)
def test_other_arguments_that_can_not_be(pipeline, drawn, call, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError) as caught:
    call(pipeline, drawn)
  assert '\n' not in str(caught.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
  'pictures',
  [
    np.zeros((2, 8, 8, 3), np.float32),
    np.zeros((8, 8, 3), np.uint8),
    np.zeros((2, 9, 8, 3), np.uint8),
  ],
)
def test_pictures_of_another_kind(pipeline, pictures):
  with pytest.raises(UserError, match='^images are'):
    pipeline.reconstruct(pictures)


def test_a_long_prompt_is_cut_with_a_warning(pipeline):
  with pytest.warns(UserWarning, match='left out: .*zebra'):
    pipeline.generate('red apple ' * 20 + 'zebra', num_images=1)


def test_a_training_run_is_no_model(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='parti-jax export'):
    parti_jax.load(tmp_path)


def test_saved_pictures_tell_what_they_are(drawn, tmp_path):
  paths = drawn.save(tmp_path)
  assert len(set(paths)) == 9 == len(os.listdir(tmp_path))
  where = itertools.product(range(3), range(3))
  for path, (row, column), shown in zip(paths, where, itertools.chain(*drawn.pil())):
    np.testing.assert_array_equal(np.asarray(Image.open(path)), drawn.images[row, column])
    np.testing.assert_array_equal(np.asarray(shown), drawn.images[row, column])
    assert images.read_metadata(path) == {
      'prompt': PROMPTS[row],
      'seed': '7',
      'image_index': str(column),
      'guidance_scale': '2',
      'temperature': '1',
      'top_k': '0',
      'top_p': '0.99',
      'guidance_ramp': 'constant',
      'guidance_start': '1',
      'exit_threshold': '1',
      'guidance_skip_threshold': '1',
      'model': 'tiny',
      'software': images.SOFTWARE,
    }
  assert drawn.save(tmp_path) == paths
  grid = drawn.save_grid(tmp_path, display_size=20)
  assert images.read_metadata(grid)['prompt'].splitlines() == PROMPTS
  assert Image.open(grid).size == drawn.grid(display_size=20).size


@pytest.mark.process
def test_sampling_imports_no_tensorflow():
  script = (
    'import sys\n'
    'import parti_jax.cli.generate\n'
    'import parti_jax.sampling.text_to_image\n'
    "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'orbax', 't5'} & set(sys.modules)\n"
    'assert not heavy, heavy\n'
  )
  subprocess.run([sys.executable, '-c', script], check=True)
