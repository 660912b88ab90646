"""The text vocabulary: a SentencePiece model (arXiv 1808.06226), without TensorFlow.

Parti uses a SentencePiece vocabulary of size 16,000, trained on sampled captions (section 2.2).
Training and sampling use the same class, so both see the same tokens.
"""

import io
import os
import re
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int32

from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core import text_ids
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer

PAD_ID = text_ids.PAD_ID
EOS_ID = text_ids.EOS_ID
UNK_ID = 2


class TextVocabulary:
  """Converts texts to token ids of a fixed length and back.

  Ids: padding 0, end of text 1, then the pieces of the model, of which one stands for unknown
  ones: 2 in the models that `train_vocabulary` writes, and 3 in Gemma's, which SigLIP 2 uses.
  """

  def __init__(self, path: str, lower_case: bool = False):
    """Loads a SentencePiece model.

    Args:
      path: the model's file, as written by `parti-jax vocabulary`; a path or URL.
      lower_case: whether `encode` makes texts lower case first, for a model that doesn't do so
        itself. SigLIP 2's texts are lower case, and Gemma's model keeps capitals.

    Raises:
      UserError: the file is missing, isn't a SentencePiece model, or has other special ids.
    """
    self.path = os.fspath(path)
    model = text_tokenizer.read_file(path, '; create one with `parti-jax vocabulary`')
    self._lower_case = lower_case
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError(f'the vocabulary {self.path} is not a SentencePiece model') from error
    processor = self._processor
    special_ids = (processor.pad_id(), processor.eos_id())
    if special_ids != (PAD_ID, EOS_ID):
      raise UserError(
        f'the vocabulary {self.path} has the ids (pad, eos) = {special_ids}, '
        f'expected {(PAD_ID, EOS_ID)}; create one with `parti-jax vocabulary`'
      )
    self.fingerprint = fingerprints.of_vocabulary(model)

  @property
  def size(self) -> int:
    """The number of ids, including the special ones."""
    return self._processor.get_piece_size()

  @property
  def unknown_id(self) -> int:
    """The id of the piece that stands for unknown ones."""
    return self._processor.unk_id()

  def encode(self, text: str, length: int) -> tuple[Int32[np.ndarray, 'text_length'], str]:
    """Encodes a text.

    Args:
      text: any text. The empty text, which stands for "no text" in classifier-free guidance,
        becomes [1, 0, 0, ...].
      length: the number of ids to return, at least 1.

    Returns:
      The ids, terminated by EOS and padded with 0; and the end of the text that
      did not fit, in the vocabulary's normalized form (lower case), '' if the whole text fits.

    Raises:
      UserError: the text contains a lone surrogate, which Python creates for command line
        arguments that aren't UTF-8.
    """
    text_tokenizer.check_text(text)
    text = self._cased(text)
    ids = self._processor.encode(text)
    kept = ids[: length - 1]
    padded = np.full([length], PAD_ID, np.int32)
    padded[: len(kept)] = kept
    padded[len(kept)] = EOS_ID
    if len(kept) == len(ids):
      return padded, ''
    pieces = self._processor.encode(text, out_type=str)
    return padded, self._processor.decode(pieces[len(kept) :]).strip()

  def is_empty(self, ids: Sequence[int] | np.ndarray) -> bool:
    """Returns whether a result of `encode` has no text before EOS."""
    return ids[0] == EOS_ID

  def encode_whole(self, text: str) -> list[int]:
    """Encodes a text without a length limit, including the final EOS."""
    return [*self._processor.encode(self._cased(text)), EOS_ID]

  def _cased(self, text: str) -> str:
    # One character after another, as the tokenizers library does: no final sigma.
    return ''.join(map(str.lower, text)) if self._lower_case else text

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, up to the first EOS; skips padding."""
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
  """Trains a SentencePiece model and writes it atomically.

  Texts are normalized to NFKC and lower case, so the case of a prompt doesn't matter.

  Args:
    captions: the texts to train on.
    size: the number of ids, including the three special ones.
    output: the file to write; only a complete model replaces it.
    model_type: 'unigram', or 'bpe', which keeps more whole words if there are few captions.
    character_coverage: share of the texts' characters that get their own piece; the rarest ones
      beyond it become unknown.
    at_most: whether the vocabulary may be smaller if the texts don't support `size` ids.

  Returns:
    The new vocabulary.

  Raises:
    UserError: the texts don't support a vocabulary of this size, or have more characters than it
      has pieces, or the file can't be written.
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
      # A sample of this size has nearly the same statistics, in bounded memory.
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
  """Translates SentencePiece's training error into our terms."""
  message = str(error)
  if largest := re.search(r'value <= (\d+)', message):
    return UserError(
      f'--size={size} is more than these captions support; the largest is --size={largest.group(1)}'
    )
  if smallest := re.search(r'smaller than required_chars.*?vs (\d+)', message):
    return UserError(
      f'--size={size} is less than the {smallest.group(1)} that the characters of these captions '
      'need; give a larger --size or a smaller --character_coverage'
    )
  return UserError(f'no vocabulary of --size={size} could be trained: {message.splitlines()[0]}')
