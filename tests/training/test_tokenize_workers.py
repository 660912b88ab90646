"""Tests `parti-jax tokenize` in several processes, one after the other, and their tokens."""

import errno
import io
import itertools
import os
import subprocess
import sys
import tarfile
import threading

import jax
import jax.numpy as jnp
import misbehaving_store
import numpy as np
import pytest
import random_parameters
from PIL import Image

from parti_jax.cli import main
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.data import token_cache_parts
from parti_jax.data import views
from parti_jax.models import vit_vqgan
from parti_jax.runs import preemption
from parti_jax.tokenization import tokenize_jobs
from parti_jax.tokenization import tokenizing
from parti_jax.tokenization import tokenizing_progress
from parti_jax.training.objectives import frozen_tokenizer

TOKENIZER = vit_vqgan.ViTVQGANConfig(
  image_size=16,
  patch_size=4,
  encoder_layers=1,
  encoder_width=16,
  encoder_mlp_width=32,
  encoder_heads=2,
  decoder_layers=1,
  decoder_width=8,
  decoder_mlp_width=16,
  decoder_heads=2,
  codebook_size=64,
  code_dim=4,
  dtype='bfloat16',
)
# Examples of each tar; the third has no pictures.
TARS = (20, 3, 4, 1, 7)


@pytest.fixture(scope='module', name='tokenizer')
def _tokenizer():
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  params = jax.device_put(random_parameters.of(module, vit_vqgan.example_inputs(TOKENIZER)))
  return frozen_tokenizer.FrozenTokenizer('run', TOKENIZER, params)


def _jpeg(rng, height=40, width=50):
  data = io.BytesIO()
  pixels = rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
  Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)).save(data, 'jpeg')
  return data.getvalue()


