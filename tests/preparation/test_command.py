"""`parti-jax prepare` end to end, on Beam's local runner."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import traceback

import gin
import numpy as np
import pytest
from PIL import Image

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.data.batches import Batches
from parti_jax.data.sources import prepared

pytest.importorskip(
  'apache_beam', reason='apache-beam is not installed (extra "beam", in a venv of its own)'
)

GIN = '--gin_file=gin_configs/tasks/webdataset.gin'


def _source(folder):
  return [GIN, f"--gin.webdataset.path='{folder}'", '--gin.prepare.size=32']


def _prepare(*arguments):
  return main.main(['prepare', *map(str, arguments)])


def _files(folder):
  return {name: pathlib.Path(folder, name).read_bytes() for name in sorted(os.listdir(folder))}


def _report(folder):
  return json.loads(pathlib.Path(folder, 'report.json').read_text())['splits']['train']


@pytest.fixture
def tars(draw, encode, write_tar):
  """Tars with identical, similar, damaged and filtered pictures."""
  good = {'clip': 0.3}
  jpeg = lambda seed, size=(64, 48): encode(draw(seed, size), 'jpeg', quality=90)
  smaller = draw(3, (256, 192)).resize((60, 45), Image.Resampling.BICUBIC)
  write_tar(
    '0.tar',
    [
      ('00', 'first', jpeg(0), good),
      ('01', 'second', jpeg(1), good),
      ('02', 'broken', jpeg(2)[:200], good),
    ],
  )
  write_tar(
    '1.tar',
    [
      ('10', 'copy of the first', jpeg(0), good),
      ('11', '', jpeg(9), good),
      ('12', 'small', encode(smaller, 'jpeg', quality=90), good),
    ],
  )
  folder = write_tar(
    '2.tar',
    [
      ('20', 'large', jpeg(3, (256, 192)), good),
      ('21', 'low', jpeg(4), {'clip': 0.1}),
      ('22', 'white', encode(Image.new('RGB', (40, 40), 'white'), 'jpeg'), good),
      ('23', 'black', encode(Image.new('RGB', (40, 40), 'black'), 'jpeg'), good),
    ],
  )
  (folder / '3.tar').write_bytes((folder / '2.tar').read_bytes()[:5000])
  return folder


FILTERS = ["--gin.prepare.columns={'clip': (0.2, None)}", '--gin.prepare.near_duplicates=5']


def test_from_tars_to_batches(tars, tmp_path, capsys):
  out = tmp_path / 'out'
  assert _prepare(*_source(tars), *FILTERS, f'--output_dir={out}', '--direct_num_workers=1') == 0
  said = capsys.readouterr().out
  assert '--direct_num_workers' in said
  assert re.match(rf'{out}: train: 5 .*\b4 ', said.splitlines()[-1])
  examples = list(prepared.PreparedSource(str(out)).examples('train'))
  assert [example['caption'] for example in examples] == [
    b'first',
    b'second',
    b'large',
    b'white',
    b'black',
  ]
  report = _report(out)
  assert report['left_out'] == {
    'damaged picture': 1,
    'no caption': 1,
    'column clip too low': 1,
    'duplicate picture': 1,
    'picture that looks like another': 1,
    'rest of a damaged tar shard': 1,
  }
  assert report['read'] == 11 and report['written'] == 5
  assert report['damaged'] == [f'{tars}/3.tar: rest of a damaged tar shard']
  assert not [name for name in os.listdir(out) if name.startswith('.')]
  gin.clear_config()
  gin.parse_config(f"prepared.path = '{out}'")
  batches = Batches('prepared_pairs', 'train', 5, {'inputs': 8, 'images': 16}, num_epochs=1)
  images = [batch['images'] for batch in batches]
  assert np.concatenate(images).shape == (5, 16, 16, 3)


def test_processes_and_repetitions_do_not_change_the_result(tars, tmp_path):
  """Runners may divide the work in any way, and repeat steps that they believe have failed."""
  found = []
  for number, flags in enumerate(
    (
      ['--direct_num_workers=1'],
      ['--direct_num_workers=2'],
      ['--direct_num_workers=1', '--direct_runner_bundle_repeat=2'],
    )
  ):
    out = tmp_path / f'out{number}'
    assert _prepare(*_source(tars), *FILTERS, f'--output_dir={out}', *flags) == 0
    found.append(_files(out))
  assert found[0] == found[1] == found[2]
  assert len(found[0]) == 6


def test_without_comparing_examples(tars, tmp_path):
  out = tmp_path / 'out'
  assert (
    _prepare(
      *_source(tars),
      f'--output_dir={out}',
      '--gin.prepare.duplicates=None',
      '--direct_num_workers=1',
    )
    == 0
  )
  assert _report(out)['written'] == 8


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--direct_num_wokers=2'], '--direct_num_wokers: '),
    (['--direct_num_workers=two'], "--direct_num_workers: .*'two'"),
    (['two'], "'two'"),
    (['--runner=NoRunner'], 'NoRunner'),
    (['--runner=DataflowRunner'], 'project'),
    (['--split=test'], "'test'.* train"),
    (['--gin.prepare.quality=0'], 'prepare.quality=0'),
    (["--gin.prepare.columns={'nsfw': (0, 1)}"], r"'nsfw'.*\b3\b"),
    (["--gin.webdataset.path='nowhere'"], 'nowhere.*webdataset.path'),
  ],
)
def test_bad_input_is_found_before_anything_is_written(tars, tmp_path, capsys, arguments, message):
  out = tmp_path / 'out'
  assert _prepare(*_source(tars), f'--output_dir={out}', *arguments) == 2
  said = capsys.readouterr().err
  assert re.search(message, said) and len(said.splitlines()) == 1
  assert not out.exists()


def test_finished_folders_and_files_are_refused(tars, tmp_path, capsys):
  out = tmp_path / 'out'
  arguments = [*_source(tars), '--direct_num_workers=1']
  assert _prepare(*arguments, f'--output_dir={out}') == 0
  before = _files(out)
  assert _prepare(*arguments, f'--output_dir={out}') == 2
  assert re.search("'train'.*--overwrite", capsys.readouterr().err)
  assert _files(out) == before
  assert _prepare(*arguments, f'--output_dir={out}', '--overwrite') == 0
  assert _files(out) == before
  assert _prepare(*arguments, f'--output_dir={out}/info.json') == 2
  assert f'--output_dir={out}/info.json' in capsys.readouterr().err
  assert _files(out) == before


def test_prepared_pictures_are_prepared_again_elsewhere(tars, tmp_path, capsys):
  out = tmp_path / 'out'
  assert _prepare(*_source(tars), f'--output_dir={out}', '--direct_num_workers=1') == 0
  before = _files(out)
  again = [
    '--gin_file=gin_configs/tasks/prepared.gin',
    f"--gin.prepared.path='{out}'",
    "--gin.prepare.columns={'clip': (0.2, None)}",
    '--direct_num_workers=1',
  ]
  assert _prepare(*again, f'--output_dir={out}/../out', '--overwrite') == 2
  assert '--output_dir=' in capsys.readouterr().err
  assert _files(out) == before
  assert _prepare(*again, f'--output_dir={tmp_path}/again') == 0
  assert _report(tmp_path / 'again')['left_out'] == {'column clip too low': 1}


def test_nothing_left_is_an_error(tars, tmp_path, capsys):
  out = tmp_path / 'out'
  assert (
    _prepare(
      *_source(tars), f'--output_dir={out}', '--gin.prepare.min_side=5000', '--direct_num_workers=1'
    )
    == 2
  )
  assert 'report.json' in capsys.readouterr().err
  assert os.listdir(out) == ['report.json']


@pytest.mark.parametrize('workers', [1, 2])
def test_a_worker_that_cannot_write_ends_it_in_one_line(
  tars, tmp_path, capsys, monkeypatch, workers
):
  # A file lies at the path of the folder of unfinished shards.
  out = tmp_path / 'out'
  from parti_jax.preparation import output as output_lib

  claim = output_lib.Output.claim

  def claim_and_block(self, overwrite):
    claim(self, overwrite)
    shutil.rmtree(out / '.train.unfinished')
    (out / '.train.unfinished').touch()

  monkeypatch.setattr(output_lib.Output, 'claim', claim_and_block)
  assert _prepare(*_source(tars), f'--output_dir={out}', f'--direct_num_workers={workers}') == 2
  lines = capsys.readouterr().err.splitlines()
  said = [line for line in lines if not re.search(r'\b0\b.*\b4\b', line)]  # Not the progress.
  assert len(said) == 1 and re.search(r'shard-0000\d\.array_record .*: ', said[0])
  assert 'running' not in said[0]


def test_to_a_store(tars, tmp_path, s3_bucket):
  out, local = f'{s3_bucket}/prepared', tmp_path / 'out'
  for folder in (out, local):
    assert (
      _prepare(*_source(tars), *FILTERS, f'--output_dir={folder}', '--direct_num_workers=1') == 0
    )
  assert list(prepared.PreparedSource(out).examples('train')) == list(
    prepared.PreparedSource(str(local)).examples('train')
  )
  assert prepared.read_info(out) == prepared.read_info(str(local))


@pytest.mark.process
def test_workers_do_not_import_tensorflow():
  code = (
    'import sys; from parti_jax.preparation import pipeline, work, shards; '
    'from parti_jax.data import sources; print("tensorflow" in sys.modules)'
  )
  found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert found.stdout.strip() == 'False'


def test_the_error_of_another_process_is_one_line():
  from parti_jax.preparation import pipeline

  try:
    raise UserError('0.tar: cut off')
  except UserError:
    text = traceback.format_exc()
  assert pipeline._user_error(RuntimeError(f"{text} [while running 'a step']")) == '0.tar: cut off'
  assert pipeline._user_error(RuntimeError('ValueError: x')) == ''
