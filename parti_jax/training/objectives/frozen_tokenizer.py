"""Loads trained image tokenizers and tokenizes images with them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import gin
import jax
import numpy as np
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.models import image_tokenizers
from parti_jax.models import pixels
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import device_groups


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenTokenizer:
  """A trained image tokenizer.

  Attributes:
    path: the folder that it was loaded from.
    config: its config.
    params: its parameters, a tree of arrays.
    kept_fingerprint: the fingerprint stored in an exported model, which is the one of the run that
      it is from; None if it has to be computed.
  """

  path: str
  config: image_tokenizers.Config
  params: Any
  kept_fingerprint: str | None = None

  @functools.cached_property
  def fingerprint(self) -> str:
    """The fingerprint of `parti_jax.core.fingerprints`, which token caches and models store."""
    return self.kept_fingerprint or fingerprints.of_tokenizer(
      self.params, image_tokenizers.token_settings(self.config)
    )


def is_trained(path: str | os.PathLike) -> bool:
  """Returns whether a folder is an exported model, or a run with a checkpoint."""
  return storage.exists(
    storage.join(path, model_folder.CONFIG_FILE)
  ) or run_checkpoints.has_checkpoint(path)


def sizes(
  path: str | os.PathLike, of_trained: Callable[[], image_tokenizers.Config]
) -> image_tokenizers.Config:
  """Returns the config of a tokenizer that may not be trained yet, for a plan.

  Args:
    path: folder of its run, or of an exported model.
    of_trained: returns the config of the trained tokenizer.

  Returns:
    The config of the trained tokenizer, or of gin (`planned_config`) if it isn't trained yet.

  Raises:
    UserError: if there is a trained tokenizer that can't be read.
  """
  try:
    return of_trained()
  except errors.UserError:
    if is_trained(path):
      raise
    return planned_config()


def planned_config() -> image_tokenizers.Config:
  """Returns gin's TokenizerObjective.model; without one, a ViTVQGANConfig with gin's values."""
  try:
    reference = gin.query_parameter('TokenizerObjective.model')
  except ValueError:
    return vit_vqgan.ViTVQGANConfig()
  return reference.scoped_configurable_fn()


def planned_params(model: image_tokenizers.Config) -> PyTree:
  """Returns the shapes and dtypes of a tokenizer's parameters, without any files."""
  return nn.meta.unbox(model_folder.abstract('tokenizer', model))


def load(path: str | os.PathLike, device: jax.Device | None = None) -> FrozenTokenizer:
  """Loads the image tokenizer of a run's newest checkpoint, or of an exported model.

  Args:
    path: folder of the run or of the model.
    device: the device for the parameters of a run; None for the first one of this process. The
      parameters of a model are numpy arrays.

  Raises:
    UserError: if there is no finished checkpoint, if it is of another objective, or if the model is
      unfinished or damaged.
  """
  if storage.exists(storage.join(path, model_folder.CONFIG_FILE)):
    part = model_folder.load_part('tokenizer', path)
    return FrozenTokenizer(str(path), part.config, part.params, part.made_with.get('tokenizer'))
  checkpoint = run_checkpoints.latest_checkpoint(path)
  config = run_checkpoints.read_config(checkpoint, 'tokenizer')
  params = run_checkpoints.read_params(
    checkpoint,
    image_tokenizers.module(config),
    image_tokenizers.example_inputs(config),
    device,
  )
  return FrozenTokenizer(str(path), config, params)


def load_for(key: str, path: str, remedy: str) -> FrozenTokenizer:
  """Loads the tokenizer at a path from gin, with numpy arrays.

  Args:
    key: the gin key, for messages.
    path: the value of the gin key.
    remedy: an alternative to another path, for messages.

  Raises:
    UserError: if `load` fails.
  """
  # In its own thread, which doesn't inherit the mesh of a training step that may be calling.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    try:
      found = executor.submit(load, path).result()
    except errors.UserError as error:
      raise errors.UserError(f'{key}={path!r}: {error}; or {remedy}') from error
  return dataclasses.replace(found, params=jax.tree.map(np.asarray, found.params))


class Encoder:
  """Tokenizes images on all devices of this process.

  The tokens of an image depend neither on the number of devices nor on the number of images per
  call (`device_groups`).

  Args:
    tokenizer: the tokenizer.
    dtype: name of the dtype for projections; None for bfloat16 on accelerators and float32 on CPUs.
    devices: the devices to use; None for all devices of this process.

  Attributes:
    dtype: name of the dtype.
    platform: 'cpu', 'gpu' or 'tpu'.
  """

  def __init__(
    self,
    tokenizer: FrozenTokenizer,
    dtype: str | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    devices = list(devices or jax.local_devices())
    self.platform = devices[0].platform
    self.dtype = dtype or ('float32' if self.platform == 'cpu' else 'bfloat16')
    used = {name: values for name, values in tokenizer.params.items() if name != 'decoder'}
    config = dataclasses.replace(tokenizer.config, dtype=self.dtype)
    apply: Callable[..., Any] = image_tokenizers.module(config).apply

    def encode(
      params: Mapping[str, Any], images: UInt8[Array, 'batch height width 3']
    ) -> Int[Array, 'batch tokens']:
      return apply({'params': params}, pixels.from_bytes(images), method='tokenize')

    self._encode = device_groups.DeviceGroups(encode, used, devices)

  def __call__(
    self, images: UInt8[np.ndarray, 'batch height width 3']
  ) -> Callable[[], Int[np.ndarray, 'batch tokens']]:
    """Starts to compute the tokens of images.

    Returns:
      A function that waits for the tokens, int32, and returns them.
    """
    found = self._encode(images)
    return lambda: np.concatenate(found())[: len(images)]
