"""Compares the vocabulary and the tokenizer that networks were trained with, by fingerprints.

A network is a `model_folder.Part`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from parti_jax.core import fingerprints
from parti_jax.data import text_tokenizer
from parti_jax.models import image_tokenizers

_REMEDIES = {
  'vocabulary': 'give the vocabulary that it was trained with',
  'tokenizer': 'give the tokenizer that it was trained with, or tokenize the pictures with this '
  'tokenizer and train on these tokens',
}


def known(networks: Mapping[str, Any], made_with: Mapping) -> dict[str, dict[str, str]]:
  """Returns the known fingerprints of each network, including that of its own tokenizer."""
  known = {
    name: {kind: value for kind, value in made_with.get(name, {}).items() if value}
    for name in networks
  }
  for name, path in own_vocabularies(networks).items():
    known[name].setdefault('vocabulary', _vocabulary_fingerprint(path).value)
  if 'tokenizer' in known and 'tokenizer' not in known['tokenizer']:
    part = networks['tokenizer']
    settings = image_tokenizers.token_settings(part.config)
    params = nn.meta.unbox(part.params)
    known['tokenizer'] = {'tokenizer': fingerprints.of_tokenizer(params, settings)}
  return known


def mismatches(
  made_with: Mapping[str, Mapping[str, str]],
  vocabulary,
  own_vocabularies: Mapping[str, Any],
  sources: Mapping[str, str] = {},
) -> list[str]:
  """Returns a sentence for each network that was trained with another vocabulary or tokenizer.

  Args:
    made_with: {name of a network: {kind: fingerprint}}.
    vocabulary: the model's SentencePiece file.
    own_vocabularies: {name of a network: file of its own text tokenizer}; the model's vocabulary
      doesn't matter to these.
    sources: {name of a network: its origin}.
  """

  def full_name(network: str) -> str:
    name = 'super-resolution network' if network == 'super_resolution' else network
    return f'the {name} {sources.get(network, "")}'.strip()

  given = fingerprints.named(full_name('tokenizer'), made_with['tokenizer'])
  given['vocabulary'] = _vocabulary_fingerprint(vocabulary)
  return [
    line
    for name, kept in made_with.items()
    for line in (
      other_vocabulary(full_name(name), kept, own_vocabularies[name])
      if name in own_vocabularies
      else fingerprints.mismatches(fingerprints.named(full_name(name), kept), given, _REMEDIES)
    )
  ]


def other_vocabulary(name: str, made_with: Mapping[str, str], vocabulary) -> list[str]:
  """Returns a sentence if a network was trained with another vocabulary than this file."""
  given = {'vocabulary': _vocabulary_fingerprint(vocabulary)}
  return fingerprints.mismatches(fingerprints.named(name, made_with), given, _REMEDIES)


def own_vocabularies(networks: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {name of a network: file of its own text tokenizer}."""
  return {
    name: part.vocabulary_path
    for name, part in networks.items()
    if part.vocabulary_path is not None
  }


def _vocabulary_fingerprint(path) -> fingerprints.Fingerprint:
  """Returns the fingerprint of a vocabulary's file."""
  content = text_tokenizer.read_file(path)
  return fingerprints.Fingerprint(fingerprints.of_vocabulary(content), f'the vocabulary {path}')
