"""The text vocabulary and the command that trains it."""

import json
import pathlib
import re

import numpy as np
import pytest
import sentencepiece

import parti_jax.cli.main
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import text_tokenizer
from parti_jax.data.vocabulary import TextVocabulary
from parti_jax.data.vocabulary import train_vocabulary

CAPTIONS = [
  f'a {color} {thing} on the {place}'
  for color in ('red', 'green', 'blue')
  for thing in ('dog', 'house', 'boat')
  for place in ('beach', 'hill')
]


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'captions.model'
  return train_vocabulary(CAPTIONS, 60, str(path), 'bpe', 1.0)


def test_round_trip(vocabulary):
  assert vocabulary.size == 60
  for caption in CAPTIONS:
    ids, cut = vocabulary.encode(caption, 40)
    assert ids.dtype == np.int32 and ids.shape == (40,) and not cut
    end = list(ids).index(1)
    assert (ids[:end] > 2).all() and (ids[end + 1 :] == 0).all()
    assert vocabulary.decode(ids) == caption
    assert vocabulary.encode_whole(caption) == list(ids[: end + 1])


def test_a_vocabulary_in_a_store(vocabulary, gs_bucket):
  url = f'{gs_bucket}/captions.model'
  with pytest.raises(UserError, match=f'{url} .*No such file.*parti-jax vocabulary'):
    TextVocabulary(url)
  storage.write(url, pathlib.Path(vocabulary.path).read_bytes())
  assert TextVocabulary(url).fingerprint == vocabulary.fingerprint


def test_empty_text_and_capitals(vocabulary):
  assert vocabulary.encode('', 4)[0].tolist() == [1, 0, 0, 0]
  np.testing.assert_array_equal(
    vocabulary.encode('A Red DOG', 30)[0], vocabulary.encode('a red dog', 30)[0]
  )


def test_the_cut_text_is_returned(vocabulary):
  text = 'a red dog on the beach'
  for length in range(1, len(vocabulary.encode_whole(text))):
    ids, cut = vocabulary.encode(text, length)
    assert ids[-1] == 1 and cut
    assert ' '.join(f'{vocabulary.decode(ids)} {cut}'.split()).replace(' ', '') == (
      text.replace(' ', '')
    )
  assert vocabulary.encode(text, len(vocabulary.encode_whole(text)))[1] == ''


def test_demo_vocabulary_covers_all_captions():
  from parti_jax.data import datasets

  demo = datasets.get_vocabulary()
  lengths = [len(demo.encode_whole(p.caption)) for p in openmoji.pictures()]
  assert max(lengths) <= 32
  for picture in openmoji.pictures()[::50]:
    ids, _ = demo.encode(picture.caption, 32)
    assert demo.decode(ids) == picture.caption.lower()


@pytest.mark.parametrize('model_type', ['unigram', 'bpe'])
def test_the_suggested_largest_size_works(tmp_path, model_type):
  output = str(tmp_path / 'new.model')
  with pytest.raises(UserError, match='--size=5000.* --size=') as error:
    train_vocabulary(CAPTIONS, 5000, output, model_type)
  assert not list(tmp_path.iterdir())
  largest = int(str(error.value).rsplit('=', 1)[1])
  assert train_vocabulary(CAPTIONS, largest, output, model_type).size == largest


def test_size_below_the_number_of_characters(tmp_path):
  with pytest.raises(UserError, match='--size=5 .*\\b19\\b.*--character_coverage'):
    train_vocabulary(CAPTIONS, 5, str(tmp_path / 'new.model'))
  assert not list(tmp_path.iterdir())


def test_unusable_files(tmp_path):
  with pytest.raises(UserError, match='parti-jax vocabulary'):
    TextVocabulary(str(tmp_path / 'none.model'))
  (tmp_path / 'text.model').write_text('no model')
  with pytest.raises(UserError, match='text.model .*SentencePiece'):
    TextVocabulary(str(tmp_path / 'text.model'))
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS),
    model_prefix=str(tmp_path / 'other'),
    vocab_size=60,
    model_type='bpe',
    minloglevel=2,
  )
  with pytest.raises(UserError, match=r'\(pad, eos\) = \(-1, 2\)'):
    TextVocabulary(str(tmp_path / 'other.model'))


