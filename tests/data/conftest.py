"""Pictures and sources for the tests of data."""

import io
import json
import pathlib
import sys
import tarfile

import gin
import pytest
from PIL import Image

# For make_openmoji_list and tfrecord_files: pytest's importlib mode doesn't add folders to the path.
sys.path.append(str(pathlib.Path(__file__).parent))


def encoded(color, size=(8, 8), image_format='png', **kwargs) -> bytes:
  """Returns an encoded picture of one color."""
  data = io.BytesIO()
  mode = 'RGBA' if len(color) == 4 else 'RGB'
  Image.new(mode, size, color).save(data, image_format, **kwargs)
  return data.getvalue()


@pytest.fixture
def encode():
  """The function `encoded`."""
  return encoded


def tarred(files, mode='w', tar_format=tarfile.GNU_FORMAT) -> bytes:
  """Returns a tar of files, given as pairs of name and content."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode=mode, format=tar_format) as shard:
    for name, content in files:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      shard.addfile(member, io.BytesIO(content))
  return data.getvalue()


@pytest.fixture
def write_tar():
  """Writes a tar of files to a path and returns the path."""

  def write(path, files):
    path.write_bytes(tarred(files))
    return path

  return write


@pytest.fixture
def folder(tmp_path):
  """Writes a folder with encoded pictures and captions.jsonl."""

  def write(examples, captions_file='captions.jsonl'):
    lines = []
    for index, (caption, picture) in enumerate(examples):
      name = f'{index:03d}.img'
      (tmp_path / name).write_bytes(picture)
      lines.append(json.dumps({'file': name, 'caption': caption}))
    (tmp_path / captions_file).write_text('\n'.join(lines) + '\n')
    gin.parse_config(f"folder.path = '{tmp_path}'")
    return tmp_path

  from parti_jax.data import datasets  # noqa: F401

  return write


@pytest.fixture
def numbered(folder):
  """Writes a folder of pictures whose red channel is their number."""

  def write(count):
    examples = [(f'woman firefighter {i}', encoded((i, 100, 200))) for i in range(count)]
    return folder(examples)

  return write