@pytest.fixture(scope='module', name='tars')
def _tars(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('tars'), np.random.default_rng(0)
  for number, count in enumerate(TARS):
    with tarfile.open(folder / f'{number}.tar', 'w') as tar:
      for index in range(count):
        picture = b'none' if number == 2 else _jpeg(rng)
        for ending, data in (('jpg', picture), ('txt', f'tar {number}, {index}'.encode())):
          member = tarfile.TarInfo(f'{index:03d}.{ending}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
  return folder


@pytest.fixture(name='tokenize')
def _tokenize(monkeypatch, tokenizer, tars):
  """Runs the command on the tars; returns its status."""
  monkeypatch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)

  def run(folder, *flags):
    return main.main(
      [
        'tokenize',
        '--gin_file=gin_configs/tasks/webdataset.gin',
        f"--gin.webdataset.path='{tars}'",
        "--gin.webdataset.splits={'train': '*.tar'}",
        '--tokenizer=run',
        f'--output_dir={folder}',
        *flags,
      ]
    )

  return run


def _content(folder):
  return {name: storage.read(storage.join(folder, name), 2**30) for name in storage.sizes(folder)}


@pytest.fixture(name='whole')
def _whole(tokenize, tmp_path):
  """The output of a single process."""
  assert tokenize(tmp_path / 'whole') == 0
  return _content(tmp_path / 'whole')


def test_one_process(tokenize, tmp_path, capsys):
  assert tokenize(tmp_path / 'whole') == 0
  assert (
    'train: 31 pictures, 16 tokens each; skipped: 4 unknown picture format\n'
    in capsys.readouterr().out
  )
  assert sorted(_content(tmp_path / 'whole')) == [
    'info.json',
    *(f'train-0000{i}.array_record' for i in range(4)),
  ]
  split = token_cache_info.read_info(str(tmp_path / 'whole'))['splits']['train']
  assert [shard['examples'] for shard in split['shards']] == [20, 3, 1, 7]
  assert split['made_with']['dtype'] == 'float32'  # The default without an accelerator.
  records = token_cache.TokenCacheSource(str(tmp_path / 'whole')).open('train')
  assert [example['caption'].decode() for example in records.read(range(31))] == [
    f'tar {tar}, {index}' for tar, count in enumerate(TARS) for index in range(count) if tar != 2
  ]


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_workers_in_any_order_write_the_same(whole, tokenize, tmp_path, order, capsys):
  for place, worker in enumerate(order):
    capsys.readouterr()
    assert tokenize(tmp_path / 'tokens', f'--worker={worker}/3', f'--batch_size={3 + worker}') == 0
    out = capsys.readouterr().out
    if place < 2:
      assert f'worker {worker} of 3 is done; ' in out and 'are left for the others' in out
      with pytest.raises(UserError, match='is not finished'):
        token_cache_info.read_info(str(tmp_path / 'tokens'))
  assert 'train: 31 pictures' in out
  assert _content(tmp_path / 'tokens') == whole


def test_records_are_cut_by_their_numbers(monkeypatch, tokenizer, tmp_path):
  monkeypatch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD', 4)
  rng, lines = np.random.default_rng(1), []
  for index in range(11):
    (tmp_path / f'{index}.jpg').write_bytes(_jpeg(rng) if index != 5 else b'none')
    lines.append(f'{{"file": "{index}.jpg", "caption": "number {index}"}}')
  (tmp_path / 'captions.jsonl').write_text('\n'.join(lines))
  for folder, workers in (('one', 1), ('five', 5)):
    for worker in range(workers):
      assert (
        main.main(
          [
            'tokenize',
            '--gin_file=gin_configs/tasks/folder.gin',
            f"--gin.folder.path='{tmp_path}'",
            '--tokenizer=run',
            '--splits',
            'train',
            "--gin.folder.splits={'train': 'captions.jsonl'}",
            f'--output_dir={tmp_path / folder}',
            f'--worker={worker}/{workers}',
          ]
        )
        == 0
      )
  assert _content(tmp_path / 'one') == _content(tmp_path / 'five')
  split = token_cache_info.read_info(str(tmp_path / 'one'))['splits']['train']
  assert [shard['examples'] for shard in split['shards']] == [4, 3, 3]


def test_the_output_at_a_bad_store_is_that_on_a_disk(whole, tokenize, bad_store):
  bad_store.faults = misbehaving_store.seeded(3, 0.2)
  assert tokenize(f'{bad_store.folder}/tokens') == 0
  assert bad_store.sent
  assert _content(f'{bad_store.folder}/tokens') == whole


def test_a_source_at_a_bad_store_gives_the_same_bytes(tokenize, tars, bad_store, tmp_path):
  for tar in tars.iterdir():
    storage.upload(tar, f'{bad_store.folder}/{tar.name}')
  source = f"--gin.webdataset.path='{bad_store.folder}'"
  assert tokenize(tmp_path / 'good', source) == 0
  bad_store.faults = misbehaving_store.seeded(3, 0.2)
  assert tokenize(tmp_path / 'bad', source) == 0
  assert bad_store.sent
  assert _content(tmp_path / 'bad') == _content(tmp_path / 'good')


@pytest.mark.parametrize('batch_size', [1, 5, 1000])
def test_no_token_depends_on_the_batch_size(whole, tokenize, tmp_path, batch_size):
  assert tokenize(tmp_path / 'tokens', f'--batch_size={batch_size}') == 0
  assert _content(tmp_path / 'tokens') == whole


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_token_depends_on_the_number_of_devices(tokenizer, dtype):
  images = np.random.default_rng(2).integers(0, 256, (150, 16, 16, 3), np.uint8)
  one = frozen_tokenizer.Encoder(tokenizer, dtype, jax.devices()[:1])
  several = frozen_tokenizer.Encoder(tokenizer, dtype, jax.devices()[:5])
  tokens = one(images)()
  assert tokens.shape == (150, 16) and tokens.dtype == np.int32
  np.testing.assert_array_equal(tokens, several(images)())
  np.testing.assert_array_equal(
    tokens[7:60], np.concatenate([several(images[start : start + 1])() for start in range(7, 60)])
  )


def test_the_encoders_tokens_are_the_tokenizers(tokenizer):
  images = np.random.default_rng(3).integers(0, 256, (16, 16, 16, 3), np.uint8)
  found = {}
  for dtype in (None, 'float32', 'bfloat16'):
    encoder = frozen_tokenizer.Encoder(tokenizer, dtype, jax.devices()[:1])
    assert encoder.dtype == (dtype or 'float32')
    found[dtype] = encoder(images)()
  np.testing.assert_array_equal(found[None], found['float32'])
  with jax.default_matmul_precision('highest'):
    module = vit_vqgan.ViTVQGAN(TOKENIZER.__class__(**{**TOKENIZER.__dict__, 'dtype': 'float32'}))
    expected = module.apply(
      {'params': tokenizer.params}, jnp.asarray(images / np.float32(255)), method='tokenize'
    )
  assert (found['float32'] == expected).mean() > 0.99
  assert 0.8 < (found['bfloat16'] == expected).mean() < 1


def test_views(whole, tokenize, tokenizer, tars, tmp_path):
  tokens = {}
  for count in (1, 2, 10):
    folder = str(tmp_path / f'views{count}')
    assert tokenize(folder, f'--views={count}', '--batch_size=7') == 0
    records = token_cache.TokenCacheSource(folder).open('train')
    tokens[count] = np.array([example['tokens'] for example in records.read(range(31))])
  assert _content(tmp_path / 'views1') == whole
  assert tokens[2].shape == (31, 2, 16) and tokens[10].shape == (31, 10, 16)
  np.testing.assert_array_equal(tokens[1], tokens[2][:, 0])
  np.testing.assert_array_equal(tokens[2], tokens[10][:, :2])
  with tarfile.open(tars / '1.tar') as tar:
    picture = tar.extractfile('000.jpg').read()
  plain, larger = image_decoding.decode(picture, 16), image_decoding.decode(picture, 18)
  expected = []
  for view in (plain, larger[:16, :16], larger[:16, 2:], larger[2:, :16], larger[2:, 2:]):
    expected += [view, view[:, ::-1]]
  encoder = frozen_tokenizer.Encoder(tokenizer, devices=jax.devices()[:1])
  np.testing.assert_array_equal(tokens[10][20], encoder(np.stack(expected))())
  assert len({tuple(view) for view in tokens[10][20]}) == 10


def test_the_first_views_are_the_same_whatever_their_number():
  example = {'picture': _jpeg(np.random.default_rng(4)), 'caption': b' words '}
  found = {count: views.Preparation(16, count)(example, 0.5)[0] for count in views.COUNTS}
  assert {found[count]['caption'] for count in found} == {'words'}
  for fewer, more in itertools.pairwise(views.COUNTS):
    np.testing.assert_array_equal(found[fewer]['views'], found[more]['views'][:fewer])


def test_to_a_store(whole, tokenize, s3_bucket):
  folder = f'{s3_bucket}/tokenized'
  for worker in range(2):
    assert tokenize(folder, f'--worker={worker}/2') == 0
  assert _content(folder) == whole


def test_from_a_store_with_the_same_files(whole, tokenize, tars, s3_bucket, tmp_path):
  """Tests hosts that see the files at different paths."""
  for path in tars.iterdir():
    storage.upload(path, f'{s3_bucket}/tars/{path.name}')
  url = f"--gin.webdataset.path='{s3_bucket}/tars'"
  assert tokenize(tmp_path / 'tokens', url, '--worker=0/2') == 0
  assert tokenize(tmp_path / 'tokens', '--worker=1/2') == 0
  assert _content(tmp_path / 'tokens') == whole


def test_a_source_that_changed_meanwhile_is_refused(tokenize, tmp_path, capsys):
  assert tokenize(tmp_path / 'tokens', '--worker=0/2') == 0
  other = "--gin.webdataset.splits={'train': '[0134].tar'}"
  assert tokenize(tmp_path / 'tokens', '--worker=1/2', other) == 2
  assert "holds parts of a split 'train' with files 5, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
  'line', ['{"file": "1.jpg", "caption": "other"}', '{"file": "2.jpg", "caption": "words"}']
)
def test_a_captions_file_that_changed_meanwhile_is_refused(
  line, monkeypatch, tokenizer, tmp_path, capsys
):
  monkeypatch.setattr(frozen_tokenizer, 'load', lambda run: tokenizer)
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD', 1)
  for index in range(3):
    (tmp_path / f'{index}.jpg').write_bytes(_jpeg(np.random.default_rng(index)))
  lines = ['{"file": "0.jpg", "caption": "words"}', '{"file": "1.jpg", "caption": "words"}']
  statuses = []
  for worker, last in enumerate((lines[1], line)):
    (tmp_path / 'captions.jsonl').write_text(f'{lines[0]}\n{last}')
    statuses.append(
      main.main(
        [
          'tokenize',
          '--gin_file=gin_configs/tasks/folder.gin',
          f"--gin.folder.path='{tmp_path}'",
          "--gin.folder.splits={'train': 'captions.jsonl'}",
          '--tokenizer=run',
          f'--output_dir={tmp_path}/tokens',
          f'--worker={worker}/2',
        ]
      )
    )
  assert statuses == [0, 2]
  assert "holds parts of a split 'train' with digest " in capsys.readouterr().err


