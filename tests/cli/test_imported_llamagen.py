"""LlamaGen's generators from elsewhere: import, generate in all ways, train further, export."""

import dataclasses
import json
import pathlib

import flax.traverse_util
import further_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import safetensors.numpy
import tiny_llamagen
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.data import class_tokenizer
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.importers import vqgan as vqgan_importer
from parti_jax.models import generators
from parti_jax.models import llamagen
from parti_jax.models import t5_encoder
from parti_jax.models import vqgan
from parti_jax.sampling import continuous
from parti_jax.sampling import text_to_image

CODES, CLASSES, LENGTH = tiny_llamagen.CODES, tiny_llamagen.CLASSES, 9
VOCABULARY = pathlib.Path(parti_jax.__file__).parent / 'demo' / 'vocabulary.model'
VQGAN = vqgan.VQGANConfig(
  image_size=6,
  channels=32,
  multipliers=(1, 1),
  res_blocks=1,
  decoder_res_blocks=1,
  code_dim=4,
  codebook_size=CODES,
  output='pixels',
  dtype='float32',
)
NAMES = ['cat', 'dog, hound', 'crane', 'crane, machine', 'ice cream']


@pytest.fixture(scope='module', name='sources')
def fixture_sources(tmp_path_factory):
  """Files as they are downloaded, and the folders of an image tokenizer and of a text encoder."""
  folder = tmp_path_factory.mktemp('downloaded')
  for name, texts in (('c2i', False), ('t2i', True)):
    weights = {f'model.{key}': array for key, array in tiny_llamagen.state(texts).items()}
    weights['optimizer.state.0.exp_avg'] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(weights, folder / f'{name}.safetensors')
  draw = np.random.default_rng(0)
  params = {}
  for path, shape in vqgan_importer.expected(VQGAN).items():
    scale = np.sqrt(max(np.prod(shape[:-1]), 1))
    params[path] = np.asarray(draw.normal(size=shape) / scale, np.float32)
  tree = flax.traverse_util.unflatten_dict(params, sep='/')
  part = model_folder.Part(VQGAN, tree)
  model_folder.save_part(folder / 'vqgan', 'tokenizer', part, {'tokenizer': 'random'})
  encoder = t5_encoder.T5EncoderConfig(
    layers=1,
    width=tiny_llamagen.FEATURES,
    mlp_width=8,
    heads=2,
    head_dim=4,
    text_vocabulary=text_tokenizer.open_tokenizer(VOCABULARY).size + 3,
    text_length=tiny_llamagen.TEXT_LENGTH,
    dtype='float32',
  )
  module = t5_encoder.T5Encoder(encoder)
  made = random_parameters.of(module, t5_encoder.example_inputs(encoder), factor=3.0)
  part = model_folder.Part(encoder, made, vocabulary_path=VOCABULARY)
  model_folder.save_part(folder / 't5', 'text_encoder', part, {'text_encoder': {'format': 't5'}})
  lines = [f'n0000000{number} {name}' for number, name in enumerate(NAMES)]
  (folder / 'names.txt').write_text('\n'.join(lines))
  return folder


def _import(sources, kind, model, *others):
  command = ['import', 'generator', str(sources / f'{kind}.safetensors'), '--format=llamagen']
  flags = [f'--tokenizer={sources / "vqgan"}', f'--heads={tiny_llamagen.HEADS}']
  if kind == 't2i':
    flags.append(f'--text_encoder={sources / "t5"}')
  return main.main([*command, *flags, f'--output_dir={model}', *others])


@pytest.fixture(scope='module', name='models')
def fixture_models(sources, tmp_path_factory):
  folder = tmp_path_factory.mktemp('imported')
  assert _import(sources, 'c2i', folder / 'c2i', f'--vocabulary={sources / "names.txt"}') == 0
  assert _import(sources, 't2i', folder / 't2i', '--licence=MIT') == 0
  return folder


@pytest.fixture(scope='module', name='loaded')
def fixture_loaded(models):
  return {name: text_to_image.load(models / name) for name in ('c2i', 't2i')}


