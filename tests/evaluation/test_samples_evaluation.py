"""ADM's protocol against independent copies of its formulas, and how its command resumes."""

import errno
import functools
import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import measurement
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.metrics import inception_score

SIZE = 6
OF_FEATURES = {'network': 'Inception, a fake', 'weights': 'none'}


class Extractor:
  """Projects pixels to 5 features, 6 spatial ones and 4 logits."""

  name, image_size, resizes = 'fake', SIZE, True

  def __init__(self):
    draw = np.random.default_rng(7)
    self.weights = [draw.normal(size=(3 * SIZE**2, dim)) / 500 for dim in (5, 4, 6)]
    self.seen = 0

  def __call__(self, images):
    self.seen += len(images)
    rows = images[:, :SIZE, :SIZE].reshape(len(images), -1).astype(np.float64)
    return features.Features(*((rows @ part).astype(np.float32) for part in self.weights))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(picture_sets, 'BLOCK', 16)


def _images(seed, count, bright=0):
  draw = np.random.default_rng(seed)
  return np.clip(draw.normal(120 + bright, 60, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


SAMPLES, REAL = _images(0, 75, bright=10), _images(1, 90)


def _save(path, images, **arrays):
  np.savez(path, arr_0=images, **arrays)
  return str(path)


def _measured(tmp_path, samples, reference, extractor=None, image_size=None):
  extractor = extractor or Extractor()
  folder = tmp_path / 'out'
  folder.mkdir(exist_ok=True)
  pictures = picture_sets.open_path(samples)
  opened = samples_evaluation.open_reference(reference)
  stores = feature_blocks.Store(folder, 'samples'), feature_blocks.Store(folder, 'reference')
  samples_evaluation.compute(pictures, extractor, stores[0], image_size)
  if opened.pictures is not None:
    samples_evaluation.compute(opened.pictures, extractor, stores[1], image_size)
  return samples_evaluation.evaluate(pictures, opened, extractor, OF_FEATURES, stores)


def _frechet(one, other):
  """As ADM's FIDStatistics.frechet_distance."""
  (mu1, sigma1), (mu2, sigma2) = one, other
  covmean = scipy.linalg.sqrtm(sigma1 @ sigma2).real
  diff = mu1 - mu2
  return diff @ diff + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(covmean)


def _statistics(rows):
  return np.mean(rows, axis=0), np.cov(rows, rowvar=False)


def _inception_score(logits, size):
  """As ADM's Evaluator.compute_inception_score."""
  preds = np.exp(logits.astype(np.float64))
  preds /= preds.sum(axis=1, keepdims=True)
  scores = []
  for start in range(0, len(preds), size):
    part = preds[start : start + size]
    kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
    scores.append(np.exp(np.mean(np.sum(kl, 1))))
  return np.mean(scores)


def _precision_recall(sample, real, k=3):
  """As ADM's ManifoldEstimator: shares within the distance of the k-th neighbor."""
  distances = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
  radii = [np.sort(distances(part, part), axis=1)[:, k] for part in (real, sample)]
  between = distances(sample, real)
  return (between <= radii[0]).any(1).mean(), (between.T <= radii[1]).any(1).mean()


def test_values_are_adms(tmp_path, monkeypatch):
  monkeypatch.setattr(inception_score, 'PART', 30)
  monkeypatch.setattr(
    inception_score, 'Consecutive', functools.partial(inception_score.Consecutive, 30)
  )
  found = _measured(tmp_path, _save(tmp_path / 's.npz', SAMPLES), _save(tmp_path / 'r.npz', REAL))
  ours, real = Extractor()(SAMPLES), Extractor()(REAL)
  double = lambda rows: rows.astype(np.float64)
  values = {name: value.value for name, value in found.values.items()}
  precision, recall = _precision_recall(double(ours.values), double(real.values))
  assert values == pytest.approx(
    {
      'fid': _frechet(_statistics(double(ours.values)), _statistics(double(real.values))),
      'sfid': _frechet(_statistics(double(ours.spatial)), _statistics(double(real.spatial))),
      'inception_score': _inception_score(ours.logits, 30),
      'precision': precision,
      'recall': recall,
    },
    rel=1e-6,
  )
  assert 0 < precision < 1 and 0 < recall < 1
  assert found.values['inception_score'].error_of == 'deviation over 3 parts'
  assert found.values['fid'].error > 0
  assert found.protocol['pictures'] == 75 and found.protocol['picture_size'] == [SIZE, SIZE]
  assert found.protocol['reference']['pictures'] == 90


def test_a_reference_of_adms_statistics(tmp_path):
  real, other = Extractor()(REAL), Extractor()(_images(3, 200))
  statistics = dict(
    zip(
      ('mu', 'sigma', 'mu_s', 'sigma_s'),
      (*_statistics(other.values), *_statistics(other.spatial)),
    )
  )
  samples = _save(tmp_path / 's.npz', SAMPLES)
  found = _measured(tmp_path, samples, _save(tmp_path / 'adm.npz', REAL, **statistics))
  ours = Extractor()(SAMPLES)
  assert found.values['fid'].value == pytest.approx(
    _frechet(_statistics(ours.values), _statistics(other.values)), rel=1e-4
  )
  # The pictures of the file are for precision and recall alone.
  precision, _ = _precision_recall(ours.values, real.values)
  assert found.values['precision'].value == pytest.approx(precision)
  assert len(found.protocol['reference']['statistics']) == 64

  np.savez(tmp_path / 'only.npz', **statistics)
  found = _measured(tmp_path, samples, str(tmp_path / 'only.npz'))
  assert set(found.values) == {'fid', 'sfid', 'inception_score'}
  assert any('Precision, recall: left out' in remark for remark in found.remarks)

  np.savez(tmp_path / 'fid.npz', mu=statistics['mu'], sigma=statistics['sigma'])
  found = _measured(tmp_path, samples, str(tmp_path / 'fid.npz'))
  assert set(found.values) == {'fid', 'inception_score'}
  assert any('sFID: left out' in remark for remark in found.remarks)

  np.savez(tmp_path / 'other.npz', mu=np.zeros(3), sigma=np.eye(3))
  with pytest.raises(UserError, match='statistics of 3 features.*are 5'):
    _measured(tmp_path, samples, str(tmp_path / 'other.npz'))
  np.savez(tmp_path / 'half.npz', mu=np.zeros(3))
  with pytest.raises(UserError, match='only one of mu and sigma'):
    samples_evaluation.open_reference(str(tmp_path / 'half.npz'))


def test_written_statistics_are_a_reference(tmp_path):
  samples = _save(tmp_path / 's.npz', SAMPLES)
  _measured(tmp_path, samples, samples)
  store = feature_blocks.Store(tmp_path / 'out', 'samples')
  (tmp_path / 'statistics.npz').write_bytes(samples_evaluation.statistics_file(store, samples))
  found = _measured(tmp_path, samples, str(tmp_path / 'statistics.npz'))
  assert found.values['fid'].value == pytest.approx(0, abs=1e-9)
  assert found.values['sfid'].value == pytest.approx(0, abs=1e-9)


def test_an_interrupted_command_goes_on_and_workers_share_the_blocks(tmp_path):
  pictures = picture_sets.open_path(_save(tmp_path / 's.npz', SAMPLES))
  store = feature_blocks.Store(tmp_path, 'samples')
  first, second = Extractor(), Extractor()
  samples_evaluation.compute(pictures, first, store, None, (0, 2))
  assert first.seen == 3 * 16 - 5 and store.missing() == [1, 3]
  samples_evaluation.compute(pictures, second, store, None, (1, 2))
  assert second.seen == 2 * 16 and not store.missing()
  samples_evaluation.compute(pictures, first, store, None)
  assert first.seen == 3 * 16 - 5
  np.testing.assert_array_equal(
    np.concatenate(list(store.arrays('values'))), Extractor()(SAMPLES).values
  )
  path = next((tmp_path / 'features').glob('samples_000001.npz'))
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match='delete .*samples_000001.npz and run the command again'):
    list(store.arrays('values'))


def _folder(path, images, ending='png', **options):
  path.mkdir(parents=True)
  for index, image in enumerate(images):
    Image.fromarray(image).save(path / f'{index:06d}.{ending}', **options)
  return str(path)


def test_a_folder_is_the_same_as_an_npz_and_jpegs_are_named(tmp_path):
  reference = _save(tmp_path / 'r.npz', REAL)
  of_npz = _measured(tmp_path / 'a', _made(tmp_path / 'a', SAMPLES), reference)
  of_pngs = _measured(_made_folder(tmp_path / 'b'), _folder(tmp_path / 'png', SAMPLES), reference)
  assert of_npz.values == of_pngs.values and of_npz.protocol == of_pngs.protocol
  assert of_npz.subject['digest'] == of_pngs.subject['digest']
  jpegs = _folder(tmp_path / 'jpg', SAMPLES, 'jpg', quality=75)
  of_jpegs = _measured(_made_folder(tmp_path / 'c'), jpegs, reference)
  assert of_jpegs.protocol['compression'] == 'JPEG'
  assert measurement.differences(of_npz.protocol, of_jpegs.protocol) == {
    'compression': ('lossless', 'JPEG')
  }


def _made_folder(path):
  path.mkdir()
  return path


def _made(folder, images):
  return _save(_made_folder(folder) / 's.npz', images)


def test_damaged_pictures_are_counted_and_sizes_must_agree(tmp_path):
  folder = _folder(tmp_path / 'png', SAMPLES[:40])
  (tmp_path / 'png' / '000002.png').write_bytes(b'no picture')
  reference = _save(tmp_path / 'r.npz', REAL)
  found = _measured(tmp_path, folder, reference)
  assert found.protocol['pictures'] == 39
  assert any('left out 1 ' in remark for remark in found.remarks)
  larger = _save(tmp_path / 'large.npz', np.zeros((20, 8, 8, 3), np.uint8))
  with pytest.raises(UserError, match='6×6 pixels, but .*large.npz of 8×8; give --image_size'):
    _measured(_made_folder(tmp_path / 'b'), folder, larger)
  found = _measured(_made_folder(tmp_path / 'c'), folder, larger, image_size=SIZE)
  assert found.protocol['resize'] == 'none'
  assert found.protocol['reference']['resize'].startswith('bicubic with antialiasing')
  Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(tmp_path / 'png' / '000039.png')
  with pytest.raises(UserError, match='5×9.*give --image_size'):
    _measured(_made_folder(tmp_path / 'd'), folder, reference)


@pytest.mark.parametrize(
  'arrays, named',
  [
    ({'images': SAMPLES}, 'no array arr_0 of pictures, but images'),
    ({'arr_0': SAMPLES / 255}, r'arr_0 is float64 \[75, 6, 6, 3\]; expected uint8'),
    ({'arr_0': SAMPLES.transpose(0, 3, 1, 2)}, r'arr_0 is uint8 \[75, 3, 6, 6\]'),
    ({'arr_0': SAMPLES[:0]}, 'has no pictures'),
  ],
)
def test_other_files_are_refused(tmp_path, arrays, named):
  np.savez(tmp_path / 's.npz', **arrays)
  with pytest.raises(UserError, match=named):
    picture_sets.open_path(str(tmp_path / 's.npz'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='has no pictures'):
    picture_sets.open_path(str(tmp_path / 'empty'))
  with pytest.raises(UserError, match='does not exist'):
    picture_sets.open_path(str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match='--pictures .*nowhere does not exist'):
    picture_sets.open_path(str(tmp_path / 'nowhere'), '--pictures')


@pytest.mark.parametrize(
  'arrays, named',
  [
    ({'mu': np.array(list('abcde'))}, 'mu is <U1; expected real numbers'),
    ({'mu': np.zeros(5, complex)}, 'mu is complex128'),
    ({'sigma': -np.eye(5)}, 'sigma is not a covariance'),
    ({'sigma': np.eye(5) + np.triu(np.ones((5, 5)), 1)}, 'sigma is not a covariance'),
    ({'sigma': np.eye(5) + 1.5 * (1 - np.eye(5))}, 'sigma is not a covariance'),
    ({'mu_s': np.zeros(6), 'sigma_s': -np.eye(6)}, 'sigma_s is not a covariance'),
    ({'mu': np.full(5, np.nan)}, 'not finite'),
  ],
)
def test_damaged_statistics_are_refused(tmp_path, arrays, named):
  path = tmp_path / 'r.npz'
  np.savez(path, **{'mu': np.zeros(5), 'sigma': np.eye(5), **arrays})
  with pytest.raises(UserError, match=named):
    samples_evaluation.open_reference(str(path))


def test_statistics_of_few_pictures_in_float32_are_no_damage(tmp_path):
  rows = np.random.default_rng(0).normal(size=(8, 200)) * 3 + 100
  mean, covariance = _statistics(rows)
  path = tmp_path / 'r.npz'
  np.savez(path, mu=mean.astype(np.float32), sigma=covariance.astype(np.float32))
  assert len(samples_evaluation.open_reference(str(path)).statistics['values'].mean) == 200


def test_other_pictures_in_files_of_the_same_size_are_another_set(tmp_path):
  """Features of the old ones must not pass for those of the new ones."""
  found = []
  for number, seed in enumerate((0, 1, 0)):
    folder = _made_folder(tmp_path / str(number))
    for index, image in enumerate(_images(seed, 3)):
      Image.fromarray(image).save(folder / f'{index}.png', compress_level=0)
    sizes = {path.stat().st_size for path in folder.iterdir()}
    found.append((picture_sets.open_path(str(folder)).identity(), sizes))
  assert found[0][1] == found[1][1]
  assert found[0] == found[2] and found[0][0] != found[1][0]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
  def full(self, content):
    raise OSError(errno.ENOSPC, 'No space left on device')

  store = feature_blocks.Store(tmp_path, 'samples')
  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(UserError, match='samples_000003.npz cannot be written .No space'):
    store.write(3, {'values': np.zeros((2, 2))}, {})
  with pytest.raises(UserError, match='samples_end.json cannot be written .No space'):
    store.count = 4
  assert not list((tmp_path / 'features').iterdir())


def test_samples_sorted_by_class_are_warned_of(tmp_path, monkeypatch):
  monkeypatch.setattr(inception_score, 'PART', 30)
  reference = _save(tmp_path / 'r.npz', REAL)
  labels = np.repeat(np.arange(15), 5)
  by_class = _save(tmp_path / 's.npz', SAMPLES, arr_1=labels)
  found = _measured(tmp_path, by_class, reference)
  assert any('only 6 of 15 classes' in remark for remark in found.remarks)
  taking_turns = _save(tmp_path / 't.npz', SAMPLES, arr_1=np.tile(np.arange(15), 5))
  found = _measured(_made_folder(tmp_path / 'b'), taking_turns, reference)
  assert not any('classes' in remark for remark in found.remarks)


def test_too_few_pictures_are_told(tmp_path):
  reference = _save(tmp_path / 'r.npz', REAL)
  found = _measured(tmp_path, _save(tmp_path / 's.npz', SAMPLES[:3]), reference)
  assert found.values['fid'].error is None and 'precision' not in found.values
  assert any('a covariance is singular' in remark for remark in found.remarks)
  with pytest.raises(UserError, match='one usable picture'):
    _measured(_made_folder(tmp_path / 'b'), _save(tmp_path / 'one.npz', SAMPLES[:1]), reference)


def test_the_command(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  draw = np.random.default_rng(0)
  for name, shift in (('samples', 20), ('reference', 0)):
    images = draw.integers(0, 200, (40, 16, 16, 3)) + shift
    np.savez(f'{name}.npz', arr_0=images.astype(np.uint8))
  np.savez('large.npz', arr_0=np.zeros((5, 9, 9, 3), np.uint8))
  (tmp_path / 'run.json').write_text(
    json.dumps({'model': 'a', 'seed': 3, 'sampling': {'guidance_scale': 2}})
  )
  command = ['evaluate_samples', 'samples.npz', '--reference=reference.npz', '--output_dir=out']
  assert main.main([*command, '--worker=0/2']) == 0
  assert 'left to other workers' in capsys.readouterr().out
  assert main.main([*command, '--statistics=own.npz']) == 0
  found = measurement.read('out/measurement.json')
  assert found.values['frechet_distance'].value > 0 and 'fid' not in found.values
  assert found.subject['drawn_with']['sampling'] == {'guidance_scale': 2}
  (tmp_path / 'run.json').write_text(json.dumps({'seed': 3}))
  assert main.main([*command, '--statistics=own.npz']) == 0
  assert 'drawn_with' not in measurement.read('out/measurement.json').subject
  assert np.load('own.npz')['sigma'].shape == (128, 128)
  assert main.main(['evaluate_samples', 'reference.npz', *command[2:]]) == 2
  assert 'holds pictures of another run, with samples' in capsys.readouterr().err
  for flags, message in (
    (['samples.npz'], 'give --reference PATH'),
    ([*command[1:3], '--inception_weights=nowhere'], "nowhere isn't a file"),
    ([*command[1:3], '--image_size=0'], '--image_size'),
    (['large.npz', command[2]], 'large.npz has pictures of 9×9 pixels, but reference.npz of 16×16'),
    ([*command[1:3], '--statistics=own.txt'], 'must end in .npz'),
    ([*command[1:3], '--statistics=./samples.npz'], 'would replace SAMPLES, the same file'),
    ([*command[1:3], '--statistics=reference.npz'], 'would replace --reference, the same file'),
    ([*command[1:3], '--statistics=nowhere/own.npz'], 'its folder does not exist'),
  ):
    assert main.main(['evaluate_samples', *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_hosts_give_the_numbers_of_one(tmp_path):
  draw = np.random.default_rng(0)
  for name in ('samples', 'reference'):
    np.savez(
      tmp_path / f'{name}.npz', arr_0=draw.integers(0, 256, (600, 16, 16, 3)).astype(np.uint8)
    )
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]

  def start(folder, *flags):
    command = [sys.executable, '-P', '-m', 'parti_jax.cli.main', 'evaluate_samples', 'samples.npz']
    command += ['--reference=reference.npz', f'--output_dir={folder}', *flags]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)

  hosts = [
    start('two', f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={host}')
    for host in range(2)
  ]
  assert [host.wait(300) for host in [*hosts, start('one')]] == [0, 0, 0]
  one, two = (
    measurement.read(str(tmp_path / folder / 'measurement.json')) for folder in ('one', 'two')
  )
  assert one == two