def test_a_missing_bucket(tokenize, s3_bucket, capsys):
  del s3_bucket
  assert tokenize('s3://nowhere/tokens') == 2
  assert 's3://nowhere/tokens/' in capsys.readouterr().err


class Killed(BaseException):
  pass


@pytest.mark.parametrize('part', [0, 1, 4])
def test_killed_while_a_shard_is_written(whole, tokenize, tmp_path, monkeypatch, part):
  write = token_cache.write_shard

  def killed(path, records):
    if path.endswith(f'-{part:05d}.array_record'):
      raise Killed
    return write(path, records)

  with monkeypatch.context() as patch:
    patch.setattr(token_cache, 'write_shard', killed)
    with pytest.raises(Killed):
      tokenize(tmp_path / 'tokens')
  with monkeypatch.context() as patch:  # Finished parts are not made again.
    finished = {path.name for path in tmp_path.glob('tokens/.train.parts/*.array_record')}
    patch.setattr(
      token_cache,
      'write_shard',
      lambda path, records: (
        pytest.fail(path) if os.path.basename(path) in finished else write(path, records)
      ),
    )
    assert tokenize(tmp_path / 'tokens', '--worker=0/1') == 0
  assert _content(tmp_path / 'tokens') == whole


def test_a_full_disk_ends_it_at_once(tokenize, tmp_path, monkeypatch, capsys):
  def full(path, records):
    next(iter(records))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(token_cache, 'write_shard', full)
  assert tokenize(tmp_path / 'tokens', '--batch_size=1') == 2
  assert 'tokens cannot be written: No space left on device' in capsys.readouterr().err