PROMPTS = {'c2i': ['cat', '4'], 't2i': ['red heart', 'waving hand: dark skin tone']}
KINDS = pytest.mark.parametrize('kind', PROMPTS)


def test_the_folders_are_whole_models(models):
  found = {name: model_folder.load(models / name) for name in PROMPTS}
  for model in found.values():
    assert isinstance(model.generator_config, llamagen.LlamaGenConfig)
    assert model.tokenizer_config == VQGAN
  assert found['c2i'].generator_config.classes == CLASSES
  assert found['t2i'].generator_config.guidance_slots == 'text'
  sampling = [(model.sampling.guidance_scale, model.sampling.top_k) for model in found.values()]
  assert sampling == [(4.0, 2000), (7.5, 1000)]
  config = json.loads((models / 't2i' / 'config.json').read_text())
  assert config['generator']['kind'] == 'llamagen' and config['generator']['classes'] is None
  assert config['provenance']['generator']['licence'] == 'MIT'
  assert config['provenance']['text_encoder'] == {'format': 't5'}
  assert (models / 't2i' / 'vocabulary.model').read_bytes() == VOCABULARY.read_bytes()


def test_the_import_says_what_it_reads_and_makes(sources, tmp_path, capsys):
  for kind, used, made in (
    ('c2i', 'the numbers of the classes; --vocabulary gives them names', '5 classes'),
    ('t2i', f'the vocabulary of {sources / "t5"}', '6 text tokens'),
  ):
    assert _import(sources, kind, tmp_path / kind) == 0
    shown = capsys.readouterr()
    assert shown.err == f'parti-jax: using {used}\n'
    assert f'2 decoder layers of width 16, {made}; use it' in shown.out


def test_info_describes_both(models, capsys):
  for name in PROMPTS:
    assert main.main(['info', str(models / name)]) == 0
    assert '9 image tokens' in capsys.readouterr().out


def test_prompts_are_names_or_numbers_of_classes(loaded, models, sources, tmp_path):
  encode = lambda *prompts: loaded['c2i'].encode_prompts(prompts)[:, 0].tolist()
  assert encode('cat', 'DOG', '3', 'n00000004', ' Ice  cream ') == [0, 1, 3, 4, 4]
  assert encode('crane (n00000002)', 'crane (machine)') == [2, 3]
  with pytest.raises(
    UserError, match="'ice creme' is not a class: .* from 0 to 4 or a name; did you"
  ):
    encode('ice creme')
  with pytest.raises(UserError, match="'5' is not a class"):
    encode('5')
  with pytest.raises(UserError, match='prompt 1 is empty'):
    encode(' ')
  tokenizer = class_tokenizer.ClassTokenizer(models / 'c2i' / 'vocabulary.model')
  assert tokenizer.size == CLASSES + 1
  assert [tokenizer.decode([number]) for number in (1, CLASSES)] == ['dog', '']
  assert _import(sources, 'c2i', tmp_path / 'numbers') == 0
  numbers = text_to_image.load(tmp_path / 'numbers')
  assert numbers.encode_prompts(['2'])[0, 0] == 2
  with pytest.raises(UserError, match="'cat' is not a class: .*give a number from 0 to 4$"):
    numbers.encode_prompts(['cat'])


@pytest.mark.parametrize(
  'content, message',
  [
    ('{"parti_jax_classes": 3, "names": ["a", "b"]}', 'does not have a name for each of 3 classes'),
    ('{"parti_jax_classes": 1, "names": [2]}', 'does not have a name for each of 1 classes'),
    ('{"parti_jax_classes": 1, "other": 2}', 'does not have a name for each of 1 classes'),
    ('{"parti_jax_classes": "a"}', "parti_jax_classes='a' must be a whole number"),
    ('{"parti_jax_classes": 0}', 'parti_jax_classes=0 must be'),
    ('{"parti_jax_classes": 3, ', 'is damaged'),
  ],
)
def test_damaged_classes_are_named(content, message, tmp_path):
  (tmp_path / 'vocabulary.model').write_text(content)
  with pytest.raises(UserError) as caught:
    text_tokenizer.open_tokenizer(tmp_path / 'vocabulary.model')
  assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@KINDS