def _gemmas_kind(tmp_path):
  """A SentencePiece model with Gemma's special ids, bytes for unknown characters, and capitals."""
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a cat', 'a dog', 'A Cat', 'the dog']),
    model_prefix=str(tmp_path / 'gemma'),
    model_type='bpe',
    vocab_size=290,
    hard_vocab_limit=False,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    byte_fallback=True,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    minloglevel=2,
  )
  return str(tmp_path / 'gemma.model')


def test_a_sentencepiece_model_of_gemmas_kind(tmp_path):
  path = _gemmas_kind(tmp_path)
  lower, plain = (text_tokenizer.open_tokenizer(path, flag) for flag in (True, False))
  processor = sentencepiece.SentencePieceProcessor(model_file=path)
  text = 'A Cat, ΣΊΣ  日本!'
  for tokenizer, expected in ((lower, 'a cat, σίσ  日本!'), (plain, text)):
    ids, cut = tokenizer.encode(text, 64)
    expected = [*processor.encode(expected), 1]
    assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any() and not cut
    assert ids[:-1].tolist().count(2) == 0  # No beginning.
  assert lower.encode(text, 64)[0].tolist() != plain.encode(text, 64)[0].tolist()
  # Bytes come back as characters.
  length = len(processor.encode('a dog ')) + 1
  assert lower.encode('a dog 日本', length)[1] == '日本'


def test_command_on_a_folder(tmp_path, capsys):
  (tmp_path / 'p.png').write_bytes(b'')
  rows = [json.dumps({'file': 'p.png', 'caption': caption}) for caption in [*CAPTIONS, '']]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(rows))
  output = tmp_path / 'made' / 'captions.model'
  arguments = [
    'vocabulary',
    '--gin_file=gin_configs/tasks/folder.gin',
    f"--gin.folder.path='{tmp_path}'",
    '--size=60',
    '--model_type=bpe',
    f'--output={output}',
  ]
  assert parti_jax.cli.main.main(arguments) == 0
  printed = capsys.readouterr().out
  assert '60' in printed and '18' in printed
  assert [path.name for path in output.parent.iterdir()] == ['captions.model']
  assert TextVocabulary(str(output)).size == 60

  assert parti_jax.cli.main.main([*arguments, '--split=test']) == 2
  assert re.search("folder .*'test'.* train", capsys.readouterr().err)


def test_the_captions_of_a_mixture_are_those_of_all_its_sources(tmp_path, capsys):
  for name, words in (('a', 'red dog'), ('b', 'blue whale')):
    (tmp_path / name).mkdir()
    rows = [{'file': '1.png', 'caption': f'{words} {number}'} for number in range(20)]
    lines = '\n'.join(map(json.dumps, rows))
    (tmp_path / name / 'captions.jsonl').write_text(lines)
    (tmp_path / name / '1.png').write_bytes(b'')
  command = [
    'vocabulary',
    *(f"--gin.folder_{name}/folder.path='{tmp_path / name}'" for name in 'ab'),
    "--gin.mixture.sources={'folder_a': 1, 'folder_b': 9}",
    '--size=100',
    '--at_most',
    '--model_type=bpe',
    '--character_coverage=1',
    f'--output={tmp_path / "v.model"}',
  ]
  assert parti_jax.cli.main.main([*command, '--task=mixture_texts']) == 0
  assert '40 captions' in capsys.readouterr().out
  vocabulary = TextVocabulary(str(tmp_path / 'v.model'))
  for text in ('red dog 3', 'blue whale 17'):
    assert vocabulary.unknown_id not in vocabulary.encode_whole(text)
  # One source alone, of a mixture's or of another task.
  assert parti_jax.cli.main.main([*command, '--task=folder_b_texts']) == 0
  assert '20 captions' in capsys.readouterr().out
  assert parti_jax.cli.main.main([*command, '--task=mixture_tokens']) == 2
  assert 'mixture.sources: folder_a has no tokens' in capsys.readouterr().err
  assert parti_jax.cli.main.main([*command, '--task=mixture_texts', '--split=validation']) == 2
  assert "no split 'validation'" in capsys.readouterr().err
