"""Token ids against transformers, open_clip and min-dalle: byte pairs, and SigLIP 2's pieces."""

import gzip
import json
import random

import numpy as np
import pytest

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')
open_clip = pytest.importorskip('open_clip')

from parti_jax.data import json_tokenizer  # noqa: E402
from parti_jax.importers import tokenizer_files  # noqa: E402

_SCRIPTS = [
  (0x20, 0x7E),
  (0xA0, 0x17F),
  (0x370, 0x3FF),
  (0x400, 0x4FF),
  (0x5D0, 0x5EA),
  (0x600, 0x6FF),
  (0x900, 0x97F),
  (0x3040, 0x30FF),
  (0x4E00, 0x4FFF),
  (0x1F300, 0x1F6FF),
]
_WORDS = (
  "a photo of the CAT, dog's house; we'll don't I'VE they're 1234 3.14 co-operate e\u0301 \ufb01sh "
  'Straße İstanbul ΣΊΣΥΦΟΣ hello!!! !? --- ... (brackets) #tag @user 100% $5 a/b \u00a0 \t\n the'
).split(' ')


def _strings():
  draw = random.Random(0)
  yield from ['', ' ', '!', '<|endoftext|> <|startoftext|> x', '<|ENDOFTEXT|>', '  two   spaces  ']
  for number in range(200):
    if number % 2:
      yield ' '.join(draw.choices(_WORDS, k=draw.randint(1, 60)))
    else:
      scripts = draw.choices(_SCRIPTS, k=draw.randint(1, 40))
      yield ''.join(chr(draw.randint(*script)) for script in scripts for _ in range(2))


@pytest.fixture(scope='module', name='clip_folder')
def fixture_clip_folder(tmp_path_factory):
  """CLIP's vocabulary as Hugging Face publishes it, made of the file that open_clip brings."""
  lines = gzip.open(open_clip.tokenizer.default_bpe()).read().decode().split('\n')
  merges = lines[1 : 49152 - 256 - 2 + 1]
  single = list(open_clip.tokenizer.bytes_to_unicode().values())
  tokens = single + [f'{token}</w>' for token in single]
  tokens += [''.join(merge.split()) for merge in merges] + ['<|startoftext|>', '<|endoftext|>']
  folder = tmp_path_factory.mktemp('clip')
  vocabulary = {token: number for number, token in enumerate(tokens)}
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']))
  return folder


def _opened(path, content):
  path.write_bytes(content)
  return json_tokenizer.JsonTokenizer(path)


@pytest.mark.parametrize('form', ['vocab.json', 'tokenizer.json'])
def test_clip(tmp_path, clip_folder, form):
  theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
  folder = clip_folder
  if form == 'tokenizer.json':
    theirs.save_pretrained(tmp_path / 'saved')
    folder = tmp_path / 'saved'
    assert not (folder / 'vocab.json').exists()
  ours = _opened(tmp_path / 'made.json', tokenizer_files.of_clip(str(folder)))
  assert ours.size == 49408
  cut = 0
  for text in _strings():
    ids, rest = ours.encode(text, 77)
    expected = theirs(text, truncation=True, max_length=77)['input_ids']
    assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()
    whole = theirs(text)['input_ids']
    assert bool(rest) == (len(whole) > 77), text
    if rest:
      cut += 1
      assert text.rstrip().endswith(rest)
  assert cut > 10


def test_clip_of_open_clip(tmp_path, clip_folder):
  """The original's padding is ours. Its clean-up of HTML and of garbled text is left out."""
  ours = _opened(tmp_path / 'made.json', tokenizer_files.of_clip(str(clip_folder)))
  for text in ['a photo of a cat', "Don't!! stop 123 ...", 'naïve café 日本語', 'the ' * 99, '']:
    theirs = open_clip.tokenize([text])[0].numpy()
    np.testing.assert_array_equal(ours.encode(text, 77)[0], theirs)