def test_greedy_pictures_are_those_of_whole_sequences(loaded, models, kind):
  """The cache, guidance and the condition, against the network for training."""
  settings = {'temperature': 0.0, 'guidance_scale': 3.0}
  result = loaded[kind].generate(PROMPTS[kind], num_images=1, **settings)
  tokens = result.tokens[:, 0]
  assert (tokens[0] != tokens[1]).any()
  found = model_folder.load(models / kind)
  config = found.generator_config
  texts = jnp.asarray(loaded[kind].encode_prompts(PROMPTS[kind]))
  module = generators.module(config)
  params = jax.tree.map(np.asarray, found.generator_params)
  given, without = (
    module.apply({'params': params}, condition, jnp.asarray(tokens))
    for condition in (texts, generators.empty_text(config, texts))
  )
  np.testing.assert_array_equal(np.argmax(without + 3 * (given - without), axis=-1), tokens)


@KINDS
def test_all_ways_of_sampling_give_the_same_greedy_pictures(loaded, kind):
  model, prompts = loaded[kind], PROMPTS[kind]
  greedy = {'num_images': 1, 'temperature': 0.0}
  plain = model.generate(prompts, **greedy)
  never = model.generate(prompts, exit_threshold=0.999999, guidance_skip_threshold=1.0, **greedy)
  drafted = model.generate(prompts, speculative_window=4, **greedy)
  for other in (never, drafted):
    np.testing.assert_array_equal(other.tokens, plain.tokens)
  always = model.generate(prompts, num_images=1, exit_threshold=0.0)
  assert always.usage.layers.max() == 1
  with continuous.ContinuousSampler(model, batch_size=2) as sampler:
    found = [sampler.submit(prompt, temperature=0.0).result() for prompt in prompts]
  np.testing.assert_array_equal([result.tokens[0] for result in found], plain.tokens)


OTHERS = {'c2i': 'dog', 't2i': 'blue'}


@KINDS
def test_another_condition_may_be_on_guidances_other_side(loaded, models, kind):
  settings = {'temperature': 0.0, 'guidance_scale': 3.0}
  prompt, other = PROMPTS[kind][0], OTHERS[kind]
  result = loaded[kind].generate(prompt, num_images=1, negative=other, **settings)
  found = model_folder.load(models / kind)
  params = jax.tree.map(np.asarray, found.generator_params)
  texts = jnp.asarray(loaded[kind].encode_prompts([prompt, other]))
  tokens = jnp.asarray(result.tokens[0]).repeat(2, axis=0)
  given, without = generators.module(found.generator_config).apply(
    {'params': params}, texts, tokens
  )
  wanted = np.argmax(without + 3 * (given - without), axis=-1)
  np.testing.assert_array_equal(wanted, result.tokens[0, 0])


@KINDS
def test_kept_tokens_of_a_picture_begin_others(loaded, kind):
  model, prompt = loaded[kind], PROMPTS[kind][0]
  picture = model.generate(prompt, num_images=1, seed=1).images[0, 0]
  tokens = model.tokenize(picture[None])[0]
  edited = model.generate(prompt, num_images=2, image=picture, keep='top:0.7')
  assert edited.kept.any() and not edited.kept.all()
  for row, kept in zip(edited.tokens[0], edited.kept[0]):
    np.testing.assert_array_equal(row[kept], tokens[kept])
  with pytest.raises(UserError, match='prompt_weights needs a decoder with cross-attention'):
    model.generate(prompt, num_images=1, prompt_weights=True)


@KINDS
def test_pictures_do_not_depend_on_the_batch(loaded, kind):
  result = loaded[kind].generate(PROMPTS[kind], num_images=2, seed=1)
  alone = loaded[kind].generate(PROMPTS[kind][1], num_images=1, seed=1)
  np.testing.assert_array_equal(result.tokens[1, 0], alone.tokens[0, 0])
  assert result.tokens.max() < CODES


@KINDS
def test_int8_weights_and_cache(models, loaded, kind):
  model = text_to_image.load(models / kind, weights='int8', cache='int8')
  found = model.generate(PROMPTS[kind], num_images=2)
  plain = loaded[kind].generate(PROMPTS[kind], num_images=2)
  assert np.mean(found.tokens[..., 0] == plain.tokens[..., 0]) > 0


