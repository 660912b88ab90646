"""Computes text features: the output of an imported text encoder that training doesn't change."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Int32
from jaxtyping import PyTree
from jaxtyping import UInt32

from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import numerics
from parti_jax.data import captions as captions_lib
from parti_jax.data import datasets
from parti_jax.data import examples
from parti_jax.data import text_features
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.models import config_checks
from parti_jax.models import generators
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.partitioning import device_groups
from parti_jax.training.objectives import initial_text_encoder

# Settings that the features depend on only by rounding, or that text features state themselves.
_NOT_COMPARED = (*config_checks.FREE_SETTINGS, 'text_length')


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenTextEncoder:
  """An imported text encoder.

  Attributes:
    path: the folder that it was loaded from.
    config: its config.
    params: its parameters, a tree of arrays that are read when they are used.
    vocabulary: its text tokenizer.
  """

  path: str
  config: parti_config.TextEncoderConfig
  params: PyTree
  vocabulary: text_tokenizer.TextTokenizer


def load(path: str | os.PathLike, text_length: int | None = None) -> FrozenTextEncoder:
  """Loads a text encoder for `parti-jax tokenize --text_encoder`.

  Args:
    path: a folder that `parti-jax import text_encoder` wrote, a path or a URL.
    text_length: maximum number of text tokens; None for the folder's.

  Raises:
    UserError: if the folder has no text encoder, or it can't have this length.
  """
  try:
    part = model_folder.load_part('text_encoder', path)
  except errors.UserError as error:
    raise errors.UserError(
      f'--text_encoder={path}: {error}; give a folder that `parti-jax import text_encoder` wrote'
    ) from error
  try:
    config = initial_text_encoder.imported_text_encoder(str(path), text_length, 0.0)
  except errors.UserError as error:
    why = gin_config.without_call_chain(error)
    raise errors.UserError(f'--text_length={text_length}: {why}') from error
  vocabulary = datasets.get_vocabulary(str(path))
  ids = examples.empty_text(vocabulary, config.text_length)
  if len(ids) >= 3:
    text_encoders.check_empty_text(config, ids, f'the vocabulary of --text_encoder={path}')
  return FrozenTextEncoder(str(path), config, part.params, vocabulary)


@numerics.fixed()
def fingerprint(
  model: generators.Config, params: PyTree, sharding: jax.sharding.Sharding | None
) -> str:
  """Returns a text encoder's fingerprint, 16 hexadecimal digits.

  It is computed on the devices, so that parameters may be split over a mesh of several processes,
  which must call it together. It isn't safe against forgery.

  Args:
    model: config of a generator with the text encoder.
    params: parameters of the text encoder, of any dtype that float32 includes.
    sharding: a sharding that has all of an array on each device; None for parameters that aren't
      on devices.
  """
  encoder = parti_config.as_dict(model)['text_encoder']
  settings = {name: value for name, value in encoder.items() if name not in _NOT_COMPARED}
  found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  sums = jax.jit(_sums, out_shardings=sharding)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    found.update(json.dumps([name, list(leaf.shape)]).encode())
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    found.update(np.asarray(jax.device_get(sums(array))).astype('<u4').tobytes())
  return found.hexdigest()[:16]


def _sums(leaf: Float[Array, '*shape']) -> UInt32[Array, '2']:
  """Returns two sums, modulo 2^32, of hashes of an array's values and their places.

  The order in which integers are added doesn't change the sum, so it is the same on all meshes.
  """
  bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  first = _mixed(bits ^ _mixed(place + np.uint32(0x9E3779B9)))
  second = _mixed(bits + _mixed(place ^ np.uint32(0x85EBCA6B)))
  return jnp.stack([jnp.sum(values, dtype=jnp.uint32) for values in (first, second)])


def _mixed(bits: UInt32[Array, '*shape']) -> UInt32[Array, '*shape']:
  """A permutation of 32 bits in which each bit depends on all: that of MurmurHash3."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * np.uint32(factor)
  return bits ^ (bits >> 16)


