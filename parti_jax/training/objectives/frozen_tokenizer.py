"""An image tokenizer that is trained and stays as it is: how it is loaded, and its tokens."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.models import vit_vqgan

# Pictures that a device computes at once.
GROUP = 16


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenTokenizer:
  """A trained image tokenizer.

  Attributes:
    path: the folder that it is from.
    config: its sizes.
    params: its parameters, a tree of arrays.
    kept_fingerprint: the fingerprint that an exported model keeps, that of the run it is from;
      None where it has to be computed.
  """

  path: str
  config: vit_vqgan.ViTVQGANConfig
  params: Any
  kept_fingerprint: str | None = None

  @functools.cached_property
  def fingerprint(self) -> str:
    """By which token caches and models know the tokenizer, see `parti_jax.core.fingerprints`."""
    return self.kept_fingerprint or fingerprints.of_tokenizer(self.params)


def is_trained(path) -> bool:
  """Whether a folder is an exported model, or a run that has written a checkpoint."""
  return storage.exists(
    storage.join(path, model_folder.CONFIG_FILE)
  ) or run_checkpoints.has_checkpoint(path)


def sizes(path, of_trained: Callable[[], vit_vqgan.ViTVQGANConfig]):
  """Sizes of a tokenizer that may have to be trained first, as for a plan.

  Args:
    path: its run's folder, or that of an exported model.
    of_trained: returns the sizes of the trained one.

  Returns:
    A ViTVQGANConfig: that of the trained tokenizer or, as long as there is none, that of gin.

  Raises:
    UserError: if there is a trained tokenizer that can't be read.
  """
  try:
    return of_trained()
  except errors.UserError:
    if is_trained(path):
      raise
    return vit_vqgan.ViTVQGANConfig()


def planned_params(model: vit_vqgan.ViTVQGANConfig):
  """Shapes and dtypes of a tokenizer's parameters, without any files."""
  return nn.meta.unbox(model_folder.abstract('tokenizer', model))


def load(path, device: jax.Device | None = None) -> FrozenTokenizer:
  """Loads the image tokenizer of a run, or of an exported model.

  Args:
    path: the run's folder, or that of the model.
    device: where the parameters of a run are put; None for the first of this process. Those of a
      model are numpy arrays.

  Returns:
    The tokenizer; that of a run is from the newest checkpoint.

  Raises:
    UserError: if there is no finished checkpoint, or it is of another objective; or the model is
      unfinished or damaged.
  """
  if storage.exists(storage.join(path, model_folder.CONFIG_FILE)):
    config, params, made_with = model_folder.load_tokenizer(path)
    return FrozenTokenizer(str(path), config, params, made_with.get('tokenizer'))
  checkpoint = run_checkpoints.latest_checkpoint(path)
  config = vit_vqgan.ViTVQGANConfig(**run_checkpoints.read_config(checkpoint, 'tokenizer'))
  params = run_checkpoints.read_params(
    checkpoint, vit_vqgan.ViTVQGAN(config), vit_vqgan.example_inputs(config), device
  )
  return FrozenTokenizer(str(path), config, params)


def load_for(key: str, path: str, remedy: str) -> FrozenTokenizer:
  """Loads a tokenizer that a gin value names, with numpy arrays.

  Args:
    key: the gin key, for messages.
    path: its value.
    remedy: what else the user may do than name another one, for messages.

  Raises:
    UserError: as `load`.
  """
  # In a thread of its own, which knows no mesh: the caller may be within a step's.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    try:
      found = executor.submit(load, path).result()
    except errors.UserError as error:
      raise errors.UserError(f'{key}={path!r}: {error}; or {remedy}') from error
  return dataclasses.replace(found, params=jax.tree.map(np.asarray, found.params))


class Encoder:
  """Makes tokens of pictures on all devices of this process.

  The tokens of a picture depend on neither the number of devices nor how many pictures are given at
  once: every device computes groups of `GROUP` pictures by one program, since XLA's sums differ in
  their last bits with the size of what is computed.

  Args:
    tokenizer: makes the tokens.
    dtype: name of the dtype that projections compute in; None for bfloat16 on accelerators and
      float32 on CPUs.
    devices: of this process; None for all of them.

  Attributes:
    dtype: the name.
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
    self._at_once = GROUP * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ('device',))
    self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('device'))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    used = {name: values for name, values in tokenizer.params.items() if name != 'decoder'}
    self._params = jax.device_put(jax.tree.map(np.asarray, used), everywhere)
    module = vit_vqgan.ViTVQGAN(dataclasses.replace(tokenizer.config, dtype=self.dtype))

    def encode(params, images):
      return module.apply({'params': params}, images.astype(np.float32) / 255.0, method='tokenize')

    self._encode = jax.jit(
      jax.shard_map(
        encode,
        mesh=mesh,
        in_specs=(everywhere.spec, self._split.spec),
        out_specs=self._split.spec,
        check_vma=False,
      )
    )

  def __call__(self, images: np.ndarray) -> Callable[[], np.ndarray]:
    """Begins to compute tokens.

    Args:
      images: uint8 [pictures, height, width, 3].

    Returns:
      A function that waits for the tokens, int32 [pictures, image_length].
    """
    found = []
    with numerics.fixed():
      for start in range(0, len(images), self._at_once):
        group = images[start : start + self._at_once]
        missing = self._at_once - len(group)
        if missing:
          group = np.concatenate([group, np.zeros((missing, *group.shape[1:]), group.dtype)])
        found.append(self._encode(self._params, jax.device_put(group, self._split)))
    return lambda: np.concatenate([np.asarray(tokens) for tokens in found])[: len(images)]
