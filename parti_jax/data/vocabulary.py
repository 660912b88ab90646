"""The text vocabulary: a SentencePiece model (arXiv 1808.06226), without TensorFlow.

Parti uses a SentencePiece vocabulary of 16,000, trained on sampled captions (section 2.2). The
same object serves training and sampling, so that both see the same tokens.
"""

import io
import os
import re
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
import sentencepiece

from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
# Bytes of a vocabulary; one of 250,000 pieces has five million.
LARGEST_MODEL = 64 * 2**20

# SentencePiece's mark for a space in front of a word.
_WORD_START = '\u2581'


class TextVocabulary:
  """Turns texts into token ids of a fixed length and back.

  Ids: padding 0, end of text 1, unknown 2, then the pieces of the model.
  """

  def __init__(self, path: str):
    """Loads a SentencePiece model.

    Args:
      path: the model's file, as `parti-jax vocabulary` writes it; a path or URL.

    Raises:
      UserError: the file is missing, is no SentencePiece model, or has other special ids.
    """
    self.path = os.fspath(path)
    try:
      model = storage.read(self.path, LARGEST_MODEL)
    except OSError as error:
      raise UserError(
        f'the vocabulary {self.path} cannot be read ({error.strerror or error}); '
        '`parti-jax vocabulary` makes one'
      ) from error
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError(f'the vocabulary {self.path} is no SentencePiece model') from error
    processor = self._processor
    special_ids = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if special_ids != (PAD_ID, EOS_ID, UNK_ID):
      raise UserError(
        f'the vocabulary {self.path} has the ids (pad, eos, unk) = {special_ids}, '
        f'needed are {(PAD_ID, EOS_ID, UNK_ID)}; `parti-jax vocabulary` makes such a one'
      )
    self.fingerprint = fingerprints.of_vocabulary(model)

  @property
  def size(self) -> int:
    """The number of ids, the special ones included."""
    return self._processor.get_piece_size()

  def encode(self, text: str, length: int) -> tuple[np.ndarray, str]:
    """Encodes a text.

    Args:
      text: any text. The empty one, which stands for "no text" in classifier-free guidance,
        becomes [1, 0, 0, ...].
      length: the number of ids to return, at least 1.

    Returns:
      The ids, int32 [length], ended by EOS and padded with 0, and the end of the text that did
      not fit, as the vocabulary normalises it (in lower case); '' if all of the text fits.

    Raises:
      UserError: a character of the text is half of one (a lone surrogate), as Python makes of
        arguments that are not UTF-8.
    """
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'the text {text[:80]!r} is not UTF-8: character {error.start + 1} of it is '
        'half a character; write it in UTF-8'
      ) from error
    ids = self._processor.encode(text)
    kept = ids[: length - 1]
    padded = np.full([length], PAD_ID, np.int32)
    padded[: len(kept)] = kept
    padded[len(kept)] = EOS_ID
    if len(kept) == len(ids):
      return padded, ''
    pieces = self._processor.encode(text, out_type=str)
    return padded, ''.join(pieces[len(kept) :]).replace(_WORD_START, ' ').strip()

  def encode_whole(self, text: str) -> list[int]:
    """Encodes a text in as many ids as it takes, the EOS at the end included."""
    return [*self._processor.encode(text), EOS_ID]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, up to the first EOS; padding is left out."""
    ids = [int(i) for i in ids]
    if EOS_ID in ids:
      ids = ids[: ids.index(EOS_ID)]
    return self._processor.decode([i for i in ids if i != PAD_ID])


def train_vocabulary(
  captions: Iterable[str],
  size: int,
  output: str,
  model_type: str = 'unigram',
  character_coverage: float = 0.9995,
  at_most: bool = False,
) -> TextVocabulary:
  """Trains a SentencePiece model and writes it in one go.

  Texts are normalised to NFKC and to lower case, so that a prompt's capitals don't matter.

  Args:
    captions: the texts to train on.
    size: the number of ids, the three special ones included.
    output: the file to write; it is replaced only by a complete model.
    model_type: 'unigram', or 'bpe', which keeps more words whole where captions are few.
    character_coverage: share of the characters in the texts that get a piece of their own; the
      rarest of the rest become unknown.
    at_most: whether the vocabulary may be smaller where the texts can't carry `size` ids.

  Returns:
    The new vocabulary.

  Raises:
    UserError: the texts can't carry so large a vocabulary, or have more characters than it has
      pieces, or the file can't be written.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(captions),
      model_writer=model,
      model_type=model_type,
      vocab_size=size,
      character_coverage=character_coverage,
      hard_vocab_limit=not at_most,
      normalization_rule_name='nmt_nfkc_cf',
      pad_id=PAD_ID,
      eos_id=EOS_ID,
      unk_id=UNK_ID,
      bos_id=-1,
      # Above this a sample carries the statistics just as well, in bounded memory.
      input_sentence_size=10_000_000,
      shuffle_input_sentence=True,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _training_error(error, size) from error
  try:
    storage.write(output, model.getvalue())
  except OSError as error:
    raise UserError(f'--output={output} cannot be written: {error.strerror}') from error
  return TextVocabulary(output)


def _training_error(error: RuntimeError, size: int) -> UserError:
  """Says in our terms why SentencePiece could not train."""
  message = str(error)
  if largest := re.search(r'value <= (\d+)', message):
    return UserError(
      f'--size={size} is more than these captions can carry; the largest is --size='
      f'{largest.group(1)}'
    )
  if smallest := re.search(r'smaller than required_chars.*?vs (\d+)', message):
    return UserError(
      f'--size={size} is less than the {smallest.group(1)} that the characters of these captions '
      'need; give a larger --size or a smaller --character_coverage'
    )
  return UserError(f'no vocabulary of --size={size} could be trained: {message.splitlines()[0]}')
