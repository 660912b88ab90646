"""Text files of various programs: line ends, byte order marks and encodings."""

import gzip
import json

import gin
import pytest

from parti_jax.cli import generate
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import sources
from parti_jax.data.readers import folder_index
from parti_jax.data.readers import tar_shards
from parti_jax.data.readers import text_files
from parti_jax.data.readers import text_lines
from parti_jax.evaluation.datasets import prompts_file

# Characters at which `str.splitlines` splits, but files of lines don't.
WITHIN = '\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e'
ENCODINGS = ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32')
PROMPTS = ['red apple', f'waving{WITHIN}hand of a woman firefighter', 'ein Bär \U0001f43b']


@pytest.mark.parametrize(
  'text, lines',
  [
    ('a\nb\n', ['a', 'b']),
    ('a\r\nb\r\n', ['a', 'b']),
    ('a\r\nb', ['a', 'b']),
    ('', ['']),
    ('a\n\nb', ['a', '', 'b']),
    ('a\rb\r', ['a', 'b']),
    ('a\rb\nc\n', ['a\rb', 'c']),
    (f'a{WITHIN}b\nc', [f'a{WITHIN}b', 'c']),
  ],
)
def test_lines_end_only_at_newlines(text, lines):
  assert text_files.lines(text) == lines


@pytest.mark.parametrize('newline', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_files_of_prompts(tmp_path, encoding, newline):
  path = tmp_path / 'prompts.txt'
  path.write_bytes(newline.join([*PROMPTS, '', ' ']).encode(encoding))
  assert generate.read_prompts(str(path)) == PROMPTS
  table = ['\t'.join(prompts_file.COLUMNS), '']
  table += [f'{prompt}\tPeople\tBasic\t' for prompt in PROMPTS]
  path.write_bytes(newline.join(table).encode(encoding))
  prompts = prompts_file.read(str(path))
  assert [(prompt.text, prompt.category, prompt.challenge, prompt.note) for prompt in prompts] == [
    (prompt, 'People', 'Basic', '') for prompt in PROMPTS
  ]


@pytest.mark.parametrize('read', [generate.read_prompts, prompts_file.read])
@pytest.mark.parametrize(
  'content, message',
  [
    (b'caf\xe9', 'UTF-8.*UTF-8'),
    (b'\xff\xfea', 'UTF-16.*UTF-8'),
    (None, 'No such file'),
    (b'', 'prompts.txt'),
  ],
)
def test_files_that_are_not_text(tmp_path, read, content, message):
  path = tmp_path / 'prompts.txt'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read(str(path))
  assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('newline', ['\n', '\r\n'])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_captions_files(tmp_path, encoding, newline):
  lines = [
    json.dumps({'file': f'{i}.png', 'caption': prompt}, ensure_ascii=False)
    for i, prompt in enumerate(PROMPTS)
  ]
  (tmp_path / 'captions.jsonl').write_bytes(newline.join(lines).encode(encoding))
  files, texts = folder_index.read(str(tmp_path), 'captions.jsonl', 'file', 'caption', False)
  assert [text.decode() for text in texts] == PROMPTS
  assert [storage.name(file.decode()) for file in files] == ['0.png', '1.png', '2.png']


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('newline', ['\n', '\r\n'])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_the_text_source(tmp_path, encoding, newline, packed):
  data = newline.join(PROMPTS).encode(encoding)
  (tmp_path / 'a.txt').write_bytes(gzip.compress(data) if packed else data)
  gin.parse_config(f"text.path = '{tmp_path}'")
  # Control characters become spaces in a caption.
  expected = [
    ''.join(' ' if c in '\x85\x0b\x0c\x1c\x1d\x1e' else c for c in prompt) for prompt in PROMPTS
  ]
  assert list(sources.configured('text').captions('train')) == expected


def test_long_lines_in_utf_16_are_bounded(tmp_path):
  (tmp_path / 'a.txt').write_bytes(('x' * 200_000 + '\na dog').encode('utf-16'))
  assert [len(line['caption']) for line in text_lines.lines(str(tmp_path / 'a.txt'))] == [
    2**16 + 1,
    5,
  ]


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_members_of_tars(tmp_path, write_tar, encoding):
  row = json.dumps({'caption': 'ein Bär'}, ensure_ascii=False)
  path = write_tar(
    tmp_path / '0.tar',
    [
      ('0.jpg', b'0'),
      ('0.txt', 'ein Bär'.encode(encoding)),
      ('1.jpg', b'1'),
      ('1.json', row.encode(encoding)),
    ],
  )
  gin.parse_config(f"webdataset.path = '{tmp_path}'")
  assert len(list(tar_shards.samples(str(path), None))) == 2
  assert list(sources.configured('webdataset').captions('train')) == ['ein Bär'] * 2


def test_gin_files_with_a_byte_order_mark(tmp_path):
  included = tmp_path / 'included.gin'
  included.write_bytes(b"\xef\xbb\xbfimport parti_jax.data.datasets\ntext.path = 'here'\n")
  path = tmp_path / 'a.gin'
  path.write_bytes(f"\ufeffinclude '{included}'\n".encode())
  gin_config.parse([str(path)], [])
  assert gin.query_parameter('text.path') == 'here'
