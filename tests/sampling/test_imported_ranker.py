"""Rankers that others have trained: `parti-jax import ranker`, and what all commands do with them."""

import io
import json
import re
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tiny_clip
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.metrics import features
from parti_jax.exported_model import model_folder
from parti_jax.models import clip
from parti_jax.models import siglip
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement
from parti_jax.sampling import ranking

tokenizers = pytest.importorskip('tokenizers')

PROMPTS = ('red apple', 'blue ball')


@pytest.fixture(scope='session', name='public')
def fixture_public(tmp_path_factory):
  """A folder with the files of a tiny CLIP, as on Hugging Face."""
  folder = tmp_path_factory.mktemp('public')
  vocabulary = tiny_clip.write_tokenizer(folder)
  tiny_clip.write(folder, tiny_clip.clip_arrays(vocabulary), eos_token_id=vocabulary - 1)
  return folder


def _import(public, folder, *flags, file_format='clip', vocabulary='tokenizer.json'):
  return main.main(
    [
      'import',
      'ranker',
      str(public / 'model.safetensors'),
      f'--format={file_format}',
      f'--output_dir={folder}',
      *([f'--vocabulary={public / vocabulary}'] if vocabulary else []),
      *flags,
    ]
  )


@pytest.fixture(scope='session', name='imported')
def fixture_imported(public, tmp_path_factory):
  folder = tmp_path_factory.mktemp('imported') / 'clip'
  assert _import(public, folder, '--source=somewhere', '--licence=MIT') == 0
  return folder


@pytest.fixture(scope='session', name='varied')
def fixture_varied(tiny_folder, tmp_path_factory):
  """A tiny model without a ranker, whose pictures of a prompt differ."""
  folder = tmp_path_factory.mktemp('models') / 'varied'
  sampling = ['--guidance_scale=1', '--temperature=5', '--top_p=1']
  assert main.main(['export', f'--base={tiny_folder}', f'--output_dir={folder}', *sampling]) == 0
  return folder


@pytest.fixture(scope='session', name='exported')
def fixture_exported(imported, varied, tmp_path_factory):
  folder = tmp_path_factory.mktemp('models') / 'with_clip'
  export = ['export', f'--base={varied}', f'--ranker={imported}', f'--output_dir={folder}']
  assert main.main(export) == 0
  return folder


def _cosines(part, text, pictures):
  """The cosines of a text and pictures, by the module alone."""
  tokenizer = tokenizers.Tokenizer.from_file(str(part.vocabulary_path))
  tokens = np.zeros((1, tiny_clip.LENGTH), np.int32)
  ids = tokenizer.encode(text).ids
  tokens[0, : len(ids)] = ids
  size = (tiny_clip.SIZE, tiny_clip.SIZE)
  resized = [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in pictures]
  module, variables = clip.CLIP(part.config), {'params': jax.tree.map(np.asarray, part.params)}
  of_text = module.apply(variables, jnp.asarray(tokens), method='text_features')
  squares = jnp.asarray(np.stack(resized), jnp.float32) / 255
  return np.asarray(module.apply(variables, squares, method='image_features') @ of_text[0])


def test_the_folder_has_everything(public, imported, capsys):
  part = model_folder.load_part('ranker', imported)
  assert isinstance(part.config, clip.CLIPConfig) and part.config.activation == 'quick_gelu'
  assert (part.config.image_size, part.config.image_heads) == (tiny_clip.SIZE, 2)
  assert part.preprocessing.fit == 'crop' and part.preprocessing.resampling == 'bicubic'
  arrays = safetensors.numpy.load_file(public / 'model.safetensors')
  np.testing.assert_array_equal(
    part.params['image_projection']['kernel'], arrays['visual_projection.weight'].T
  )
  origin = json.loads((imported / 'config.json').read_text())['provenance']['ranker']
  assert (origin['source'], origin['licence'], origin['format']) == ('somewhere', 'MIT', 'clip')
  assert origin['files'] == ['model.safetensors'] and len(origin['sha256']) == 64
  assert main.main(['info', str(imported)]) == 0
  shown = capsys.readouterr().out
  assert 'a ranker' in shown and 'MIT' in shown and 'missing' not in shown


