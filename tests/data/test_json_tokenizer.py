"""Tokenizers of a tokenizer.json, what makes them of published files, and which reader opens what."""

import json
import pathlib

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import json_tokenizer
from parti_jax.data import text_tokenizer
from parti_jax.data import vocabulary
from parti_jax.importers import tokenizer_files

tokenizers = pytest.importorskip('tokenizers')

START, END = '<|startoftext|>', '<|endoftext|>'
MERGES = ['c a', 'ca t</w>', 'd o', 'do g</w>', '! !</w>']


@pytest.fixture(name='folder')
def fixture_folder(tmp_path):
  """The files of a small tokenizer of CLIP's kind."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  # As in CLIP's, the exclamation mark is id 0.
  letters.remove('!')
  letters.insert(0, '!')
  tokens = letters + [f'{letter}</w>' for letter in letters]
  tokens += [merge.replace(' ', '') for merge in MERGES] + [START, END]
  folder = tmp_path / 'clip'
  folder.mkdir()
  (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *MERGES]) + '\n')
  return folder


@pytest.fixture(name='tokenizer')
def fixture_tokenizer(tmp_path, folder):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(tokenizer_files.of_clip(str(folder)))
  return json_tokenizer.JsonTokenizer(path)


def _ids(folder, *tokens):
  known = json.loads((folder / 'vocab.json').read_text())
  return [known[token] for token in tokens]


def test_a_text_between_its_special_ids(tokenizer, folder):
  ids, cut = tokenizer.encode('A  CAT,\ndog', 9)
  assert ids.dtype == np.int32 and not cut
  assert ids.tolist() == [
    *_ids(folder, START, 'a</w>', 'cat</w>', ',</w>', 'dog</w>', END),
    0,
    0,
    0,
  ]
  assert tokenizer.encode('', 3)[0].tolist() == [*_ids(folder, START, END), 0]
  assert tokenizer.size == len(json.loads((folder / 'vocab.json').read_text()))


def test_what_does_not_fit_is_returned(tokenizer, folder):
  text = 'Cat dog ÉÉ cat'
  whole = tokenizer.encode(text, 20)[0].tolist()
  count = whole.index(_ids(folder, END)[0]) + 1
  assert tokenizer.encode(text, count)[1] == ''
  for length in range(2, count):
    ids, cut = tokenizer.encode(text, length)
    assert ids.tolist() == [*whole[: length - 1], *_ids(folder, END)]
    assert cut and text.endswith(cut)
  assert tokenizer.encode(text, 4)[1] == 'ÉÉ cat'
  assert tokenizer.encode(text, 2)[1] == text


def test_no_place_for_the_special_ids(tokenizer):
  with pytest.raises(UserError, match='1 text tokens leave no place for the 2 special ones'):
    tokenizer.encode('cat', 1)


def test_half_a_character(tokenizer):
  with pytest.raises(UserError, match='not UTF-8: character 5'):
    tokenizer.encode('cat \udce9', 9)


def test_settings_in_the_file_do_not_count(tmp_path, tokenizer):
  content = json.loads(pathlib.Path(tokenizer.path).read_text())
  content['truncation'] = {
    'direction': 'Left',
    'max_length': 3,
    'strategy': 'LongestFirst',
    'stride': 0,
  }
  content['padding'] = {
    'strategy': {'Fixed': 7},
    'direction': 'Left',
    'pad_to_multiple_of': None,
    'pad_id': 5,
    'pad_type_id': 0,
    'pad_token': '&',
  }
  path = tmp_path / 'other.json'
  path.write_text(json.dumps(content))
  other = json_tokenizer.JsonTokenizer(path)
  for length in (4, 9):
    ids, cut = tokenizer.encode('cat dog cat', length)
    again = other.encode('cat dog cat', length)
    np.testing.assert_array_equal(again[0], ids)
    assert again[1] == cut
  assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
  'content', [b'', b'{}', b'[1]', b'{"model": {"type": "BPE"}}', b'\xff\x00']
)
def test_other_files_are_refused(tmp_path, content):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(content)
  with pytest.raises(UserError, match='is not a tokenizer.json'):
    json_tokenizer.JsonTokenizer(path)
  with pytest.raises(UserError, match='none.json cannot be read'):
    json_tokenizer.JsonTokenizer(tmp_path / 'none.json')


def test_the_kind_is_told_by_the_content(tmp_path, tokenizer):
  found = text_tokenizer.open_tokenizer(tokenizer.path)
  assert isinstance(found, json_tokenizer.JsonTokenizer)
  assert found.fingerprint == tokenizer.fingerprint
  made = vocabulary.train_vocabulary(['a cat', 'a dog'], 12, str(tmp_path / 'v.model'), 'bpe')
  found = text_tokenizer.open_tokenizer(made.path)
  assert isinstance(found, vocabulary.TextVocabulary)
  assert found.fingerprint == made.fingerprint


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('vocab.json', '{"a": 0}', 'has no <|startoftext|> and <|endoftext|>'),
    ('vocab.json', '[1]', 'vocab.json is not a JSON object'),
    ('vocab.json', '{', 'vocab.json is not JSON'),
    ('vocab.json', None, 'has neither vocab.json and merges.txt, nor tokenizer.json'),
    (
      'vocab.json',
      '{"a": 0, "b": 0, "<|startoftext|>": 8, "<|endoftext|>": 9}',
      "vocab.json: 'a' and 'b' have the same id, 0",
    ),
    (
      'vocab.json',
      '{"a": -1, "<|startoftext|>": 8, "<|endoftext|>": 9}',
      "vocab.json: the id of 'a'=-1 must be a whole number",
    ),
    (
      'vocab.json',
      '{"a": "0", "<|startoftext|>": 8, "<|endoftext|>": 9}',
      "vocab.json: the id of 'a'='0' must be a whole number",
    ),
    ('merges.txt', 'c a\nca t</w> x', "merges.txt: the merge .'ca', 't</w>', 'x'. is not two tok"),
    ('merges.txt', 'c o', "merges.txt: the merge 'c o' needs the token 'co', which .*vocab.json"),
    ('merges.txt', '', 'merges.txt: its merges make 0 of the 5 longer tokens in the vocab'),
    ('merges.txt', 'c a\nca t</w>\nd o', 'its merges make 3 of the 5 longer tokens'),
  ],
)
def test_damaged_files_of_clip(folder, name, content, message):
  if content is None:
    (folder / name).unlink()
  else:
    (folder / name).write_text(content)
  with pytest.raises(UserError, match=message.replace('|', r'\|')):
    tokenizer_files.of_clip(str(folder))


def test_files_of_other_systems_give_the_same_tokenizer(folder):
  wanted = tokenizer_files.of_clip(str(folder))
  for name in ('vocab.json', 'merges.txt'):
    content = (folder / name).read_text().replace('\n', '\r\n')
    (folder / name).write_bytes(b'\xef\xbb\xbf' + content.encode())
  assert tokenizer_files.of_clip(str(folder)) == wanted


def test_a_published_tokenizer_json_of_clip(folder, tokenizer):
  """Its settings are replaced by those of transformers, and its tokens are kept."""
  content = json.loads(pathlib.Path(tokenizer.path).read_text())
  content['normalizer'] = None
  content['model']['merges'] = [' '.join(merge) for merge in content['model']['merges']]
  (folder / 'vocab.json').unlink()
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  path = folder / 'made.json'
  path.write_bytes(tokenizer_files.of_clip(str(folder)))
  made = json_tokenizer.JsonTokenizer(path)
  for text in ('Cat DOG!!', 'x'):
    np.testing.assert_array_equal(made.encode(text, 9)[0], tokenizer.encode(text, 9)[0])


def test_siglip_2s_files(tmp_path):
  with pytest.raises(UserError, match=r'ids of <pad> and <eos> are not 0 and 1'):
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps({'model': {'vocab': {'<pad>': 1, '<eos>': 0}}}))
    tokenizer_files.of_siglip_2(str(tmp_path))
  with pytest.raises(UserError, match="'model' is not an object"):
    path.write_text('{}')
    tokenizer_files.of_siglip_2(str(path))