class Encoder:
  """Computes text features on all devices of this process.

  As with image tokens, the features of a text depend neither on the number of devices nor on the
  number of texts per call.

  Args:
    encoder: the text encoder.
    dtype: name of the dtype to compute in.
    stored: name of the dtype of the features, in `text_features.DTYPES`.
    devices: the devices to use; None for all devices of this process.

  Attributes:
    features: describes the features, for the cache.
  """

  def __init__(
    self,
    encoder: FrozenTextEncoder,
    dtype: str,
    stored: str = 'bfloat16',
    devices: Sequence[jax.Device] | None = None,
  ):
    model = parti_config.PartiConfig(text_encoder=encoder.config, dtype=dtype)
    self._vocabulary, self._path = encoder.vocabulary, encoder.path
    self._length = model.text_length
    apply: Callable[..., Any] = text_encoders.module(model).apply

    def encode(
      params: PyTree, texts: Int[Array, 'batch text_length']
    ) -> tuple[Float[Array, 'batch text_length width'], Int[Array, 'batch']]:
      seen = text_encoders.text_mask(model, texts)[:, 0, 0]
      counts = jnp.max(jnp.where(seen, jnp.arange(1, seen.shape[1] + 1), 0), axis=1)
      return apply({'params': params}, texts).astype(text_features.DTYPES[stored]), counts

    self._encode = device_groups.DeviceGroups(
      encode,
      # A kernel is used in this dtype only.
      jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(jnp.dtype(dtype)) if path[-1].key == 'kernel' else leaf,
        encoder.params,
      ),
      list(devices or jax.local_devices()),
    )
    self.features = text_features.TextFeatures(
      fingerprint(model, encoder.params, None),
      self._vocabulary.fingerprint,
      self._length,
      model.text_width,
      stored,
    )
    (empty,) = self._start(examples.empty_text(self._vocabulary, self._length)[None])()
    self.features = dataclasses.replace(self.features, empty=self.features.to_bytes(empty))

  def __call__(
    self, captions: Sequence[str], notes: collections.Counter[str] | None = None
  ) -> Callable[[], list[list[text_features.Rows]]]:
    """Starts to compute the features of captions.

    Args:
      captions: captions of a token cache, each of one or several texts (`captions.several`).
      notes: counts the texts that are cut.

    Returns:
      A function that waits for the features, and returns those of each text of each caption, of its
      tokens only. A text that can't be used, and which training leaves out, has none.
    """
    ids = [
      self._ids(text, notes)
      for caption in captions
      for text in captions_lib.alternatives(caption.encode())
    ]
    counts = [len(captions_lib.alternatives(caption.encode())) for caption in captions]
    usable = [text for text in ids if text is not None]
    wait = self._start(np.stack(usable)) if usable else list

    def found() -> list[list[text_features.Rows]]:
      rows = iter(wait())
      none = np.zeros((0, self.features.width), text_features.DTYPES[self.features.dtype])
      of_texts = iter([none if text is None else next(rows) for text in ids])
      return [[next(of_texts) for _ in range(count)] for count in counts]

    return found

  def _ids(
    self, text: bytes, notes: collections.Counter[str] | None
  ) -> Int32[np.ndarray, 'text_length'] | None:
    """Returns the text tokens that training makes of a text; None if it leaves the text out."""
    try:
      ids, _, changes = examples.caption_ids(text, self._vocabulary, self._length)
    except captions_lib.UnusableCaption:
      return None
    # The other changes were noted when the picture was read.
    if notes is not None and (note := examples.cut_note(self._length)) in changes:
      notes[note] += 1
    return ids

  def _start(
    self, ids: Int32[np.ndarray, 'batch text_length']
  ) -> Callable[[], list[text_features.Rows]]:
    wait = self._encode(ids)

    def found() -> list[text_features.Rows]:
      rows = [
        features[:count] for groups in wait() for features, count in zip(*groups, strict=True)
      ][: len(ids)]
      if not all(np.isfinite(of_text).all() for of_text in rows):
        raise errors.UserError(
          f'--text_encoder={self._path}: a text has features that are not finite in '
          f'{self.features.dtype}; set --text_features_dtype=bfloat16 and --dtype=float32'
        )
      return rows

    return found
