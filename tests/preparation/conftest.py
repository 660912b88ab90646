"""Pictures, and a source of tars, for the tests of preparation."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


def draw(seed: int, size=(64, 48)) -> Image.Image:
  """Returns a picture of soft random patches, different for each seed."""
  patches = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
  return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format='png', **options) -> bytes:
  """Returns an encoded picture."""
  data = io.BytesIO()
  image.save(data, image_format, **options)
  return data.getvalue()


@pytest.fixture(name='draw')
def draw_fixture():
  """The function `draw`."""
  return draw


@pytest.fixture(name='encode')
def encode_fixture():
  """The function `encode`."""
  return encode


@pytest.fixture
def write_tar(tmp_path):
  """Writes samples (key, caption, picture, columns) to a tar in `tmp_path/tars`."""

  def write(name, samples):
    folder = tmp_path / 'tars'
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, 'w') as tar:
      for key, caption, picture, columns in samples:
        for ending, content in (
          ('jpg', picture),
          ('txt', caption.encode()),
          ('json', json.dumps(columns).encode()),
        ):
          member = tarfile.TarInfo(f'{key}.{ending}')
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
    return folder

  return write