def test_pictures_stand_in_the_order_of_the_cosine(imported, exported, tmp_path):
  part = model_folder.load_part('ranker', imported)
  command = ['generate', *PROMPTS, f'--model={exported}', '--num_images=5', '--rank']
  assert main.main([*command, f'--output_dir={tmp_path}']) == 0
  plain = parti_jax.load(exported).generate(PROMPTS, num_images=5)
  for row, prompt in enumerate(PROMPTS):
    expected = _cosines(part, prompt, plain.images[row])
    assert np.ptp(expected) > 1e-3
    files = sorted(tmp_path.glob(f'{images_lib.slug(prompt)}_*rank*.png'))
    found = [images_lib.read_metadata(file) for file in files]
    order = [int(metadata['image_index']) for metadata in found]
    assert order == np.argsort(-expected).tolist()
    scores = [float(metadata['score']) for metadata in found]
    np.testing.assert_allclose(scores, expected[order], atol=1e-4)


def test_a_folder_replaces_the_rankers_of_any_model(imported, exported, varied, tmp_path):
  expected = parti_jax.load(exported).generate(PROMPTS, num_images=3, rank=True)
  found = parti_jax.load(varied, ranker=imported).generate(PROMPTS, num_images=3, rank=True)
  np.testing.assert_array_equal(found.images, expected.images)
  np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
  flags = [f'--model={varied}', f'--ranker={imported}', '--num_images=3']
  assert main.main(['generate', PROMPTS[0], *flags, f'--output_dir={tmp_path}/pictures']) == 0
  (first,) = (tmp_path / 'pictures').glob('*rank1.png')
  np.testing.assert_array_equal(np.asarray(Image.open(first)), expected.images[0, 0])


def test_a_page_of_prompts_is_of_one_ranker(imported, varied, tmp_path, capsys):
  prompts = tmp_path / 'prompts.tsv'
  prompts.write_text('Prompt\tCategory\tChallenge\tNote\nred apple\tFood\tBasic\t\n')
  command = ['prompts', str(prompts), f'--model={varied}', '--num_images=3']
  command.append(f'--output_dir={tmp_path}/page')
  assert main.main([*command, f'--ranker={imported}']) == 0
  found = json.loads((tmp_path / 'page' / 'prompts.json').read_text())
  scores = [picture['score'] for picture in found['prompts'][0]['pictures']]
  expected = parti_jax.load(varied, ranker=imported).generate('red apple', num_images=3, rank=True)
  np.testing.assert_allclose(scores, expected.scores[0], atol=1e-5)
  assert main.main(command) == 2
  assert 'ranker' in capsys.readouterr().err


def test_exporting_again_keeps_and_replaces_a_ranker(exported, imported, varied, tmp_path):
  again = tmp_path / 'again'
  assert main.main(['export', f'--base={exported}', f'--output_dir={again}']) == 0
  for name in ('ranker_vocabulary.model', 'config.json'):
    assert (again / name).read_bytes() == (exported / name).read_bytes()
  ours, theirs = (model_folder.load(folder).parts['ranker'] for folder in (again, exported))
  assert ours.preprocessing == theirs.preprocessing and ours.made_with == theirs.made_with
  # Without the ranker, nothing of it stays behind.
  export = ['export', f'--base={varied}', f'--output_dir={again}', '--overwrite']
  assert main.main(export) == 0
  assert not list(again.glob('ranker*'))
  assert 'ranker' not in model_folder.load(again).provenance


def test_a_folder_without_a_ranker_is_refused(varied, tmp_path, capsys):
  command = ['generate', 'red apple', f'--model={varied}', f'--ranker={varied}']
  assert main.main([*command, f'--output_dir={tmp_path}/pictures']) == 2
  assert (
    'has no ranker, only a generator and a tokenizer; give one that has' in capsys.readouterr().err
  )


def test_pictures_of_any_shape_are_prepared_as_the_folder_says(imported, tmp_path):
  """Two halves of a picture: cropping keeps the middle, padding all of it."""
  picture = np.zeros((10, 30, 3), np.uint8)
  picture[:, 10:20] = 200
  config = json.loads((imported / 'config.json').read_text())
  found = {}
  for fit in ('crop', 'pad'):
    folder = tmp_path / fit
    folder.mkdir()
    for file in imported.iterdir():
      (folder / file.name).write_bytes(file.read_bytes())
    config['ranker_inputs']['fit'] = fit
    (folder / 'config.json').write_text(json.dumps(config))
    ranker = ranking.load(folder)
    found[fit] = ranker.image_features(picture[None])
    middle = ranker.image_features(picture[None, :, 10:20])
  np.testing.assert_allclose(found['crop'], middle, atol=1e-5)
  assert np.abs(found['pad'] - middle).max() > 1e-3


