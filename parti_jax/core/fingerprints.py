"""Fingerprints: which vocabulary and which image tokenizer something was made with.

Token ids mean nothing without the vocabulary or the tokenizer that they come from. A model reads
ids of another one without an error, and draws something else. So whatever is made with one of them
keeps its fingerprint, and whoever puts two such things together compares:

| kept in | vocabulary | tokenizer |
|---|---|---|
| a token cache, `info.json` | | of the tokens |
| a run's checkpoints, `data` | of the captions | of the tokens, or of the pictures it was trained on |
| an exported model, `config.json` | of `vocabulary.model`, and per network | per network as well |

A vocabulary's fingerprint is a digest of its file. A tokenizer's is a digest of the encoder and the
codebook: a decoder that was trained further draws the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ('vocabulary', 'tokenizer')
# What of a tokenizer's parameters decides which tokens a picture has.
_MAKES_TOKENS = ('encoder', 'quantizer')


def of_tokenizer(params: Mapping) -> str:
  """Returns the fingerprint of an image tokenizer's parameters, 16 hexadecimal digits."""
  # Who reads captions alone needs no JAX.
  import jax
  import numpy as np

  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    {name: params[name] for name in _MAKES_TOKENS}
  ):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def of_vocabulary(model: bytes) -> str:
  """Returns the fingerprint of a SentencePiece model's bytes, 16 hexadecimal digits."""
  return hashlib.sha256(model).hexdigest()[:16]


class Fingerprint(NamedTuple):
  """A fingerprint, and what has it.

  Attributes:
    value: 16 hexadecimal digits.
    name: of the thing, for messages.
  """

  value: str
  name: str


def values(found: Mapping[str, Fingerprint | None]) -> dict[str, str | None]:
  """Returns {kind: digits}, as a checkpoint keeps them."""
  return {kind: None if found.get(kind) is None else found[kind].value for kind in KINDS}


def named(name: str, kept: Mapping[str, str | None]) -> dict[str, Fingerprint]:
  """Returns {kind: fingerprint} of what is kept with the thing of this name."""
  return {kind: Fingerprint(kept[kind], name) for kind in KINDS if kept.get(kind)}


def mismatches(
  made_with: Mapping[str, Fingerprint | None],
  given: Mapping[str, Fingerprint | None],
  remedies: Mapping[str, str],
) -> list[str]:
  """Compares what something was made with and what it is put together with.

  Args:
    made_with: {kind: fingerprint}; a kind that is missing or None is not known.
    given: the same of the other side.
    remedies: {kind: what the user can do}.

  Returns:
    A sentence for each kind that differs, which names both.
  """
  found = []
  for kind in KINDS:
    theirs, ours = made_with.get(kind), given.get(kind)
    if theirs and ours and theirs.value != ours.value:
      found.append(
        f'{theirs.name} was made with the {kind} {theirs.value}, but {ours.name} has '
        f'{ours.value}; {remedies[kind]}'
      )
  return found
