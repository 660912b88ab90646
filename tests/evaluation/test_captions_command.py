"""Tests of `parti-jax evaluate --dataset=coco`, with a fake pipeline and small files."""

import argparse
import hashlib
import json
import tarfile
import warnings

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.evaluation import measurement
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import features

PICTURES = 12


def draw(caption, index):
  """Returns a different picture for each caption and index."""
  return np.random.default_rng([*caption.encode(), index]).integers(
    0, 256, (fakes.SIZE, fakes.SIZE, 3), dtype=np.uint8
  )


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(draw, fakes.FakeRanker(draw))
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  monkeypatch.setattr(picture_shards, 'SHARD', 5)
  return pipeline


@pytest.fixture(name='flags')
def fixture_flags(tmp_path):
  """Small files in MS-COCO's form, where caption 'picture 3' has the picture generated for it."""
  place = tmp_path / 'val2014'
  place.mkdir()
  content = {'images': [], 'annotations': []}
  for identity in range(PICTURES):
    name = f'{identity}.png'
    Image.fromarray(draw(f'picture {identity}', 100)).resize((64, 64)).save(place / name)
    content['images'].append({'id': identity, 'file_name': name})
    content['annotations'].append({'image_id': identity, 'caption': f'picture {identity}'})
  (tmp_path / 'captions.json').write_text(json.dumps(content))
  return [
    '--dataset=coco',
    f'--annotations={tmp_path}/captions.json',
    f'--pictures={place}',
    f'--output_dir={tmp_path}/out',
  ]