def test_clip_scores_of_pictures(imported, varied):
  pipeline = parti_jax.load(varied, ranker=imported)
  (extractor,) = features.of_flags(pipeline, None, 256)
  assert extractor.name == f'ranker clip, pictures of {tiny_clip.SIZE} pixels'
  pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
  captions = ['red apple', 'blue ball', 'blue']
  (published,) = extractor.published(captions)
  found = published.score.of(features.extract(extractor, [pictures]).values, published.texts)
  part = model_folder.load_part('ranker', imported)
  cosines = np.array(
    [
      _cosines(part, f'A photo depicts {caption}', picture[None])[0]
      for caption, picture in zip(captions, pictures)
    ]
  )
  assert published.score.name == 'CLIPScore' and np.ptp(cosines) > 1e-3
  np.testing.assert_allclose(found, 2.5 * np.maximum(cosines, 0), atol=1e-4)


def test_evaluate_reports_clip_score(imported, varied, tmp_path):
  draw = np.random.default_rng(0)
  content = {'images': [], 'annotations': []}
  captions = ['red apple', 'blue ball', 'blue', 'a red ball']
  for index, caption in enumerate(captions):
    picture = draw.integers(0, 256, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / f'{index}.png')
    content['images'].append({'id': index, 'file_name': f'{index}.png'})
    content['annotations'].append({'image_id': index, 'caption': caption})
  (tmp_path / 'captions.json').write_text(json.dumps(content))
  out = tmp_path / 'out'
  command = ['evaluate', f'--model={varied}', '--dataset=coco', f'--output_dir={out}']
  command += [f'--annotations={tmp_path}/captions.json', f'--pictures={tmp_path}']
  assert main.main([*command, f'--ranker={imported}']) == 0
  (table,) = json.loads((out / 'report.json').read_text())['distributions']
  part = model_folder.load_part('ranker', imported)
  expected = []
  with tarfile.open(out / 'generated' / '00000.tar') as tar:
    for index in range(len(captions)):
      caption = tar.extractfile(f'{index:06d}.txt').read().decode()
      picture = np.asarray(Image.open(tar.extractfile(f'{index:06d}.png')))
      cosine = _cosines(part, f'A photo depicts {caption}', picture[None])[0]
      expected.append(2.5 * max(cosine, 0))
  found = table['rows']['generated']['scores']['CLIPScore']
  assert found['mean'] == pytest.approx(np.mean(expected), abs=1e-4) and np.ptp(expected) > 1e-3
  assert 'CLIPScore' in (out / 'report.md').read_text()


def test_hpsv2s_weights(exported, tmp_path):
  vocabulary = tiny_clip.write_tokenizer(tmp_path)
  tiny_clip.write(tmp_path, tiny_clip.open_clip_arrays(vocabulary))
  assert _import(tmp_path, tmp_path / 'hps', file_format='hpsv2') == 0
  ranker = ranking.load(tmp_path / 'hps')
  assert ranker.preprocessing.fit == 'pad' and ranker.config.activation == 'gelu'
  published = features.RankerFeatures(ranker, 'x').published(['red apple'])
  assert [score.name for score, _ in published] == ['CLIPScore', 'HPSv2']
  np.testing.assert_allclose(published[1].texts, ranker.text_features(['red apple']), atol=1e-6)
  # A model keeps the format, too, also in place of another imported ranker.
  export = [
    'export',
    f'--base={exported}',
    f'--ranker={tmp_path}/hps',
    f'--output_dir={tmp_path}/m',
  ]
  assert main.main(export) == 0
  assert parti_jax.load(tmp_path / 'm').ranker.file_format == 'hpsv2'
  # The same weights as open_clip's need --activation, and are cropped.
  assert _import(tmp_path, tmp_path / 'plain', file_format='open_clip') == 2
  flags = ['--activation=quick_gelu']
  assert _import(tmp_path, tmp_path / 'plain', *flags, file_format='open_clip') == 0
  ranker = ranking.load(tmp_path / 'plain')
  assert ranker.config.activation == 'quick_gelu'
  assert (ranker.preprocessing.fit, ranker.preprocessing.crop_rounding) == ('crop', 'even')


def _write_siglip(folder, vocabulary):
  tiny_clip.write(folder, tiny_clip.siglip_arrays(vocabulary), model_type='siglip')


