"""Captions: usable and unusable ones, what is removed, and how they are counted."""

import pytest

from parti_jax.data import captions
from parti_jax.data.batches import Batches

LENGTHS = {'inputs': 16}


@pytest.mark.parametrize(
  'data, reason',
  [
    (b'', 'no caption'),
    (b' \t\r\n', 'no caption'),
    ('\u200b\u200e\u2003\ufeff'.encode(), 'no caption'),
    (b'\xef\xbb\xbf', 'no caption'),
    (b'caf\xe9', 'caption not UTF-8'),
    (b'a dog \xed\xa0\x80', 'caption not UTF-8'),
    (b'\xff\xfea\0\0\xd8', 'caption not UTF-16'),
    ('a dog'.encode('utf-16-le'), 'caption of control characters'),
    (captions.NOT_TEXT, 'caption that is not a text'),
    (bytes(range(1, 32)), 'caption of control characters'),
    (b'a\0\0\0d\0\0\0', 'caption of control characters'),
  ],
)
def test_unusable(data, reason):
  with pytest.raises(captions.UnusableCaption, match=f'^{reason}$'):
    captions.clean(data)


@pytest.mark.parametrize(
  'data, text',
  [
    (b'  a dog\n', 'a dog'),
    (b'\xef\xbb\xbfa dog', 'a dog'),
    ('a dog\n'.encode('utf-16'), 'a dog'),
    (b'\xfe\xff' + 'ein Bär'.encode('utf-16-be'), 'ein Bär'),
    ('ein Bär'.encode('utf-32'), 'ein Bär'),
    ('ein Bär'.encode(), 'ein Bär'),
    ('\u202eabc\u202c'.encode(), '\u202eabc\u202c'),
    ('\U0001f469\u200d\U0001f692'.encode(), '\U0001f469\u200d\U0001f692'),
    (b'a\tdog', 'a\tdog'),
  ],
)
def test_kept(data, text):
  assert captions.clean(data) == (text, [])


def test_control_characters_become_spaces():
  text, changes = captions.clean('a dog\0and\x92 a cat'.encode())
  assert text == 'a dog and  a cat'
  assert changes == ['control characters taken out of the caption']


def test_huge_captions_are_cut_between_characters():
  text, changes = captions.clean(('x' + 'ä' * 5_000_000).encode())
  assert text == 'x' + 'ä' * (captions.MAX_BYTES // 2 - 1)
  assert changes == ['caption cut to 65,536 bytes']
  text, changes = captions.clean(('\U0001f692' * 5_000_000).encode('utf-16'))
  assert text == '\U0001f692' * (captions.MAX_BYTES // 4 - 1)
  assert changes == ['caption cut to 65,536 bytes']


def test_json():
  assert captions.from_json('Bär') == 'Bär'.encode()
  assert captions.from_json(None) == b''
  for value in (7, 0.5, True, ['a dog'], {'text': 'a dog'}):
    with pytest.raises(captions.UnusableCaption, match='^caption that is not a text$'):
      captions.clean(captions.from_json(value))
  with pytest.raises(captions.UnusableCaption, match='not UTF-8'):
    captions.clean(captions.from_json('half a pair \ud83d'))


def test_captions_in_a_run(folder, encode, caplog):
  picture = encode((1, 2, 3))
  folder(
    [
      ('a dog', picture),
      ('\ud83d', picture),
      ('\x01\x02', picture),
      ('\u200b', picture),
      ('a cat\x07 on a mat', picture),
      ('dog ' * 50_000, picture),
      ('\uffff', picture),
    ]
  )
  batches = Batches('folder_texts', 'train', 8, LENGTHS, num_epochs=1)
  (batch,) = batches
  assert len(batch['encoder_input_tokens']) == 4
  assert batches.skipped == {
    'caption not UTF-8': 1,
    'caption of control characters': 1,
    'no caption': 1,
  }
  assert batches.shortened == {
    'control characters taken out of the caption': 1,
    'caption cut to 65,536 bytes': 1,
    'caption cut to 16 tokens': 1,
  }
  assert '1 caption not UTF-8' in caplog.text


def test_a_caption_that_the_vocabulary_drops_is_unusable(folder, encode):
  # Visible to Unicode, but SentencePiece treats the replacement character as whitespace.
  folder([('a dog', encode((1, 2, 3))), ('\ufffd', encode((1, 2, 3)))])
  batches = Batches('folder_texts', 'train', 8, LENGTHS, num_epochs=1)
  (batch,) = batches
  assert len(batch['encoder_input_tokens']) == 1 and batches.skipped == {'no caption': 1}