def run(*arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  return evaluate.run(parser.parse_args(arguments))


def test_reports_pictures_and_sheet(pipeline, flags, tmp_path, capsys):
  assert run(*flags, '--guidance_scale=2') == 0
  out = tmp_path / 'out'
  assert sorted(path.name for path in out.iterdir()) == [
    'contact_sheet.png',
    'generated',
    'measurement_ranker.json',
    'report.json',
    'report.md',
    'run.json',
  ]
  report = json.loads((out / 'report.json').read_text())
  assert report['captions'] == report['pictures'] == PICTURES and report['skipped'] == {}
  assert report['sampling'] == {'guidance_scale': 2.0}
  (table,) = report['distributions']
  assert 'ranker of the model fake' in table['features']
  # The fake tokenizer changes nothing.
  assert table['rows']['reconstruction']['frechet_distance'] == pytest.approx(0, abs=1e-4)
  assert table['rows']['reconstruction']['precision'] == 1
  assert table['rows']['generated']['frechet_distance'] > 0.01
  measured = measurement.read(str(out / 'measurement_ranker.json'))
  generated = table['rows']['generated']
  assert measured.values['frechet_distance'].value == generated['frechet_distance']
  assert measured.values['alignment'].error == generated['alignment']['error']
  assert measured.protocol['captions'] == PICTURES
  digest = hashlib.sha256()
  for identity in range(PICTURES):
    data = (tmp_path / 'val2014' / f'{identity}.png').read_bytes()
    digest.update(image_decoding.decode(data, fakes.SIZE))
  assert measured.protocol['real_digest'] == digest.hexdigest()
  assert measured.subject['sampling'] == {'guidance_scale': 2.0}
  printed = capsys.readouterr()
  assert 'using 12 captions, all that there are and fewer than --num_captions=30000' in printed.err
  assert 'Fréchet distance' in printed.out and 'MS-COCO' in printed.out
  assert Image.open(out / 'contact_sheet.png').width > 4 * 2 * 128
  with tarfile.open(out / 'generated' / '00001.tar') as tar:
    assert tar.getnames()[:2] == ['000005.png', '000005.txt']


def test_each_caption_has_its_own_noise_and_position(pipeline, flags, tmp_path):
  run(*flags)
  captions = [caption for group in pipeline.generated for caption in group]
  shards = picture_shards.PictureShards(tmp_path / 'out' / 'generated', captions)
  drawn = np.concatenate(list(shards.batches()))
  for index, caption in enumerate(captions):
    np.testing.assert_array_equal(drawn[index], draw(caption, index))


def test_a_stopped_run_resumes(pipeline, flags, tmp_path):
  with pipeline.stopped_after(2):
    run(*flags)
  run(*flags)
  drawn = [caption for group in pipeline.generated for caption in group]
  assert sorted(drawn) == sorted(f'picture {identity}' for identity in range(PICTURES))
  resumed = (tmp_path / 'out' / 'report.json').read_text()
  run(*flags)  # Generates nothing more.
  assert len(pipeline.generated) == 3
  run(*flags[:-1], f'--output_dir={tmp_path}/whole')
  assert (tmp_path / 'whole' / 'report.json').read_text() == resumed


def test_pictures_of_another_run_are_not_mixed(pipeline, flags):
  run(*flags)
  with pytest.raises(UserError, match="another run, with sampling {}, but .* has .*'int8'"):
    run(*flags, '--weights=int8')
  with pytest.raises(UserError, match='pictures of another run, with seed 0, but .* has 1'):
    run(*flags, '--seed=1')
  with pytest.raises(UserError, match='with num_captions 30000, but .* has 5'):
    run(*flags, '--num_captions=5')


def test_damaged_pictures_are_counted_and_skipped_on_both_sides(pipeline, flags, tmp_path):
  whole = (tmp_path / 'val2014' / '3.png').read_bytes()
  (tmp_path / 'val2014' / '3.png').write_bytes(whole[:60])
  (tmp_path / 'val2014' / '4.png').unlink()
  run(*flags)
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['skipped'] == {'no picture file': 1, 'damaged picture': 1}
  assert report['captions'] == report['pictures'] == PICTURES - 2
  assert report['distributions'][0]['rows']['generated']['pictures'] == PICTURES - 2
  assert (
    'Skipped: 1 caption (no picture file), 1 caption (damaged picture).'
    in (tmp_path / 'out' / 'report.md').read_text()
  )


def test_no_usable_picture(pipeline, flags, tmp_path):
  for path in (tmp_path / 'val2014').iterdir():
    path.write_bytes(b'nothing')
  with pytest.raises(UserError, match='none of 12 pictures can be used .*unknown picture format'):
    run(*flags)


def test_of_several_pictures_the_best_is_kept(pipeline, flags, tmp_path):
  run(*flags, '--num_images=3')
  captions = [caption for group in pipeline.generated for caption in group]
  shards = picture_shards.PictureShards(tmp_path / 'out' / 'generated', captions)
  np.testing.assert_array_equal(next(shards.batches())[1], draw(captions[1], 3 + 2))
  assert "the ranker's best of 3" in (tmp_path / 'out' / 'report.md').read_text()


def test_a_damaged_shard_is_named(pipeline, flags, tmp_path):
  run(*flags)
  path = tmp_path / 'out' / 'generated' / '00001.tar'
  path.write_bytes(path.read_bytes()[:700])
  with pytest.raises(UserError, match='00001.tar is damaged; delete it'):
    run(*flags)
  path.unlink()
  run(*flags)
  assert len(pipeline.generated) == 3 + 1


def test_inception_compares_at_the_requested_size(pipeline, flags, tmp_path, monkeypatch):
  sizes = set()

  class FakeInception:
    resizes = False
    digest = 'ab' * 32

    def __init__(self, weights, image_size):
      self.name, self.image_size = weights, image_size

    def __call__(self, images):
      sizes.add(images.shape[1:])
      return features.Features(images.reshape(len(images), -1)[:, ::500].astype(np.float32))

    def texts(self, captions):
      return None

    def published(self, captions):
      return []

    def cut(self, captions):
      return 0

  monkeypatch.setattr(features, 'Inception', FakeInception)
  (tmp_path / 'weights.pth').write_bytes(b'')
  run(*flags, f'--inception_weights={tmp_path}/weights.pth', '--image_size=48')
  assert sizes == {(48, 48, 3)}
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert len(report['distributions']) == 2
  assert report['distributions'][0]['rows']['generated']['alignment'] is None
  measured = measurement.read(str(tmp_path / 'out' / 'measurement.json'))
  assert (
    measured.values['fid'].value
    == (report['distributions'][0]['rows']['generated']['frechet_distance'])
  )
  assert measured.protocol['features']['weights'] == 'ab' * 32
  assert measured.protocol['picture_size'] == 48


def test_cut_captions_are_counted(pipeline, flags, tmp_path):
  generate = pipeline.generate

  def cut(prompts, **settings):
    warnings.warn(
      'prompt 2 is longer than the 8 text tokens of the model; left out: "x"', stacklevel=2
    )
    return generate(prompts, **settings)

  pipeline.generate = cut
  run(*flags)
  pipeline.generate = generate
  run(*flags)  # Also known for shards of an earlier run.
  assert len(pipeline.generated) == 3
  assert json.loads((tmp_path / 'out' / 'report.json').read_text())['captions_cut'] == 3
  report = (tmp_path / 'out' / 'report.md').read_text()
  assert "Cut to the model's text length: 3 captions." in report


def test_without_features_to_compare(pipeline, flags, tmp_path):
  pipeline.ranker = None
  with pytest.raises(UserError, match='model fake has no ranker.*give --inception_weights'):
    run(*flags)
  assert not pipeline.generated and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--dataset=cocoa'], "unknown data set 'cocoa'; choose from openmoji, openmoji_scenes, coco"),
    (['--dataset=localized_narratives'], 'needs --annotations FILE, and --pictures DIR or'),
    (['--dataset=coco', '--annotations=a'], '--annotations FILE needs either --pictures DIR'),
    (
      ['--dataset=coco', '--annotations=a', '--pictures=b', '--reference=c'],
      '--annotations FILE needs either --pictures DIR',
    ),
    (['--dataset=coco', '--annotations=a', '--tfds_dir=b'], 'excludes --tfds_dir'),
    (
      ['--dataset=coco', '--splits', 'train'],
      '--splits only applies to --dataset=openmoji and openmoji_scenes, not to coco',
    ),
    (['--annotations=a'], '--annotations only applies to --dataset=coco and localized_narratives'),
    (['--num_captions=0', '--dataset=coco'], '--num_captions must be a positive number'),
    (['--image_size=0'], '--image_size must be a positive number'),
    (
      ['--image_size=64'],
      '--image_size is the size at which Inception compares pictures, and needs',
    ),
    (['--dataset=imagenet', '--classes=a', '--image_size=64'], 'whose pictures have --sample_size'),
    (['--inception_weights=nothing.pth'], "--inception_weights nothing.pth isn't a file"),
  ],
)
def test_bad_flags(pipeline, tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    run(f'--output_dir={tmp_path}/out', *arguments)
  assert not pipeline.generated and not (tmp_path / 'out').exists()
