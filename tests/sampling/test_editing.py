"""Kept tokens, negative prompts, streams and likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import dalle_mini
from parti_jax.models import generators
from parti_jax.models import llamagen
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding
from parti_jax.sampling import editing
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import parameters
from parti_jax.sampling import slots
from parti_jax.sampling import text_to_image

SIZES = {'decoder_layers': 4, 'width': 16, 'mlp_width': 24, 'codebook_size': 11, 'grid': (4, 3)}
SIZES |= {'dtype': 'float32', 'heads': 2}
TEXT = {'text_vocabulary': 20, 'text_length': 5}
T5 = t5_encoder.T5EncoderConfig(
  layers=1, width=12, mlp_width=16, heads=2, head_dim=6, dtype='float32', **TEXT
)
CONFIGS = {
  'parti': parti_config.PartiConfig(
    encoder_layers=1,
    conv_kernel=3,
    attention_patterns=attention_patterns.PATTERNS,
    kv_heads=1,
    **SIZES,
    **TEXT,
  ),
  'dalle_mini': dalle_mini.DalleMiniConfig(encoder_layers=1, **SIZES, **TEXT),
  'llamagen of classes': llamagen.LlamaGenConfig(classes=19, **SIZES),
  'llamagen of texts': llamagen.LlamaGenConfig(classes=None, text_encoder=T5, **SIZES),
}
TEXTS = np.array([[0, 7, 2, 0, 0], [0, 9, 8, 2, 0]], np.int32)
GRID, LENGTH = (4, 4), 16


def large_params(module, inputs, seed=0):
  """Random parameters for which inputs matter."""
  return random_parameters.of(module, inputs, seed, factor=3.0)


@functools.cache
def of_kind(name):
  """A config, large random parameters for sampling, and texts of two rows."""
  config = CONFIGS[name]
  inputs = generators.example_inputs(config)
  params = large_params(generators.module(config), inputs)
  texts = TEXTS if name == 'dalle_mini' else np.array([[7, 4, 1, 0, 0], [9, 8, 3, 1, 0]], np.int32)
  return config, parameters.for_sampling(config, params), texts[:, : config.text_length]


@functools.partial(jax.jit, static_argnames=('config', 'prefix'))
def drawn(config, params, texts, sampling, steering, prefix, seed):
  keys = decoding.image_keys(seed, jnp.arange(len(texts)))
  return decoding.sample_tokens(config, params, texts, keys, sampling, steering, prefix)


def draw(config, params, texts, sampling, steering=None, prefix=0, seed=0):
  return np.asarray(drawn(config, params, texts, sampling, steering, prefix, np.uint32(seed)))


@pytest.mark.parametrize('name, cache', [*((name, 'float') for name in CONFIGS), ('parti', 'int8')])
def test_a_draw_goes_on_from_its_own_tokens(name, cache):
  """Whatever a draw keeps of itself, the rest comes out the same; of another, it does not."""
  config, params, texts = of_kind(name)
  sampling = decoding.Sampling(guidance_scale=1.5, temperature=5.0, guided=True, cache=cache)
  plain = draw(config, params, texts, sampling)
  other = np.random.default_rng(0).integers(0, config.codebook_size, plain.shape).astype(np.int32)
  scattered = np.arange(12) % 3 == 1
  kept = {0: scattered, 6: (np.arange(12) < 6) | scattered, 7: np.arange(12) < 7}
  for prefix, places in kept.items():
    kept_everywhere = np.broadcast_to(places, plain.shape)
    found = draw(
      config, params, texts, sampling, decoding.Steering(tokens=plain, kept=kept_everywhere), prefix
    )
    np.testing.assert_array_equal(found, plain)
    found = draw(
      config, params, texts, sampling, decoding.Steering(tokens=other, kept=kept_everywhere), prefix
    )
    np.testing.assert_array_equal(found[:, places], other[:, places])
    assert np.any(found[:, ~places] != plain[:, ~places])


@pytest.mark.parametrize('name', CONFIGS)
def test_the_other_side_of_guidance(name):
  config, params, texts = of_kind(name)
  guided = decoding.Sampling(guidance_scale=2.5, guided=True)
  plain = draw(config, params, texts, guided)
  empty = np.asarray(generators.empty_text(config, jnp.asarray(texts)))
  np.testing.assert_array_equal(
    draw(config, params, texts, guided, decoding.Steering(others=empty)), plain
  )
  turned = draw(config, params, texts, guided, decoding.Steering(others=texts[::-1]))
  assert np.any(turned != plain)
  # A prompt on both sides leaves its own prediction.
  both = draw(config, params, texts, guided, decoding.Steering(others=texts))
  np.testing.assert_array_equal(both, draw(config, params, texts, decoding.Sampling()))


@pytest.fixture(scope='module')
def folder(parts, tmp_path_factory):
  """The tiny model with pictures of 16×16 pixels and 4×4 tokens."""
  config = dataclasses.replace(parts['generator_config'], grid=GRID)
  tokenizer = dataclasses.replace(parts['tokenizer_config'], image_size=16)
  changed = {
    'generator_config': config,
    'generator_params': large_params(parti.Parti(config), parti.example_inputs(config)),
    'tokenizer_config': tokenizer,
    'tokenizer_params': large_params(
      vit_vqgan.ViTVQGAN(tokenizer), vit_vqgan.example_inputs(tokenizer), 1
    ),
  }
  path = tmp_path_factory.mktemp('models') / 'four'
  return model_folder.save(path, dtype='float32', **parts | changed)


@pytest.fixture(scope='module')
def model(folder):
  return parti_jax.load(folder)


@pytest.fixture(scope='module')
def picture():
  return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def rows_kept(*rows):
  return np.isin(np.arange(LENGTH) // GRID[1], rows)


EDITS = {
  'top:0.5': rows_kept(0, 1),
  'bottom:0.3': rows_kept(3),
  'left:0.74': np.tile([True, True, False, False], 4),
  'right:0.25': np.tile([False, False, False, True], 4),
  'top:1': np.ones(LENGTH, bool),
}


@pytest.mark.parametrize(
  'keep, settings',
  [
    *((keep, {}) for keep in EDITS),
    ('left:0.74', {'guidance_scale': 1.0}),
    ('left:0.74', {'temperature': 0}),
    ('left:0.74', {'top_k': 3, 'top_p': 1.0}),
  ],
)
def test_a_side_is_kept(model, picture, keep, settings):
  result = model.generate(['red apple', 'blue ball'], 2, image=picture, keep=keep, **settings)
  own = model.tokenize(picture[None])[0]
  np.testing.assert_array_equal(result.kept, np.broadcast_to(EDITS[keep], (2, 2, LENGTH)))
  assert np.all((result.tokens == own)[result.kept])
  if not EDITS[keep].all():
    assert np.any((result.tokens != own)[~result.kept])


def test_nothing_kept_is_no_edit(model, picture):
  plain = model.generate('red apple', 3, seed=4)
  everything = np.ones((16, 16), bool)
  for way in ({'keep': 'left:0.2'}, {'vary': 1}, {'mask': everything}):
    result = model.generate('red apple', 3, seed=4, image=picture, **way)
    np.testing.assert_array_equal(result.images, plain.images)
    assert not result.kept.any()


def test_a_mask_takes_every_patch_that_it_touches(model, picture):
  mask = np.zeros((16, 16), bool)
  mask[3:5, 9] = True  # Rows 0 and 1, column 2.
  own = model.tokenize(picture[None])[0]
  result = model.generate('red apple', 6, image=picture, mask=mask, temperature=5)
  assert np.flatnonzero(~result.kept[0, 0]).tolist() == [2, 6]
  assert np.all((result.tokens == own)[result.kept])
  assert len(np.unique(result.tokens[0][:, [2, 6]], axis=0)) > 1


def test_masks_as_files(picture, tmp_path):
  """White in a gray mask; transparent in one with transparency, whatever its colors."""
  grey = np.zeros((16, 16), np.uint8)
  grey[0, 0], grey[8, 8] = 128, 127
  Image.fromarray(grey).save(tmp_path / 'grey.png')
  alpha = np.full((16, 16, 4), 255, np.uint8)
  alpha[15, 15, 3] = 0
  Image.fromarray(alpha).save(tmp_path / 'alpha.png')
  Image.fromarray(picture).save(tmp_path / 'picture.png')
  for name, place in (('grey', (0, 0)), ('alpha', (3, 3))):
    edit = editing.edit(
      tmp_path / 'picture.png', str(tmp_path / f'{name}.png'), None, None, 16, GRID
    )
    assert np.argwhere(~edit.kept).tolist() == [list(place)]
    np.testing.assert_array_equal(edit.image, picture)
    assert edit.metadata()['edited_image'] == 'picture.png'


@pytest.mark.parametrize('orientation', [1, 3, 6])
def test_a_photograph_and_its_mask_turn_alike(orientation, tmp_path):
  """An image program that paints a mask over a photograph keeps its EXIF orientation."""
  turn = {1: 0, 3: 2, 6: 3}[orientation]  # Counterclockwise quarters that a viewer applies.
  upright = np.zeros((24, 16), np.uint8)
  upright[10:12, :3] = 255  # The first of the four columns, in the upper half of what is left.
  exif = Image.Exif()
  exif[0x112] = orientation
  stored = Image.fromarray(np.rot90(upright, -turn))
  stored.save(tmp_path / 'mask.png', exif=exif)
  stored.convert('RGB').save(tmp_path / 'photograph.png', exif=exif)
  edit = editing.edit(
    tmp_path / 'photograph.png', tmp_path / 'mask.png', None, None, (8, 16), (2, 4)
  )
  np.testing.assert_array_equal(edit.image, np.repeat(upright[8:16, :, None], 3, axis=2))
  np.testing.assert_array_equal(edit.kept, [[0, 1, 1, 1], [1, 1, 1, 1]])


def test_a_model_of_wide_pictures_cuts_what_is_above_and_below():
  square = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
  mask = np.zeros((16, 16), bool)
  mask[:5, 15] = True  # One row of pixels of the middle, in the last column of tokens.
  edit = editing.edit(square, mask, None, None, (8, 16), (2, 4))
  np.testing.assert_array_equal(edit.image, square[4:12])
  assert edit.kept.shape == (2, 4) and np.argwhere(~edit.kept).tolist() == [[0, 3]]
  mask[4] = False
  with pytest.raises(UserError, match='marks nothing of the picture.s central area'):
    editing.edit(square, mask, None, None, (8, 16), (2, 4))
  kept = editing.edit(square, None, 'left:0.5', None, (8, 16), (2, 4)).kept
  assert kept.tolist() == 2 * [[True, True, False, False]]


def test_wide_pictures_lose_their_ends_and_so_do_their_masks(picture):
  wide = np.concatenate([picture[:, :4] * 0, picture, picture[:, :4] * 0], axis=1)
  mask = np.zeros((16, 24), bool)
  mask[:, :5] = True  # One column of pixels of the square.
  edit = editing.edit(wide, mask, None, None, 16, GRID)
  np.testing.assert_array_equal(edit.image, picture)
  np.testing.assert_array_equal(edit.kept, np.tile([False, True, True, True], (4, 1)))
  large = Image.fromarray(picture).resize((32, 32), Image.Resampling.NEAREST)
  assert editing.edit(large, None, 'top:0.5', None, 16, GRID).image.shape == (16, 16, 3)


def test_variations_have_places_of_their_own(model, picture):
  own = model.tokenize(picture[None])[0]
  result = model.generate('red apple', 4, seed=1, image=picture, vary=0.25)
  assert np.all((~result.kept).sum(axis=-1) == 4)
  assert len(np.unique(result.kept[0], axis=0)) == 4
  assert np.all((result.tokens == own)[result.kept])
  later = model.generate(
    ['blue ball', 'red apple'], 2, seed=1, first_index=2, image=picture, vary=0.25
  )
  np.testing.assert_array_equal(later.tokens[1], result.tokens[0, 2:])
  still = model.generate('red apple', 1, image=picture, vary=0)
  np.testing.assert_array_equal(still.images[0, 0], model.reconstruct(picture[None])[0])


def reference_likelihoods(model, texts, tokens):
  """Log-likelihoods of image tokens by the whole network, as in training."""
  loaded = model_folder.load(model)
  network = parti.Parti(loaded.generator_config)
  logits = network.apply(
    {'params': jax.tree.map(np.asarray, loaded.generator_params)},
    jnp.asarray(texts),
    jnp.asarray(tokens),
  )
  return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)[..., 0]


def test_likelihood_is_that_of_the_network(model, folder, picture):
  prompts = ['red apple', 'green apple', 'blue ball']
  pictures = [picture, picture[::-1]]
  found = model.likelihood(prompts, pictures, batch_size=4)
  assert found.shape == (3, 2) and len(np.unique(found)) == 6
  tokens = model.tokenize(np.stack(pictures))
  for row, text in enumerate(model.encode_prompts(prompts)):
    expected = reference_likelihoods(folder, np.stack([text, text]), tokens).mean(axis=1)
    np.testing.assert_allclose(found[row], expected, rtol=1e-5)
  np.testing.assert_allclose(model.likelihood('red apple', picture), found[:1, :1], rtol=1e-5)


def test_the_best_of_several_fits_what_follows(model, folder, picture):
  edited = {'seed': 2, 'image': picture, 'keep': 'bottom:0.5', 'temperature': 5}
  best = model.generate('red apple', 2, best_of=3, **edited)
  candidates = model.generate('red apple', 6, **edited)
  text = np.repeat(model.encode_prompts(['red apple']), 6, axis=0)
  after = reference_likelihoods(folder, text, candidates.tokens[0])[:, 8:].sum(axis=1)
  assert len(np.unique(after)) == 6
  chosen = [int(np.argmax(after[:3])), 3 + int(np.argmax(after[3:]))]
  assert best.image_index.tolist() == [chosen]
  np.testing.assert_array_equal(best.images[0], candidates.images[0, chosen])
  np.testing.assert_allclose(best.likelihoods[0], after[chosen], rtol=1e-5)
  assert best.kept.shape == (1, 2, LENGTH)
  assert best.metadata(0, 1)['best_of'] == '3'
  assert best.metadata(0, 1)['image_index'] == str(chosen[1])
  assert float(best.metadata(0, 0)['likelihood_after_hole']) == pytest.approx(
    after[chosen[0]], abs=1e-3
  )


@pytest.mark.parametrize(
  'edited', [{}, {'keep': 'top:0.5'}, {'vary': 0.5}, {'negative': 'blue ball'}], ids=str
)
def test_a_stream_ends_with_the_same_pictures(model, picture, edited):
  if edited and 'negative' not in edited:
    edited = {'image': picture, **edited}
  result = model.generate(['red apple', 'blue ball'], 2, seed=5, **edited)
  partials = list(model.stream(['red apple', 'blue ball'], 2, seed=5, **edited))
  assert [partial.rows for partial in partials] == ([3, 4] if 'keep' in edited else [1, 2, 3, 4])
  last = partials[-1]
  np.testing.assert_array_equal(last.result.images, result.images)
  np.testing.assert_array_equal(last.images, result.images)
  assert last.result.metadata(1, 0) == result.metadata(1, 0)
  for partial in partials[:-1]:
    assert partial.result is None and partial.of_rows == 4
    np.testing.assert_array_equal(partial.tokens, result.tokens[..., : 4 * partial.rows])
    if 'vary' in edited:
      kept = result.kept.reshape(2, 2, 4, 4)[..., partial.rows :, :]
      blank = np.all(partial.images[:, :, 4 * partial.rows :] == slots.BLANK, axis=-1)
      np.testing.assert_array_equal(blank, ~kept.repeat(4, axis=2).repeat(4, axis=3))
    else:
      assert np.all(partial.images[:, :, 4 * partial.rows :] == slots.BLANK)


def test_a_stream_checks_before_it_begins(model):
  with pytest.raises(UserError, match='speculative_window'):
    model.stream('red apple', speculative_window=4)
  with pytest.raises(UserError, match='too many to stream'):
    model.stream('red apple', 1000)


IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'mask': np.ones((16, 16), bool)}, 'mask needs a picture'),
    ({'image': IMAGE}, 'none given'),
    ({'image': IMAGE, 'keep': 'top:0.5', 'vary': 0.5}, 'keep, vary given'),
    ({'image': IMAGE, 'keep': 'middle:0.5'}, 'keep='),
    ({'image': IMAGE, 'keep': 'top:1.5'}, 'keep='),
    ({'image': IMAGE, 'keep': 'top:nan'}, 'keep='),
    ({'image': IMAGE, 'keep': 'top'}, 'keep='),
    ({'image': IMAGE, 'vary': 1.1}, 'vary'),
    ({'image': IMAGE / 255, 'vary': 0.1}, 'image is float64'),
    ({'image': 'missing.png', 'vary': 0.1}, 'missing.png'),
    ({'image': IMAGE, 'mask': np.ones((8, 16), bool)}, '16×8 pixels, and the picture 16×16'),
    ({'image': IMAGE, 'mask': np.zeros((16, 16), bool)}, 'marks nothing'),
    ({'image': IMAGE, 'mask': np.zeros((16, 16))}, 'mask is float64'),
    ({'image': IMAGE, 'keep': 'top:0.5', 'best_of': 2}, 'keeps none there'),
    ({'best_of': 2}, 'nothing is edited'),
    ({'image': IMAGE, 'keep': 'top:0.5', 'speculative_window': 2}, 'set it to 0'),
    ({'image': IMAGE, 'keep': 'top:0.5', 'exit_threshold': 0.5}, 'set it to 1'),
    ({'negative': 'red apple', 'guidance_skip_threshold': 0.5}, 'set it to 1'),
    ({'negative': 'red apple', 'guidance_scale': 1.0}, 'guidance_scale=1'),
    ({'negative': ' '}, 'negative is empty'),
    ({'negative': 3}, 'negative=3'),
  ],
)
def test_bad_edits(model, arguments, message):
  with pytest.raises(UserError, match=message):
    model.generate('red apple', **arguments)


def test_a_damaged_picture_is_named(model, picture, tmp_path):
  path = tmp_path / 'torn.png'
  path.write_bytes(b'\x89PNG\r\n\x1a\n')
  with pytest.raises(UserError, match=r'image .*torn\.png'):
    model.generate('red apple', image=path, keep='top:0.5')
  with pytest.raises(UserError, match=r'mask .*torn\.png'):
    model.generate('red apple', image=picture, mask=path)


def test_an_edit_on_a_mesh(folder, model, picture):
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  mesh = mesh_lib.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
  sharded = text_to_image.load(folder, mesh)
  asked = {'image': picture, 'keep': 'top:0.5', 'negative': 'blue ball'}
  result = sharded.generate('red apple', 3, **asked)
  np.testing.assert_array_equal(result.tokens, model.generate('red apple', 3, **asked).tokens)
  *_, last = sharded.stream('red apple', 3, **asked)
  np.testing.assert_array_equal(last.result.tokens, result.tokens)


def test_the_command_edits_a_file_and_says_so(
  folder, model, picture, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('PARTI_JAX_CACHE', 'off')
  Image.fromarray(picture).save(tmp_path / 'face.png')
  mask = np.zeros((16, 16), np.uint8)
  mask[4:8] = 255
  Image.fromarray(mask).save(tmp_path / 'mask.png')
  flags = ['--model', folder, '--output_dir', tmp_path / 'out', '--num_images', 1]
  flags += ['--image', tmp_path / 'face.png', '--mask', tmp_path / 'mask.png', '--best_of', 2]
  flags += ['--negative', 'blue ball', '--prompt_weights']
  assert main.main(['generate', '(red:1.5) apple', *map(str, flags)]) == 0
  path = capsys.readouterr().out.split()[0]
  expected = model.generate(
    '(red:1.5) apple',
    1,
    image=picture,
    mask=mask,
    best_of=2,
    negative='blue ball',
    prompt_weights=True,
  )
  np.testing.assert_array_equal(np.asarray(Image.open(path)), expected.images[0, 0])
  found = images_lib.read_metadata(path)
  assert found['edit'] == 'mask' and found['edited_image'] == 'face.png'
  assert found['kept_tokens'] == 'f0ff' and found['best_of'] == '2'
  assert found['negative'] == 'blue ball' and found['prompt_weights'] == 'true'
  assert found['prompt'] == '(red:1.5) apple'
  assert main.main(['generate', 'red apple', '--mask', 'x.png', *map(str, flags[:2])]) == 2
  assert 'mask needs a picture' in capsys.readouterr().err