def test_what_is_missing_or_does_not_fit_is_named(sources, models, tmp_path, capsys):
  def fails(name, *flags):
    command = ['import', 'generator', str(sources / name), '--format=llamagen']
    assert main.main([*command, f'--output_dir={tmp_path / "out"}', *flags]) == 2
    return capsys.readouterr().err

  tokenizer, heads = f'--tokenizer={sources / "vqgan"}', '--heads=2'
  t5 = f'--text_encoder={sources / "t5"}'
  assert '--tokenizer is required' in fails('c2i.safetensors', heads)
  assert 'no model of the width 16, so the number of' in fails('c2i.safetensors', tokenizer)
  assert '--text_encoder is required' in fails('t2i.safetensors', tokenizer, heads)
  assert 'takes classes, not texts' in fails('c2i.safetensors', tokenizer, heads, t5)
  names = f'--vocabulary={sources / "names.txt"}'
  assert 'is that of --text_encoder' in fails('t2i.safetensors', tokenizer, heads, t5, names)
  (tmp_path / 'few.txt').write_text('cat\ndog\n')
  few = f'--vocabulary={tmp_path / "few.txt"}'
  assert 'there are 2 names of classes, but the network has 5' in fails(
    'c2i.safetensors', tokenizer, heads, few
  )
  assert 'not a generator of LlamaGen' in fails('vqgan/tokenizer.safetensors', tokenizer, heads)
  weights = safetensors.numpy.load_file(sources / 'c2i.safetensors')
  named = tmp_path / 'c2i_B_384.safetensors'
  safetensors.numpy.save_file(weights, named)
  assert 'of images of 384 pixels, but the image tokenizer makes 6' in fails(
    named, tokenizer, heads
  )
  part = model_folder.load_part('tokenizer', sources / 'vqgan')
  wide = part._replace(config=dataclasses.replace(part.config, image_size=(2, 18)))
  model_folder.save_part(tmp_path / 'wide', 'tokenizer', wide, {'tokenizer': 'random'})
  assert 'wide: published generators draw square pictures only, none of 2×18 pixels' in fails(
    'c2i.safetensors', f'--tokenizer={tmp_path / "wide"}', heads
  )
  del weights['model.layers.1.ffn_norm.weight']
  weights['model.layers.1.other'] = np.zeros(2, np.float32)
  safetensors.numpy.save_file(weights, tmp_path / 'part.safetensors')
  message = fails(tmp_path / 'part.safetensors', tokenizer, heads)
  assert 'missing: model.layers.1.ffn_norm.weight' in message
  assert 'not part of this network: model.layers.1.other' in message
  assert not (tmp_path / 'out').exists()


@KINDS
def test_a_run_goes_on_from_it_and_is_exported(models, kind, tmp_path):
  captions = PROMPTS[kind] * 8
  changes, picture = further_training.train_and_export(models / kind, captions, CODES, tmp_path)
  assert 0 < changes['image_decoder']['decoder']['norm']['scale'] < 0.1
  assert max(jax.tree.leaves(changes)) < 0.1
  assert Image.open(picture).size == (6, 6)


def test_samples_of_all_classes(models, sources, loaded, tmp_path, capsys):
  flags = ['--dataset=imagenet', f'--classes={sources / "names.txt"}', f'--model={models / "c2i"}']
  flags += ['--per_class=2', f'--output_dir={tmp_path / "out"}']
  assert main.main(['evaluate', *flags]) == 2
  assert 'draws classes by their numbers; give --label=id' in capsys.readouterr().err
  assert main.main(['evaluate', *flags, '--label=id']) == 0
  with np.load(tmp_path / 'out' / 'samples.npz') as found:
    images, labels = found['arr_0'], found['arr_1']
  assert labels.tolist() == [*range(CLASSES)] * 2 and images.shape == (10, 6, 6, 3)
  for index, name in ((4, 'ice cream'), (5, 'cat')):
    expected = loaded['c2i'].generate([name], num_images=1, first_index=index)
    np.testing.assert_array_equal(images[index], expected.images[0, 0])
