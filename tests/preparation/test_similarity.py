"""Pictures that don't fit their captions by a ranker are dropped and counted."""

import json

import numpy as np
import pytest
import tiny_clip
from PIL import Image

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.preparation import report
from parti_jax.preparation import shards
from parti_jax.preparation import similarity
from parti_jax.preparation.settings import Settings
from parti_jax.sampling import ranking
from parti_jax.sampling import text_to_image

pytest.importorskip('tokenizers')


@pytest.fixture(scope='module', name='ranker')
def fixture_ranker(tmp_path_factory):
  """The folder of a tiny CLIP."""
  folder = tmp_path_factory.mktemp('public')
  vocabulary = tiny_clip.write_tokenizer(folder)
  file = tiny_clip.write(folder, tiny_clip.clip_arrays(vocabulary), eos_token_id=vocabulary - 1)
  command = ['import', 'ranker', str(file), '--format=clip', f'--output_dir={folder}/clip']
  assert main.main([*command, f'--vocabulary={folder}/tokenizer.json']) == 0
  return folder / 'clip'


@pytest.fixture(name='pairs')
def fixture_pairs(draw):
  """Five captions and pictures of several shapes."""
  sizes = [(64, 48), (32, 40), (64, 64), (48, 64), (90, 30)]
  captions = ['red apple', 'blue ball', 'a blue', 'red ' * 30, 'x']
  return [(caption, draw(seed, size)) for seed, (caption, size) in enumerate(zip(captions, sizes))]


def _cosines(ranker, pairs):
  """Of each pair by itself, in the order of the pairs."""
  ranker = ranking.load(ranker)
  with pytest.warns(UserWarning, match='longer than'):
    texts = ranker.text_features([caption for caption, _ in pairs])
  pictures = [ranker.image_features(np.asarray(image)[None])[0] for _, image in pairs]
  return np.sum(texts * np.stack(pictures), axis=1)


@pytest.mark.parametrize('at_once', [2, 64])
def test_pairs_below_the_threshold_are_counted(
  ranker, pairs, encode, tmp_path, monkeypatch, at_once
):
  monkeypatch.setattr(similarity, 'BATCH', at_once)
  cosines = _cosines(ranker, pairs)
  least = float(np.sort(cosines)[1:3].mean())
  settings = Settings(ranker=str(ranker), min_similarity=least, duplicates=None)
  examples = [
    (str(index), {'key': str(index), 'caption': caption.encode(), 'picture': encode(image)})
    for index, (caption, image) in enumerate(pairs)
  ]
  outcome, rows = shards.write(str(tmp_path / 'shard.array_record'), 0, examples, settings)
  assert outcome.read == 5 and dict(outcome.left_out) == {similarity.TOO_LOW: 2}
  assert len(rows) == outcome.shard['examples'] == 3
  kept = cosines > least
  assert [row.pixels for row in rows] == [
    image.width * image.height for (_, image), keep in zip(pairs, kept) if keep
  ]
  assert outcome.notes[similarity.CUT] == int(kept[3])
  found = report.make([outcome], 'here', settings)
  assert found['settings']['min_similarity'] == least


def test_the_command_drops_them(ranker, pairs, encode, write_tar, tmp_path):
  pytest.importorskip('apache_beam', reason='apache-beam is not installed (extra "beam")')
  cosines = _cosines(ranker, pairs)
  least = float(np.sort(cosines)[2:4].mean())
  tars = write_tar(
    '0.tar',
    [
      (f'{index}', caption, encode(image, 'jpeg', quality=95), {})
      for index, (caption, image) in enumerate(pairs)
    ],
  )
  command = [
    'prepare',
    '--gin_file=gin_configs/tasks/webdataset.gin',
    f'--output_dir={tmp_path}/out',
  ]
  command += [f"--gin.webdataset.path='{tars}'", '--gin.prepare.duplicates=None']
  command += [f"--gin.prepare.ranker='{ranker}'", f'--gin.prepare.min_similarity={least}']
  assert main.main(command) == 0
  found = json.loads((tmp_path / 'out' / 'report.json').read_text())['splits']['train']
  assert found['read'] == 5 and found['left_out'] == {similarity.TOO_LOW: 3}


def test_a_process_loads_the_ranker_once(ranker, monkeypatch):
  monkeypatch.setattr(similarity, '_rankers', {})
  loaded = []
  load = ranking.load
  monkeypatch.setattr(ranking, 'load', lambda folder: loaded.append(folder) or load(folder))
  settings = Settings(ranker=str(ranker), min_similarity=0.0)
  similarity.check(settings)
  for _ in range(3):
    pair = similarity.pair(Image.new('RGB', (20, 30), 'red'), 'red', settings)
    assert pair.square.shape == (tiny_clip.SIZE, tiny_clip.SIZE, 3)
    (verdict,) = similarity.judge([pair], settings)
    assert -1 <= verdict.cosine <= 1 and not verdict.cut
  assert loaded == [str(ranker)]


def test_settings_that_do_not_fit(tmp_path):
  with pytest.raises(UserError, match='set both, or none'):
    Settings(min_similarity=0.3)
  with pytest.raises(UserError, match='prepare.min_similarity'):
    Settings(ranker='somewhere', min_similarity=2.0)
  with pytest.raises(UserError, match=r'prepare.ranker=.*does not exist'):
    similarity.check(Settings(ranker=str(tmp_path / 'none'), min_similarity=0.3))
  demo = str(text_to_image.DEMO_FOLDER)
  with pytest.raises(UserError, match='pictures of one shape only.*parti-jax import ranker'):
    similarity.check(Settings(ranker=demo, min_similarity=0.3))