def test_an_error_of_the_source_ends_it(tokenize, tmp_path, monkeypatch, capsys):
  def broken(_, example, draw):
    del draw
    if example['caption'] == b'tar 1, 1':
      raise UserError('the store failed')
    return {'caption': 'x', 'views': np.zeros((1, 16, 16, 3), np.uint8)}, []

  monkeypatch.setattr(views.Preparation, '__call__', broken)
  assert tokenize(tmp_path / 'tokens') == 2
  assert 'the store failed' in capsys.readouterr().err
  assert not list(tmp_path.glob('tokens/.train.parts/*-00001.*'))


def test_reading_ahead_ends_when_the_consumer_stops():
  taken = []
  with tokenizing._Ahead(iter(taken.append(i) or i for i in itertools.count()), 2) as ahead:
    assert list(itertools.islice(ahead, 3)) == [0, 1, 2]
  assert not ahead._thread.is_alive() and len(taken) < 10


def _job(folder, examples=(2, 1, 3)):
  info = {'codebook_size': 100, 'image_tokens': 4, 'tokenizer': 'abc', 'views': 1}
  parts = token_cache_parts.SplitParts(str(folder), 'train', info, {}, len(examples))

  def write(indices, progress):
    for index in indices:
      parts.write(
        index,
        (
          token_cache.serialized(f'{index}', np.full(4, index), info)
          for _ in range(examples[index])
        ),
        {'skipped': {}, 'shortened': {}},
      )
      progress.end_part()

  return tokenize_jobs.Job(parts, lambda indices: None, write, 'pictures')


def test_processes_that_work_together_wait_for_each_other(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tokenize_jobs, '_LOOK', 0.02)
  monkeypatch.setattr(tokenize_jobs, '_SAY', 0.01)
  threads = [
    threading.Thread(
      target=tokenize_jobs.run, args=([_job(tmp_path)], worker, 3, True, False), daemon=True
    )
    for worker in range(3)
  ]
  for thread in threads[:2]:
    thread.start()
  threads[0].join(1)
  assert all(thread.is_alive() for thread in threads[:2])
  threads[2].start()
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  assert token_cache_info.read_info(str(tmp_path))['splits']['train']['examples'] == 6
  shown = capsys.readouterr()
  assert shown.out.count('train: 6 pictures') == 1
  assert 'train: 1 of 3 parts are being written by other processes' in shown.err


def test_the_process_that_merges_writes_damaged_parts_again(tmp_path):
  tokenize_jobs.run([_job(tmp_path / 'whole')], 0, 1, False, False)
  tokenize_jobs.run([_job(tmp_path / 'tokens')], 0, 2, False, False)
  (path,) = (tmp_path / 'tokens').glob('.train.parts/*-00002.json')
  path.write_text('{')
  tokenize_jobs.run([_job(tmp_path / 'tokens')], 1, 2, False, False)
  assert _content(tmp_path / 'tokens') == _content(tmp_path / 'whole')


def test_progress():
  progress = tokenizing_progress.Progress('train', 4, 1000)
  assert progress.line(1.0) == 'train: 0 examples, 0/s; 0 of 4 parts'
  progress.add(100, {'no caption': 20, 'damaged picture': 30})
  progress.end_part()
  assert progress.line(10.0) == (
    'train: 100 examples, 15/s, about 57 s left; 1 of 4 parts; skipped 30 damaged picture, '
    '20 no caption'
  )
  progress = tokenizing_progress.Progress('train', 4, None)
  progress.add(3000, {})
  progress.end_part()
  assert progress.line(3000.0) == 'train: 3,000 examples, 1/s, about 2 h 30 min left; 1 of 4 parts'


def test_lines_are_printed_at_intervals(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(tokenizing_progress.time, 'monotonic', lambda: now[0])
  progress = tokenizing_progress.Progress('train', 1, None)
  for _ in range(130):
    now[0] += 1
    progress.add(1, {})
  lines = capsys.readouterr().err.splitlines()
  assert [line.split(',')[0] for line in lines] == ['train: 11 examples', 'train: 72 examples']


@pytest.mark.process
def test_sigterm_ends_it_at_once():
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      """
import os, signal, time
from parti_jax.runs import preemption
with preemption.listening(at_once='finished parts are kept'):
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
""",
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert done.returncode == preemption.STATUS
  assert done.stderr == (
    'parti-jax: asked to stop by SIGTERM; finished parts are kept; start again to resume\n'
  )
