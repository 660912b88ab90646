"""Makes one tokenizer.json of the published files of CLIP's, SigLIP 2's and BART's tokenizers.

`parti_jax.data.json_tokenizer.JsonTokenizer` reads it. It contains the whole tokenizer, including
lower-casing and the ids at both ends of a text, some of which the published files leave to the code
that reads them.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import json_tokenizer
from parti_jax.data import text_tokenizer

_CLIP_START = '<|startoftext|>'
_CLIP_END = '<|endoftext|>'
# CLIP's words: its special tokens, endings, letters, one digit, and anything else.
_CLIP_WORDS = (
  r'<\|startoftext\|>|<\|endoftext\|>'
  r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# The special tokens of BART and their ids; 0 and 2 are around a text.
_BART_SPECIAL = {'<s>': 0, '<pad>': 1, '</s>': 2, '<unk>': 3}
# Tokens of byte pairs that merges need not make: letters, special tokens, and the places that BART's
# vocabulary fills up.
_NOT_MERGED = re.compile(r'.(</w>)?|<.*>|madeupword\d+', re.DOTALL)
# Share of the other tokens that merges may leave out.
_MOST_UNMADE = 0.01


def of_clip(given: str) -> bytes:
  """Returns the tokenizer.json of CLIP's byte pairs, with the behavior of transformers.

  Unlike OpenAI's own code and open_clip, it doesn't repair garbled text or unescape HTML.

  Args:
    given: a tokenizer.json, or a folder with it or with `vocab.json` and `merges.txt`.

  Raises:
    UserError: if files are missing or damaged, or are not CLIP's.
  """
  vocabulary, merges, where = _byte_pairs(given)
  ends = [vocabulary.get(token) for token in (_CLIP_START, _CLIP_END)]
  if not all(type(end) is int for end in ends):
    raise UserError(f"{where} isn't CLIP's vocabulary: it has no {_CLIP_START} and {_CLIP_END}")
  _check_byte_pairs(vocabulary, merges, where)
  normalizers: list[dict[str, Any]] = [
    {'type': 'NFC'},
    {'type': 'Replace', 'pattern': {'Regex': r'\s+'}, 'content': ' '},
    {'type': 'Lowercase'},
  ]
  pretokenizers: list[dict[str, Any]] = [
    {'type': 'Split', 'pattern': {'Regex': _CLIP_WORDS}, 'behavior': 'Removed', 'invert': True},
    _byte_level(trim_offsets=True),
  ]
  return _dumps(
    _byte_pair_tokenizer(
      vocabulary,
      merges,
      special=(_CLIP_START, _CLIP_END),
      normalizers=normalizers,
      pre_tokenizer={'type': 'Sequence', 'pretokenizers': pretokenizers},
      ends=(_CLIP_START, _CLIP_END),
      unknown=_CLIP_END,
      suffix='</w>',
    )
  )


def of_dalle_mini(given: str, normalizer: str) -> bytes:
  """Returns the tokenizer.json of DALL·E mini's byte pairs, which are those of BART.

  Args:
    given: a tokenizer.json, or a folder with it or with `vocab.json` and `merges.txt`.
    normalizer: a name in `dalle_mini_texts.NORMALIZERS`. min-dalle's byte pairs also see other words:
      whatever spaces separate, with its punctuation.

  Raises:
    UserError: if files are missing or damaged, or are not of BART.
  """
  vocabulary, merges, where = _byte_pairs(given)
  if {token: vocabulary.get(token) for token in _BART_SPECIAL} != _BART_SPECIAL:
    raise UserError(
      f"{where} isn't DALL·E mini's vocabulary: the ids of {', '.join(_BART_SPECIAL)} are not "
      f'{", ".join(map(str, _BART_SPECIAL.values()))}'
    )
  _check_byte_pairs(vocabulary, merges, where)
  # BART's last token, for which mini has no row. No text has it.
  vocabulary = {token: number for token, number in vocabulary.items() if token != '<mask>'}
  if normalizer == 'min_dalle':
    normalizers = [
      {'type': 'Replace', 'pattern': {'Regex': r'\A +| +\z'}, 'content': ''},
      {'type': 'Replace', 'pattern': {'Regex': ' +'}, 'content': ' '},
    ]
    words = {'type': 'Metaspace', 'replacement': 'Ġ', 'prepend_scheme': 'always', 'split': True}
  else:
    normalizers = []
    words = _byte_level(trim_offsets=False)
  tokenizer = _byte_pair_tokenizer(
    vocabulary,
    merges,
    special=tuple(_BART_SPECIAL),
    normalizers=normalizers,
    pre_tokenizer=words,
    ends=('<s>', '</s>'),
    unknown='<unk>',
  )
  return _dumps({json_tokenizer.NORMALIZER: normalizer, **tokenizer})


def of_siglip_2(path: str) -> bytes:
  """Returns SigLIP 2's tokenizer.json, which makes texts lower case and ends them with `<eos>`.

  Args:
    path: the published `tokenizer.json`, which is Gemma's with or without these steps, or its
      folder. For Gemma's SentencePiece model, use `TextVocabulary` with `lower_case=True`.

  Raises:
    UserError: if the file is missing or damaged, or isn't Gemma's.
  """
  file = pathlib.Path(path)
  file = file / 'tokenizer.json' if file.is_dir() else file
  found = dict(_json(file))
  vocabulary = _part(_part(found, 'model', file), 'vocab', file)
  if (vocabulary.get('<pad>'), vocabulary.get('<eos>')) != (0, 1):
    raise UserError(f"{file} isn't Gemma's tokenizer: the ids of <pad> and <eos> are not 0 and 1")
  lower = {'type': 'Lowercase'}
  normalizer = found.get('normalizer')
  steps = [] if normalizer is None else [normalizer]
  if isinstance(normalizer, Mapping) and normalizer.get('type') == 'Sequence':
    steps = normalizer.get('normalizers', [])
  steps = steps if lower in steps else [lower, *steps]
  end = {'SpecialToken': {'id': '<eos>', 'type_id': 0}}
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  return _dumps(
    found
    | {
      'truncation': None,
      'padding': None,
      'normalizer': {'type': 'Sequence', 'normalizers': steps},
      'post_processor': {
        'type': 'TemplateProcessing',
        'single': [text, end],
        'pair': [text, end, {'Sequence': {'id': 'B', 'type_id': 0}}, end],
        'special_tokens': {'<eos>': {'id': '<eos>', 'ids': [1], 'tokens': ['<eos>']}},
      },
    }
  )


def _byte_pair_tokenizer(
  vocabulary: Mapping[str, Any],
  merges: Any,
  *,
  special: Sequence[str],
  normalizers: Sequence[Mapping[str, Any]],
  pre_tokenizer: Mapping[str, Any],
  ends: tuple[str, str],
  unknown: str,
  suffix: str = '',
) -> dict[str, Any]:
  """Returns the tokenizer.json of byte pairs.

  Args:
    vocabulary: {token: its id}.
    merges: the merges.
    special: the special tokens.
    normalizers: the steps before a text is split into words.
    pre_tokenizer: splits a text into words.
    ends: the special tokens before and after a text.
    unknown: the token of what has none.
    suffix: what ends a word.
  """
  start, end = ends
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [_special(token, vocabulary[token]) for token in special],
    'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
    'pre_tokenizer': pre_tokenizer,
    'post_processor': {
      'type': 'RobertaProcessing',
      'sep': [end, vocabulary[end]],
      'cls': [start, vocabulary[start]],
      'trim_offsets': False,
      'add_prefix_space': False,
    },
    'decoder': _byte_level(trim_offsets=True, add_prefix_space=True),
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': unknown,
      'continuing_subword_prefix': '',
      'end_of_word_suffix': suffix,
      'fuse_unk': False,
      'byte_fallback': False,
      'ignore_merges': False,
      'vocab': vocabulary,
      'merges': merges,
    },
  }


def _byte_level(trim_offsets: bool, add_prefix_space: bool = False) -> dict[str, Any]:
  """Returns the step between a text and the letters that stand for its bytes."""
  return {
    'type': 'ByteLevel',
    'add_prefix_space': add_prefix_space,
    'trim_offsets': trim_offsets,
    'use_regex': True,
  }


def _special(token: str, number: int) -> dict[str, Any]:
  """Returns the entry of a special token."""
  return {
    'id': number,
    'content': token,
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    'normalized': False,
    'special': True,
  }


def _byte_pairs(given: str) -> tuple[Mapping[str, Any], Any, pathlib.Path]:
  """Returns the vocabulary and the merges of byte pairs, and the file that has the vocabulary.

  Args:
    given: a tokenizer.json, or a folder with it or with `vocab.json` and `merges.txt`.
  """
  path = pathlib.Path(given)
  whole = path / 'tokenizer.json' if path.is_dir() else path
  if (path / 'vocab.json').is_file() and (path / 'merges.txt').is_file():
    lines = _text(path / 'merges.txt').splitlines()
    merges = [line.split() for line in lines if line.strip() and not line.startswith('#version')]
    return _json(path / 'vocab.json'), merges, path / 'vocab.json'
  if whole.is_file():
    model = _part(_json(whole), 'model', whole)
    return _part(model, 'vocab', whole), model.get('merges', []), whole
  wanted = 'has neither vocab.json and merges.txt, nor tokenizer.json'
  raise UserError(f'{given} {wanted if path.is_dir() else "does not exist"}')


def _check_byte_pairs(vocabulary: Mapping[str, Any], merges: Any, where: pathlib.Path) -> None:
  """Checks byte pairs, also for what the `tokenizers` library accepts but a text then has other tokens.

  Args:
    vocabulary: {token: its id}.
    merges: the merges, pairs of texts, or texts with a space.
    where: the file that has the vocabulary, for messages.

  Raises:
    UserError: if two tokens have the same id, or the merges are others than those of the vocabulary.
  """
  where_merges = where.with_name('merges.txt') if where.name == 'vocab.json' else where
  ids: dict[int, str] = {}
  for token, number in vocabulary.items():
    checks.whole_number(f'{where}: the id of {token!r}', number, 0, show=checks.shown_as_json)
    if (other := ids.setdefault(number, token)) != token:
      raise UserError(f'{where}: {other!r} and {token!r} have the same id, {number}')
  made = set()
  for merge in merges if isinstance(merges, list) else [merges]:
    pair = merge.split(' ') if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
      raise UserError(
        f'{where_merges}: the merge {checks.shown_as_json(merge)} is not two tokens; download it again'
      )
    for token in (*pair, ''.join(pair)):
      if token not in vocabulary:
        raise UserError(
          f'{where_merges}: the merge {" ".join(pair)!r} needs the token {token!r}, which {where} does '
          'not have; give files of one tokenizer'
        )
    made.add(''.join(pair))
  expected = {token for token in vocabulary if not _NOT_MERGED.fullmatch(token)}
  if len(expected - made) > _MOST_UNMADE * len(expected):
    raise UserError(
      f'{where_merges}: its merges make {len(expected & made)} of the {len(expected)} longer tokens in '
      'the vocabulary, so they are cut short or belong to another one; download it again'
    )


def _text(path: pathlib.Path) -> str:
  try:
    return text_tokenizer.read_file(path).decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8: {error}') from error


def _json(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    found = json.loads(_text(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(found, Mapping):
    raise UserError(f'{path} is not a JSON object')
  return found


def _part(found: Mapping[str, Any], name: str, path: pathlib.Path) -> Mapping[str, Any]:
  part = found.get(name)
  if not isinstance(part, Mapping):
    raise UserError(f'{path}: {name!r} is not an object')
  return part


def _dumps(content: Mapping[str, Any]) -> bytes:
  return json.dumps(content, ensure_ascii=False).encode()