def _siglip_text(part, tokens):
  padded = np.zeros((1, tiny_clip.LENGTH), np.int32)
  padded[0, : len(tokens)] = tokens
  module = siglip.SigLIP(part.config)
  variables = {'params': jax.tree.map(np.asarray, part.params)}
  return module.apply(variables, jnp.asarray(padded), method='text_features')


def test_siglip_2_and_its_tokenizer(tmp_path):
  words = ['<pad>', '<eos>', '<bos>', '<unk>', 'red', 'apple']
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<unk>')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(words[:4])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  _write_siglip(tmp_path, len(words))
  assert _import(tmp_path, tmp_path / 'siglip', file_format='siglip2') == 0
  part = model_folder.load_part('ranker', tmp_path / 'siglip')
  assert (part.preprocessing.fit, part.preprocessing.resampling) == ('stretch', 'bilinear')
  ranker = ranking.load(tmp_path / 'siglip')
  expected = _siglip_text(part, [4, 5, 1])
  np.testing.assert_allclose(ranker.text_features(['RED apple']), expected, atol=1e-5)
  assert np.abs(_siglip_text(part, [5, 4, 1]) - expected).max() > 1e-3
  pictures = np.random.default_rng(0).integers(0, 256, (2, 9, 15, 3)).astype(np.uint8)
  size = (tiny_clip.SIZE, tiny_clip.SIZE)
  squares = [Image.fromarray(one).resize(size, Image.Resampling.BILINEAR) for one in pictures]
  expected = siglip.SigLIP(part.config).apply(
    {'params': jax.tree.map(np.asarray, part.params)},
    jnp.asarray(np.stack(squares), jnp.float32) / 255,
    method='image_features',
  )
  np.testing.assert_allclose(ranker.image_features(pictures), expected, atol=1e-5)


def _train_sentencepiece(path, **ids):
  model = io.BytesIO()
  texts = ['red apple', 'blue ball', 'Red', 'apple pie'] * 3
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=17, minloglevel=2, **ids
  )
  path.write_bytes(model.getvalue())


def test_gemmas_sentencepiece_model(tmp_path, capsys):
  _train_sentencepiece(tmp_path / 'gemma.model', pad_id=0, eos_id=1, bos_id=2, unk_id=3)
  _write_siglip(tmp_path, 17)
  flags = {'file_format': 'siglip2', 'vocabulary': 'gemma.model'}
  assert _import(tmp_path, tmp_path / 'siglip', **flags) == 0
  part = model_folder.load_part('ranker', tmp_path / 'siglip')
  processor = sentencepiece.SentencePieceProcessor(str(tmp_path / 'gemma.model'))
  tokens = [*processor.encode('red apple'), 1]
  found = ranking.load(tmp_path / 'siglip').text_features(['RED Apple'])
  np.testing.assert_allclose(found, _siglip_text(part, tokens), atol=1e-5)
  # The first SigLIP's vocabulary is of another kind.
  _train_sentencepiece(tmp_path / 'gemma.model', pad_id=0, eos_id=1, bos_id=-1, unk_id=2)
  _refused(tmp_path, tmp_path, capsys, "isn't Gemma's SentencePiece model", **flags)


def _edited(imported, folder, edit):
  folder.mkdir()
  for file in imported.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  edit(folder)
  return folder


def _edit_inputs(folder, **changes):
  config = json.loads((folder / 'config.json').read_text())
  config['ranker_inputs'] |= changes
  (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
  'edit, message',
  [
    (lambda folder: (folder / 'ranker_vocabulary.model').unlink(), 'ranker_vocabulary.model'),
    (
      lambda folder: (folder / 'ranker_vocabulary.model').write_text('{}'),
      'was made with the vocabulary',
    ),
    (lambda folder: _edit_inputs(folder, fit='squash'), "ranker_inputs.fit='squash' is not one of"),
    (lambda folder: _edit_inputs(folder, size=3), "'ranker_inputs' has other fields"),
    (lambda folder: _edit_inputs(folder, lower_case='no'), 'ranker_inputs.lower_case='),
  ],
)
def test_damaged_folders(imported, tmp_path, edit, message):
  with pytest.raises(UserError, match=message) as raised:
    ranking.load(_edited(imported, tmp_path / 'edited', edit))
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  'flags, vocabulary, message',
  [
    ([], None, '--vocabulary is required.*tokenizer.json'),
    ([], 'merges.txt', '--vocabulary: .*is not JSON.*tokenizer.json'),
    (['--image_size=16'], 'tokenizer.json', '--image_size does not apply to --format=clip'),
    (['--config=nowhere.json'], 'tokenizer.json', 'nowhere.json cannot be read'),
  ],
)
def test_flags_that_do_not_fit(public, tmp_path, capsys, flags, vocabulary, message):
  _refused(public, tmp_path, capsys, message, *flags, vocabulary=vocabulary)


