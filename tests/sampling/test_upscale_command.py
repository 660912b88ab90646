"""`parti-jax upscale` enlarges files once, and leaves what is not its own alone."""

import numpy as np
import pytest
from PIL import Image
from PIL import PngImagePlugin

from parti_jax.cli import main
from parti_jax.exported_model import model_folder
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement
from parti_jax.sampling import upscaling


@pytest.fixture(scope='module')
def folder(enlarger, tmp_path_factory):
  path = tmp_path_factory.mktemp('upscaler') / 'network'
  return model_folder.save_part(path, 'super_resolution', enlarger, {}, dtype='float32')


def _pixels(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
  """A picture of this package, a gray one, and one that is only just large enough."""
  images_lib.save(tmp_path, 'drawn', Image.fromarray(_pixels(5, 8)), {'prompt': 'ein Bär'})
  Image.fromarray(_pixels(4, 7)[..., 0]).save(tmp_path / 'grey.png')
  Image.fromarray(_pixels(2, 3)).save(tmp_path / 'small.webp', lossless=True)
  return [tmp_path / name for name in ('drawn.png', 'grey.png', 'small.webp')]


def _run(files, target, folder):
  return main.main(['upscale', *map(str, files), f'--output_dir={target}', f'--upscaler={folder}'])


def test_files_are_enlarged_and_keep_their_metadata(files, folder, enlarger, tmp_path, capsys):
  target = tmp_path / 'large'
  assert _run(files, target, folder) == 0
  names = ['drawn_x2.png', 'grey_x2.png', 'small_x2.png']
  assert sorted(path.name for path in target.iterdir()) == names
  assert capsys.readouterr().out.splitlines() == [str(target / name) for name in names]
  upscaler = upscaling.Upscaler(enlarger.config, enlarger.params, placement.Placement())
  grey = np.repeat(_pixels(4, 7)[..., :1], 3, axis=-1)
  for name, picture in zip(names, (_pixels(5, 8), grey, _pixels(2, 3))):
    found = np.asarray(Image.open(target / name))
    np.testing.assert_array_equal(found, upscaler(picture[None])[0])
  metadata = images_lib.read_metadata(target / names[0])
  assert metadata['prompt'] == 'ein Bär' and metadata['picture'] == 'drawn.png'
  assert metadata['upscaled'] == '2' and metadata['software'] == images_lib.SOFTWARE


def test_what_is_there_is_not_enlarged_again(files, folder, tmp_path, capsys, monkeypatch):
  chunks = PngImagePlugin.PngInfo()
  chunks.add_text('software', 'another program')  # It is not that of the result.
  Image.fromarray(_pixels(4, 4)).save(files[1], pnginfo=chunks)
  target = tmp_path / 'large'
  enlarge, calls = upscaling.Upscaler.__call__, []

  def interrupted(self, images):
    if calls:
      raise KeyboardInterrupt
    calls.append(images.shape)
    return enlarge(self, images)

  with monkeypatch.context() as patched:
    patched.setattr(upscaling.Upscaler, '__call__', interrupted)
    assert _run(files, target, folder) == 130
  assert [path.name for path in target.iterdir()] == ['drawn_x2.png']
  first = (target / 'drawn_x2.png').stat().st_mtime_ns
  capsys.readouterr()
  assert _run(files, target, folder) == 0
  assert capsys.readouterr().out.startswith(f'1 of 3 pictures are in {target} already\n')
  assert (target / 'drawn_x2.png').stat().st_mtime_ns == first
  monkeypatch.setattr(upscaling.Upscaler, '__call__', None)
  assert _run(files, target, folder) == 0
  assert capsys.readouterr().out == f'3 of 3 pictures are in {target} already\n'


@pytest.mark.parametrize('change', ['picture', 'network', 'cut', 'foreign'])
def test_other_files_are_not_replaced(files, folder, enlarger, tmp_path, capsys, change):
  target = tmp_path / 'large'
  assert _run(files[:1], target, folder) == 0
  path = target / 'drawn_x2.png'
  if change == 'picture':
    Image.fromarray(_pixels(5, 8, seed=1)).save(files[0])
  elif change == 'network':
    other = enlarger._replace(params=_doubled(enlarger.params))
    folder = model_folder.save_part(tmp_path / 'other', 'super_resolution', other, {})
  elif change == 'cut':
    path.write_bytes(path.read_bytes()[:-60])
  else:
    path.write_bytes(b'mine')
  before = path.read_bytes()
  assert _run(files[::-1], target, folder) == 2
  assert f'{path} exists, and is not {files[0]} enlarged' in capsys.readouterr().err
  assert path.read_bytes() == before and len(list(target.iterdir())) == 1


def _doubled(tree):
  return {
    name: _doubled(leaf) if isinstance(leaf, dict) else 2 * leaf for name, leaf in tree.items()
  }


def test_all_files_are_checked_before_the_first_is_enlarged(
  files, folder, tiny_folder, tmp_path, capsys
):
  (tmp_path / 'text.png').write_bytes(b'no picture')
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'Drawn.webp').write_bytes(files[2].read_bytes())
  Image.new('RGB', (6000, 6000)).save(tmp_path / 'large.png')
  for wrong, message in {
    'text.png': 'text.png: unknown picture format; give PNG',
    'nowhere.png': 'nowhere.png: cannot read it (No such file',
    'a': 'a is a folder; give picture files',
    'a/Drawn.webp': 'would both be written as Drawn; enlarge them into two folders',
    'large.png': '12,000×12,000 pixels would be more than the 134,217,728',
  }.items():
    assert _run([*files, tmp_path / wrong], tmp_path / 'target', folder) == 2
    assert message in capsys.readouterr().err
  assert _run(files, tmp_path / 'target', tiny_folder) == 2
  assert 'has no super-resolution network' in capsys.readouterr().err
  assert not (tmp_path / 'target').exists()
