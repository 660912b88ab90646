"""Chooses XLA's compiler options for a training step."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import gin
import jax

from parti_jax.core import errors

Options = dict[str, bool | int | float | str]

# 512-bit vectors rather than LLVM's default of 256.
CPU: Options = {'xla_cpu_prefer_vector_width': 512}
# Without this, XLA turns products with gathered parameters into loops that add up partial products
# in the main memory, to overlap them with the network. At Parti's sizes memory is the scarcer one.
TPU: Options = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000}

# Named alternatives, which `parti-jax plan --search` tries on the best candidate.
TPU_ALTERNATIVES: dict[str, Options] = {
  "XLA's defaults": {},
  'more on-chip memory for a fusion': {**TPU, 'xla_tpu_scoped_vmem_limit_kib': 65536},
  'collectives apart': {**TPU, 'xla_jf_crs_combiner_threshold_count': 1},
}


@gin.configurable
def compiler_options(
  platform: str,
  cpu: Mapping[str, Any] | None = None,
  gpu: Mapping[str, Any] | None = None,
  tpu: Mapping[str, Any] | None = None,
) -> Options:
  """Returns XLA's options for the training step of a platform.

  Gin may replace those of a platform: `--gin.compiler_options.tpu="{'xla_...': 1}"`; `{}` stands for
  XLA's defaults.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.
    cpu: options on CPUs; None for those of this package.
    gpu: options on GPUs; None for XLA's defaults.
    tpu: options on TPUs; None for those of this package.

  Raises:
    UserError: if an option isn't a name with a bool, a number or a string.
  """
  given = {'cpu': cpu, 'gpu': gpu, 'tpu': tpu}.get(platform)
  if given is None:
    return dict({'cpu': CPU, 'tpu': TPU}.get(platform, {}))
  if not isinstance(given, Mapping):
    raise errors.UserError(
      f'compiler_options.{platform}={given!r}: give a dict, such as '
      "{'xla_cpu_prefer_vector_width': 256}"
    )
  for name, value in given.items():
    if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
      raise errors.UserError(
        f'compiler_options.{platform}: {name!r}: {value!r} must be the name of an option and a '
        'bool, a number or a string'
      )
  return dict(given)


def text(options: Mapping[str, Any]) -> str:
  """Returns options as one line."""
  return ', '.join(f'{name}={value}' for name, value in options.items()) or "XLA's defaults"


@contextlib.contextmanager
def checked() -> Iterator[None]:
  """Raises UserError if XLA refuses an option while it compiles a program in the body."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    found = re.search('(No such compile option|While setting option).*', str(error))
    if found is None:
      raise
    raise errors.UserError(
      f'compiler_options: XLA says: {found.group()}; correct or remove it in gin'
    ) from error