def _refused(public, tmp_path, capsys, message, *flags, **others):
  folder = tmp_path / 'ranker'
  assert _import(public, folder, *flags, **others) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len([line for line in lines if 'error' in line]) == 1
  assert re.search(message, lines[-1]), lines
  assert not folder.exists()


def _drop(name):
  return lambda arrays: arrays.pop(name)


def _cut(name):
  return lambda arrays: arrays.update({name: arrays[name][:-1].copy()})


@pytest.mark.parametrize(
  'edit, message',
  [
    (_drop('text_model.final_layer_norm.bias'), 'missing: text_model.final_layer_norm.bias'),
    (
      _cut('vision_model.post_layernorm.bias'),
      'of another shape: vision_model.post_layernorm.bias',
    ),
    (
      lambda arrays: arrays.update(other=np.zeros(1, np.float32)),
      'not part of this network: other',
    ),
    (_drop('vision_model.embeddings.patch_embedding.weight'), "aren't the arrays of a CLIP"),
  ],
)
def test_weights_that_do_not_fit(public, tmp_path, capsys, edit, message):
  files = tmp_path / 'files'
  vocabulary = tiny_clip.write_tokenizer(files)
  arrays = tiny_clip.clip_arrays(vocabulary)
  edit(arrays)
  tiny_clip.write(files, arrays, eos_token_id=vocabulary - 1)
  _refused(files, tmp_path, capsys, message)


@pytest.mark.parametrize('rows, message', [(-1, 'the ranker knows'), (1, 'the weights are of')])
def test_a_tokenizer_of_another_size_is_refused(tmp_path, capsys, rows, message):
  files = tmp_path / 'files'
  vocabulary = tiny_clip.write_tokenizer(files)
  arrays = tiny_clip.clip_arrays(vocabulary + rows)
  tiny_clip.write(files, arrays, eos_token_id=vocabulary - 2)
  _refused(files, tmp_path, capsys, f'tokenizer.json has {vocabulary} pieces, but {message}')


def test_a_tokenizer_of_another_end_is_refused(tmp_path, capsys):
  files = tmp_path / 'files'
  vocabulary = tiny_clip.write_tokenizer(files)
  tiny_clip.write(files, tiny_clip.clip_arrays(vocabulary), eos_token_id=vocabulary - 2)
  _refused(files, tmp_path, capsys, 'tokenizer.json does not end a text with the token')


def test_names_of_another_library_are_refused(public, tmp_path, capsys):
  _refused(public, tmp_path, capsys, '--format=clip', file_format='open_clip')
  _refused(public, tmp_path, capsys, "isn't SigLIP", file_format='siglip2')


def test_formats_of_other_parts_are_refused(public, tmp_path, capsys):
  _refused(public, tmp_path, capsys, 'choose from clip', file_format='llamagen', vocabulary=None)


def test_an_imported_ranker_computes_in_float32_everywhere(exported, imported, monkeypatch):
  monkeypatch.setattr(model_folder.jax, 'default_backend', lambda: 'tpu')
  model = model_folder.load(exported)
  assert model.generator_config.dtype == 'bfloat16'
  assert model.parts['ranker'].config.dtype == 'float32'
  assert model_folder.load_part('ranker', imported).config.dtype == 'float32'


def test_a_ranker_at_a_url(public, imported, s3_bucket):
  url = f'{s3_bucket}/rankers/clip'
  assert _import(public, url) == 0
  pictures = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 3)).astype(np.uint8)
  scores = [ranking.load(folder).scores(PROMPTS, pictures) for folder in (url, imported)]
  np.testing.assert_allclose(*scores, atol=1e-6)
  assert output_folder.ranker_fingerprint(url)


def test_a_mesh_gives_the_same_scores(imported):
  pictures = np.random.default_rng(0).integers(0, 256, (4, 12, 8, 3)).astype(np.uint8)
  texts = ['red apple', 'blue ball', 'blue', 'red']
  place = placement.Placement(mesh_lib.make_mesh(2, 2, 2, 1))
  np.testing.assert_allclose(
    ranking.load(imported, place).scores(texts, pictures),
    ranking.load(imported).scores(texts, pictures),
    atol=1e-5,
  )