def test_siglip_2(tmp_path):
  """A small tokenizer of Gemma's kind: no word marker before the text, bytes for the unknown."""
  model = tokenizers.models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True)
  trained = tokenizers.Tokenizer(model)
  trained.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  trained.pre_tokenizer = tokenizers.pre_tokenizers.Split(' ', 'merged_with_previous')
  special = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>']
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=special + [f'<0x{byte:02X}>' for byte in range(256)],
    show_progress=False,
  )
  trained.train_from_iterator([' '.join(_WORDS).lower()] * 3, trainer)
  trained.post_processor = tokenizers.processors.TemplateProcessing(
    single='$A <eos>', special_tokens=[('<eos>', 1)]
  )
  trained.enable_padding(direction='right', pad_id=0, pad_token='<pad>', length=64)
  folder = tmp_path / 'published'
  folder.mkdir()
  trained.save(str(folder / 'tokenizer.json'))
  settings = {'tokenizer_class': 'Siglip2Tokenizer', 'model_max_length': 64}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings | {'padding_side': 'right'}))
  theirs = transformers.Siglip2Tokenizer.from_pretrained(folder)
  ours = _opened(tmp_path / 'made.json', tokenizer_files.of_siglip_2(str(folder)))
  cut = 0
  for text in _strings():
    ids, rest = ours.encode(text, 64)
    expected = theirs(text, padding='max_length', truncation=True, max_length=64)['input_ids']
    assert ids.tolist() == expected, text
    assert 1 in ids
    cut += bool(rest)
  assert cut > 10
  # A file that transformers has saved has the steps already.
  theirs.save_pretrained(tmp_path / 'saved')
  again = _opened(tmp_path / 'again.json', tokenizer_files.of_siglip_2(str(tmp_path / 'saved')))
  for text in _strings():
    np.testing.assert_array_equal(again.encode(text, 64)[0], ours.encode(text, 64)[0])


@pytest.fixture(scope='module', name='bart_folder')
def fixture_bart_folder(tmp_path_factory):
  """Byte pairs of BART's kind, trained on a few words."""
  trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=700,
    special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  words = ' '.join([*_WORDS, 'smiling face with cat eyes_red heart']).lower()
  trained.train_from_iterator([words] * 3, trainer)
  folder = tmp_path_factory.mktemp('bart')
  trained.model.save(str(folder))
  return folder


def test_dalle_mini_of_min_dalle(tmp_path, bart_folder):
  min_dalle = pytest.importorskip('min_dalle.text_tokenizer')
  vocabulary = json.loads((bart_folder / 'vocab.json').read_text())
  merges = (bart_folder / 'merges.txt').read_text().split('\n')[1:-1]
  theirs = min_dalle.TextTokenizer(vocabulary, merges)
  content = tokenizer_files.of_dalle_mini(str(bart_folder), 'min_dalle')
  ours = _opened(tmp_path / 'made.json', content)
  assert ours.size == len(vocabulary) > 350
  unknown = cut = 0
  for text in [*_strings(), 'a <s>cat</s> and\ta dog', 'I ❤️ 😺', '  Two  spaces ', 'Ġ ġ']:
    expected = theirs.tokenize(text)
    ids, rest = ours.encode(text, max(len(expected), 2))
    assert ids.tolist() == expected, text
    assert not rest
    unknown += vocabulary['<unk>'] in expected
    # Unlike min-dalle, we keep the end of a text that is cut.
    short, rest = ours.encode(text, 16)
    if len(expected) > 16:
      cut += 1
      assert rest
      assert short.tolist() == [*expected[:15], 2]
  assert unknown > 3
  assert cut > 50


def test_dalle_mini_of_transformers(tmp_path, bart_folder):
  """The byte pairs that dalle-mini uses, on texts as its own normalizer leaves them."""
  theirs = transformers.BartTokenizer.from_pretrained(bart_folder)
  content = json.loads(tokenizer_files.of_dalle_mini(str(bart_folder), 'dalle_mini'))
  del content[json_tokenizer.NORMALIZER]  # Its packages may be missing.
  ours = _opened(tmp_path / 'made.json', json.dumps(content).encode())
  cut = 0
  for text in _strings():
    text = f' {text.encode("ascii", "ignore").decode().lower()}'
    ids, rest = ours.encode(text, 64)
    expected = theirs(text, truncation=True, max_length=64)['input_ids']
    assert ids[: len(expected)].tolist() == expected and not ids[len(expected) :].any()
    cut += bool(rest)
  assert cut > 10
