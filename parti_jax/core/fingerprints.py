"""Fingerprints identify the vocabulary, tokenizer and text encoder that an artifact was made with.

Token ids are meaningless without the vocabulary or tokenizer that produced them. A model given ids
of another one raises no error, but samples something else. So each artifact stores the
fingerprints of what it was made with, and code that combines two artifacts compares them:

| stored in | vocabulary | tokenizer |
|---|---|---|
| a token cache, `info.json` | | of the tokens |
| a run's checkpoints, `data` | of the captions | of the tokens or images that it reads |
| an exported model, `config.json` | of `vocabulary.model`, and per network | per network |

A vocabulary's fingerprint is a digest of its file. A tokenizer's fingerprint is a digest of the
encoder, the codebook and the settings that determine tokens: further training of the decoder alone
doesn't change the tokens. The fingerprint of an imported text encoder is a digest of the public files
that it was read from. A run's checkpoints and an exported generator have that of the text encoder
that the generator began with, and have it in their parameters. The fingerprint of a base, to which
adapters (LoRA) belong, is a digest of the parameters of its network; the adapters and the checkpoints
of their run have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from parti_jax.core import errors

KINDS = ('vocabulary', 'tokenizer', 'text_encoder')
# Only adapters have a base.
BASE = 'base'
# The parameters of a tokenizer, and those of them that determine an image's tokens.
TOKENIZER_PARTS = ('encoder', 'quantizer', 'decoder')
_MAKES_TOKENS = ('encoder', 'quantizer')


def of_tokenizer(params: Mapping, settings: Mapping[str, Any] | None = None) -> str:
  """Returns the fingerprint of an image tokenizer, 16 hexadecimal digits.

  Args:
    params: its parameters.
    settings: the settings that determine tokens too, as JSON: the result of
      `image_tokenizers.token_settings`.

  Raises:
    UserError: if it has other parameters than TOKENIZER_PARTS, of which nothing says whether they
      determine tokens.
  """
  check_tokenizer_parts(params)
  # Imported here because reading captions needs no JAX.
  import jax
  import numpy as np

  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    {name: params[name] for name in _MAKES_TOKENS if name in params}
  ):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  if settings:
    digest.update(json.dumps(settings, sort_keys=True).encode())
  return digest.hexdigest()[:16]


def check_tokenizer_parts(params: Mapping) -> None:
  """Raises UserError if a tokenizer has other parameters than TOKENIZER_PARTS."""
  if unknown := sorted(params.keys() - set(TOKENIZER_PARTS)):
    raise errors.UserError(
      f'the image tokenizer has parameters {", ".join(unknown)}; put them into its submodules '
      'encoder and quantizer, if they determine tokens, or into decoder'
    )


def of_parameters(params: Mapping) -> str:
  """Returns the fingerprint of a network's parameters, 16 hexadecimal digits.

  It depends on their values in float32, not on the dtype that they are stored in.

  Args:
    params: a tree of arrays, without axis names. Of a lazily read one, a part along the first axis
      is read at a time.
  """
  # Imported here because reading captions needs no JAX.
  import jax
  import numpy as np

  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(f'{jax.tree_util.keystr(path)}{tuple(leaf.shape)}'.encode())
    parts = [leaf[index] for index in range(leaf.shape[0])] if len(leaf.shape) > 2 else [leaf]
    for part in parts:
      digest.update(np.ascontiguousarray(np.asarray(part), np.float32).data)
  return digest.hexdigest()[:16]


def of_vocabulary(model: bytes) -> str:
  """Returns the fingerprint of a SentencePiece model's bytes, 16 hexadecimal digits."""
  return hashlib.sha256(model).hexdigest()[:16]


def of_origin(origin: Any) -> str | None:
  """Returns the fingerprint of imported weights, 16 hexadecimal digits, from the SHA-256 of files.

  Args:
    origin: what `parti-jax import` keeps about their origin; anything else has no fingerprint.
  """
  digest = origin.get('sha256') if isinstance(origin, Mapping) else None
  return digest[:16] if isinstance(digest, str) and digest else None


class Fingerprint(NamedTuple):
  """A fingerprint and the artifact that it belongs to.

  Attributes:
    value: 16 hexadecimal digits.
    name: name of the artifact, for messages.
  """

  value: str
  name: str


def values(found: Mapping[str, Fingerprint | None]) -> dict[str, str | None]:
  """Returns {kind: digits}, the form stored in a checkpoint."""
  kinds = (*KINDS, BASE) if found.get(BASE) else KINDS
  return {
    kind: None if (fingerprint := found.get(kind)) is None else fingerprint.value for kind in kinds
  }


def named(name: str, kept: Mapping[str, str | None]) -> dict[str, Fingerprint]:
  """Returns {kind: fingerprint} from the digits stored with the artifact of this name."""
  return {kind: Fingerprint(digits, name) for kind in (*KINDS, BASE) if (digits := kept.get(kind))}


def mismatches(
  made_with: Mapping[str, Fingerprint | None],
  given: Mapping[str, Fingerprint | None],
  remedies: Mapping[str, str],
) -> list[str]:
  """Compares the fingerprints of two artifacts that are combined.

  Args:
    made_with: {kind: fingerprint} that the first artifact was made with; missing or None if
      unknown.
    given: {kind: fingerprint} of the second artifact.
    remedies: {kind: what the user can do}.

  Returns:
    A sentence for each kind that differs, naming both artifacts.
  """
  found = []
  for kind in (*KINDS, BASE):
    theirs, ours = made_with.get(kind), given.get(kind)
    if theirs and ours and theirs.value != ours.value:
      found.append(
        f'{theirs.name} was made with the {kind.replace("_", " ")} {theirs.value}, but {ours.name} has '
        f'{ours.value}; {remedies[kind]}'
      )
  return found
