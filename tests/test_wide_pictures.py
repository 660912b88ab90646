"""The whole chain for pictures that are twice as wide as high, from a folder to a server."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import main
from parti_jax.core import errors
from parti_jax.data import token_cache_info
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.models import rankers
from parti_jax.sampling import slots
from parti_jax.sampling import text_to_image
from parti_jax.serving import image_requests
from parti_jax.serving import image_service

HEIGHT, WIDTH = 16, 32
GRID = (4, 8)
PATCH = 4
CAPTIONS = [
  f'{color} {thing}' for color in ('red', 'green') for thing in ('hat', 'tree', 'ball', 'car')
]


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
  """Runs the commands from a folder of square pictures to a model folder; returns their folder."""
  folder = tmp_path_factory.mktemp('wide')
  draw, lines = np.random.default_rng(0), []
  for index, caption in enumerate(CAPTIONS):
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f'{index}.png')
    lines.append(json.dumps({'file': f'{index}.png', 'caption': caption}))
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  ids = vocabulary.train_vocabulary(
    CAPTIONS, 60, str(folder / 'vocabulary.model'), at_most=True
  ).size
  size = f'VQGANConfig.image_size=({HEIGHT}, {WIDTH})'
  once = ('--gin.train.steps=2', '--gin.train.checkpoint_every=2')
  _parti_jax(
    'train',
    '--gin_file=gin_configs/runs/tiny_vqgan_tokenizer.gin',
    f"--gin.folder.path='{folder}'",
    f'--gin.{size}',
    f'--model_dir={folder}/tokenizer',
    *once,
  )
  _parti_jax(
    'tokenize',
    '--gin_file=gin_configs/tasks/folder.gin',
    f"--gin.folder.path='{folder}'",
    f'--tokenizer={folder}/tokenizer',
    f'--output_dir={folder}/tokens',
    '--views=10',
    '--splits',
    'train',
  )
  _parti_jax(
    'train',
    '--gin_file=gin_configs/runs/tiny_generator.gin',
    f"--gin.token_cache.path='{folder}/tokens'",
    f"--gin.vocabulary.path='{folder}/vocabulary.model'",
    f'--gin.PartiConfig.text_vocabulary={ids}',
    f'--gin.PartiConfig.grid={GRID}',
    f'--model_dir={folder}/generator',
    *once,
  )
  _parti_jax(
    'export',
    f'--tokenizer={folder}/tokenizer',
    f'--generator={folder}/generator',
    f'--vocabulary={folder}/vocabulary.model',
    f'--output_dir={folder}/model',
  )
  return folder


@pytest.fixture(scope='module')
def model(chain):
  return parti_jax.load(chain / 'model')


def _parti_jax(*arguments):
  assert main.main([*arguments]) == 0


def test_files_name_both_sides(chain, capsys):
  info = token_cache_info.read_info(str(chain / 'tokens'))
  assert info['grid'] == list(GRID) and info['image_tokens'] == 32 and info['views'] == 10
  config = json.loads((chain / 'model' / 'config.json').read_text())
  assert config['tokenizer']['image_size'] == [HEIGHT, WIDTH]
  assert config['generator']['grid'] == list(GRID)
  _parti_jax('info', str(chain / 'model'))
  assert '16×32 pixels of 32 image tokens' in capsys.readouterr().out
  _parti_jax('info', str(chain / 'model'), '--json')
  assert json.loads(capsys.readouterr().out)['picture_size'] == [HEIGHT, WIDTH]


def test_the_model_generates_streams_and_rates(model, tmp_path):
  result = model.generate(CAPTIONS[:2], 2, seed=3)
  assert model.image_size == (HEIGHT, WIDTH) and result.images.shape == (2, 2, HEIGHT, WIDTH, 3)
  *parts, last = model.stream(CAPTIONS[:2], 2, seed=3)
  assert last.rows == last.of_rows == GRID[0] and len(parts) == GRID[0] - 1
  assert (parts[0].images[:, :, PATCH:] == slots.BLANK).all() and parts[0].images.shape[2:4] == (
    16,
    32,
  )
  np.testing.assert_array_equal(last.tokens, result.tokens)
  for path in result.save(tmp_path):
    with Image.open(path) as image:
      assert image.size == (WIDTH, HEIGHT)
  sheet = result.grid(HEIGHT)
  assert sheet.width > 2 * WIDTH and sheet.height > 2 * HEIGHT
  likelihoods = model.likelihood(CAPTIONS[:2], list(result.images[0]))
  assert likelihoods.shape == (2, 2) and (likelihoods < 0).all()
  np.testing.assert_array_equal(model.tokenize(result.images[0]).shape, (2, 32))
  with pytest.raises(errors.UserError, match=r'expected uint8 \[n, 16, 32, 3\]'):
    model.tokenize(np.zeros((1, WIDTH, HEIGHT, 3), np.uint8))


def test_a_mask_is_redrawn_and_the_rest_kept(model):
  picture = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[:, -PATCH - 1 :] = True  # It touches the last two columns of tokens.
  result = model.generate('red hat', 3, image=picture, mask=mask, temperature=5)
  new = np.zeros(GRID, bool)
  new[:, -2:] = True
  own = model.tokenize(picture[None])[0].reshape(GRID)
  tokens = result.tokens[0].reshape(3, *GRID)
  assert (tokens == own)[:, ~new].all() and not (tokens == own)[:, new].all()
  for edit in ({'keep': 'left:0.5'}, {'vary': 0.25}):
    found = model.generate('red hat', 1, image=picture, temperature=5, **edit)
    kept = found.kept[0, 0]
    assert kept.sum() == {'keep': 16, 'vary': 24}[next(iter(edit))]
    assert (found.tokens[0, 0] == own.ravel())[kept].all()


def test_the_server_offers_width_by_height(model):
  service = image_service.ImageService(model, image_requests.Limits(images=2, queue=4), 2, 4)
  with contextlib.closing(service):
    offer = service.offer
    assert offer.pixels() == '32x16' and offer.upscaled is None
    request = image_requests.checked(
      {'prompt': 'red hat', 'size': '32x16', 'seed': 3}, offer, service.limits
    )
    result = service.submit(request, lambda found: found).result(120)
    assert result.images.shape == (1, 1, HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(result.tokens, model.generate('red hat', 1, seed=3).tokens)
    with pytest.raises(image_requests.RequestError, match='choose auto or 32x16'):
      image_requests.checked({'prompt': 'red hat', 'size': '16x32'}, offer, service.limits)


def _save(found, folder, ranker):
  model_folder.save(
    folder,
    generator_config=found.generator_config,
    generator_params=found.generator_params,
    tokenizer_config=found.tokenizer_config,
    tokenizer_params=found.tokenizer_params,
    vocabulary_path=found.vocabulary_path,
    parts={'ranker': ranker},
    allow_mismatch=True,
  )


def test_a_ranker_of_squares_is_refused(chain, monkeypatch, tmp_path):
  """The demo's; `export` and `load` say so before anything is written or drawn."""
  found = model_folder.load(chain / 'model')
  part = model_folder.load_ranker(text_to_image.DEMO_FOLDER)
  with pytest.raises(
    errors.UserError, match='pictures of 64×64 pixels and would see those of 16×32'
  ):
    _save(found, tmp_path / 'ranked', part)
  assert not (tmp_path / 'ranked').exists()
  with monkeypatch.context() as unchecked:  # Of a folder that an earlier version wrote.
    unchecked.setattr(rankers, 'check_shape', lambda config, size: None)
    _save(found, tmp_path / 'earlier', part)
  with pytest.raises(errors.UserError, match='config.json: the ranker is for pictures of 64×64'):
    parti_jax.load(tmp_path / 'earlier')
  with pytest.raises(errors.UserError, match=r'CoCaConfig.image_size=\(16, 32\), or use one'):
    parti_jax.load(chain / 'model', ranker=text_to_image.DEMO_FOLDER)
  rankers.check_shape(dataclasses.replace(part.config, image_size=(32, 64)), (HEIGHT, WIDTH))
  rankers.check_shape(part.config, 16)


def test_what_is_for_squares_says_so(chain, model, capsys, tmp_path):
  folder = chain / 'model'
  for command in (
    ['evaluate', f'--model={folder}', f'--output_dir={tmp_path}/found'],
    ['evaluate_tokenizer', f'--tokenizer={folder}', f'--output_dir={tmp_path}/found'],
  ):
    assert main.main(command) == 2
    assert 'square pictures only, none of 16×32 pixels' in capsys.readouterr().err
