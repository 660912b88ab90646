"""Reads and writes a model folder: the configs, parameters and vocabulary of a released model.

```
config.json                   format version, network configs, sampling defaults, provenance
generator.safetensors         parameters of the text encoder and the image-token decoder
tokenizer.safetensors         parameters of the image tokenizer
vocabulary.model              SentencePiece vocabulary of the prompts
super_resolution.safetensors  parameters of the super-resolution network; optional
ranker.safetensors            parameters of the ranker; optional
```

NETWORKS lists the networks that a folder may have; config.json has the config of each under its
name. Version 1 of the format called the generator 'parti'. The metadata of a parameter file has
fingerprints (`parti_jax.core.fingerprints`) of the vocabulary and the tokenizer that its network was
trained with, so that files of two models are never mixed up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import file_names
from parti_jax.exported_model import model_config
from parti_jax.exported_model import sampling_settings as settings_lib
from parti_jax.models import coca
from parti_jax.models import image_tokenizers
from parti_jax.models import parti as parti_lib
from parti_jax.models import parti_config
from parti_jax.models import super_resolution

CONFIG_FILE = file_names.CONFIG_FILE
VOCABULARY_FILE = file_names.VOCABULARY_FILE
parameter_file = file_names.parameter_file


class Network(NamedTuple):
  """A network that a model folder may hold.

  Attributes:
    kinds: the dataclasses of the network's configs by the names of their kinds in config.json.
      Without a name there, the first one is meant.
    module: makes the linen module from a config.
    example_inputs: makes example inputs of the module from a config.
  """

  kinds: Mapping[str, type]
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]


# A model has all required networks, and the optional ones that were exported with it.
REQUIRED = {
  'generator': Network(
    {'parti': parti_config.PartiConfig}, parti_lib.Parti, parti_lib.example_inputs
  ),
  'tokenizer': Network(
    image_tokenizers.CONFIGS,
    image_tokenizers.module,
    image_tokenizers.example_inputs,
  ),
}
OPTIONAL = {
  'super_resolution': Network(
    {'super_resolution': super_resolution.SuperResolutionConfig},
    super_resolution.SuperResolution,
    super_resolution.example_inputs,
  ),
  'ranker': Network({'coca': coca.CoCaConfig}, coca.CoCa, coca.example_inputs),
}
NETWORKS = REQUIRED | OPTIONAL

FILES = (CONFIG_FILE, *map(parameter_file, REQUIRED), VOCABULARY_FILE)
# Includes the files of models of version 1 of the format.
_ALL_FILES = (*FILES, *map(parameter_file, [*OPTIONAL, 'parti']))
STORED_DTYPES = model_config.STORED_DTYPES

# Maximum number of parameter names in an error message.
_SHOWN = 5


class Part(NamedTuple):
  """A network of a model.

  Attributes:
    config: its config.
    params: its parameters, in the form of `Model`'s.
    made_with: {kind: fingerprint} of the vocabulary and the tokenizer that it was trained with, if
      known; a tokenizer has its own fingerprint here.
  """

  config: Any
  params: Any
  made_with: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Model:
  """A model folder in memory.

  Attributes:
    generator_config: config of Parti.
    tokenizer_config: config of the image tokenizer.
    generator_params: parameters of Parti, a tree of float32 NumPy arrays.
    tokenizer_params: parameters of the tokenizer, a tree of float32 NumPy arrays.
    vocabulary_path: path of the SentencePiece vocabulary.
    sampling: default sampling settings.
    provenance: JSON about the training, such as the data and the number of steps.
    stored_as: name of the dtype of the stored parameters.
    parts: the optional networks of the model, by their names in OPTIONAL.
    made_with: {name of a network: {kind: fingerprint}} for all networks, with `Part.made_with` of
      each.
  """

  generator_config: parti_config.PartiConfig
  tokenizer_config: image_tokenizers.Config
  generator_params: dict[str, Any]
  tokenizer_params: dict[str, Any]
  vocabulary_path: pathlib.Path
  sampling: settings_lib.SamplingSettings
  provenance: dict[str, Any]
  stored_as: str
  parts: dict[str, Part]
  made_with: dict[str, dict[str, str]]

  @property
  def networks(self) -> dict[str, Part]:
    """All networks of the model by their names in NETWORKS."""
    required = {
      'generator': (self.generator_config, self.generator_params),
      'tokenizer': (self.tokenizer_config, self.tokenizer_params),
    }
    return {
      name: Part(*part, self.made_with.get(name, {})) for name, part in required.items()
    } | self.parts


def save(
  folder,
  *,
  generator_config: parti_config.PartiConfig,
  generator_params: PyTree,
  tokenizer_config: image_tokenizers.Config,
  tokenizer_params: PyTree,
  vocabulary_path,
  parts: dict[str, Part] | None = None,
  sampling: settings_lib.SamplingSettings = settings_lib.SamplingSettings(),  # noqa: B008
  provenance: dict[str, Any] | None = None,
  dtype: str = 'float16',
  overwrite: bool = False,
  made_with: Mapping[str, Mapping[str, str | None]] | None = None,
  sources: Mapping[str, str] | None = None,
  allow_mismatch: bool = False,
):
  """Writes a model folder atomically: it appears complete or not at all.

  Args:
    folder: the folder to create, a path or a URL. At a URL, config.json is uploaded last.
    generator_config: config of Parti.
    generator_params: parameters of Parti, with or without axis names.
    tokenizer_config: config of the image tokenizer.
    tokenizer_params: parameters of the tokenizer, with or without axis names.
    vocabulary_path: path of the SentencePiece vocabulary.
    parts: optional networks by their names in OPTIONAL, with or without axis names.
    sampling: default settings of `generate`.
    provenance: JSON about the model's origin, such as data and training steps.
    dtype: dtype in which to store the parameters, a name in STORED_DTYPES.
    overwrite: whether to replace an existing model; other files in its folder are kept.
    made_with: {name of a network: {kind: fingerprint}} of the vocabulary and the tokenizer that it
      was trained with, if known. A tokenizer's own fingerprint is by default computed from its
      parameters.
    sources: {name of a network: its origin}, for messages.
    allow_mismatch: whether to allow networks that were trained with another vocabulary or
      tokenizer than the model's; config.json then records it, and `load` warns about it.

  Returns:
    The folder, a pathlib.Path, or the unchanged URL.

  Raises:
    UserError: if the folder exists and may not be replaced, the parameters or the vocabulary don't
      fit the configs, a network was trained with another vocabulary or tokenizer, a parameter is
      too large for the dtype, or the folder can't be written.
  """
  folder = _checked(folder, overwrite, dtype)
  check_sizes(generator_config, tokenizer_config, 'the model to save')
  networks = {
    'generator': Part(generator_config, generator_params),
    'tokenizer': Part(tokenizer_config, tokenizer_params),
  } | (parts or {})
  known = _known(networks, made_with or {})
  mismatches = _mismatches(known, vocabulary_path, sources or {})
  if mismatches and not allow_mismatch:
    raise UserError(mismatches[0])
  entries: dict[str, Any] = {
    'sampling': dataclasses.asdict(sampling),
    'provenance': provenance or {},
  }
  if mismatches:
    entries['mismatch_allowed'] = True
  return _write(folder, networks, known, entries, dtype, vocabulary_path)


def save_tokenizer(
  folder,
  config: image_tokenizers.Config,
  params: PyTree,
  provenance: dict[str, Any],
  *,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> pathlib.Path | str:
  """Writes a folder with an image tokenizer alone, for `load_tokenizer`; arguments as `save`.

  Raises:
    UserError: as `save`.
  """
  folder = _checked(folder, overwrite, dtype)
  networks = {'tokenizer': Part(config, params)}
  return _write(folder, networks, _known(networks, {}), {'provenance': provenance}, dtype)


def _checked(folder, overwrite: bool, dtype: str) -> pathlib.Path | str:
  """Returns the folder to write, a URL or a path, once it and the dtype are checked."""
  folder = checks.text('folder', folder)
  folder = folder if storage.is_url(folder) else pathlib.Path(folder)
  check_target(folder, overwrite)
  if dtype not in STORED_DTYPES:
    raise UserError(f'dtype={dtype!r} is not one of {", ".join(STORED_DTYPES)}')
  return folder


def _write(
  folder: pathlib.Path | str,
  networks: Mapping[str, Part],
  known: Mapping[str, dict[str, str]],
  entries: Mapping[str, Any],
  dtype: str,
  vocabulary_path=None,
) -> pathlib.Path | str:
  """Writes a folder with networks, their fingerprints, and further entries of config.json."""
  stored = {
    name: _stored(part.params, abstract(name, part.config), dtype, parameter_file(name))
    for name, part in networks.items()
  }
  config = {
    'format_version': model_config.FORMAT_VERSION,
    **{
      name: model_config.entry(NETWORKS[name].kinds, part.config) for name, part in networks.items()
    },
    'parameters': {
      'stored_as': dtype,
      **{name: sum(leaf.size for leaf in arrays.values()) for name, arrays in stored.items()},
    },
    **entries,
  }
  filled = (
    _replaced_folder(folder) if isinstance(folder, pathlib.Path) else _uploaded_folder(folder)
  )
  with filled as temporary:
    for name, arrays in stored.items():
      safetensors.numpy.save_file(arrays, temporary / parameter_file(name), known[name] or None)
    if vocabulary_path is not None:
      with storage.local_copy(vocabulary_path) as vocabulary:
        shutil.copyfile(vocabulary, temporary / VOCABULARY_FILE)
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (temporary / CONFIG_FILE).write_text(text, encoding='utf-8')
  return folder


def load(folder) -> Model:
  """Reads a model folder.

  The networks compute in float32 on a CPU and in bfloat16 elsewhere, regardless of the dtype they
  were trained in.

  Args:
    folder: a folder that `save` wrote, a path or a URL. The files at a URL are copied to a
      temporary folder that stays until the process ends.

  Raises:
    UserError: if the folder or one of its files is missing, unfinished, or has another format
      version, if a value in config.json is invalid, if parameters are missing, unknown or have
      other shapes than the configs imply, or if a network was trained with another vocabulary or
      tokenizer.
  """
  folder = _local(folder, list(_ALL_FILES))
  _check_complete(folder, [CONFIG_FILE])
  where = folder / CONFIG_FILE
  config = model_config.read(where)
  optional = [
    name for name in OPTIONAL if name in config or (folder / parameter_file(name)).exists()
  ]
  stored = {name: file_names.stored_name(name, config) for name in [*REQUIRED, *optional]}
  paths = {name: folder / parameter_file(own) for name, own in stored.items()}
  _check_complete(folder, [*(path.name for path in paths.values()), VOCABULARY_FILE])
  sizes = {
    name: model_config.sizes(NETWORKS[name].kinds, config, own, _compute_dtype(), where)
    for name, own in stored.items()
  }
  check_sizes(sizes['generator'], sizes['tokenizer'], str(where))
  sampling = model_config.sampling(config, where)
  provenance = model_config.provenance(config, where)
  stored_as = model_config.stored_as(config, where)
  made_with = {name: _read_made_with(path) for name, path in paths.items()}
  vocabulary = folder / VOCABULARY_FILE
  allowed = model_config.mismatch_allowed(config, where)
  for line in _mismatches(made_with, vocabulary):
    if not allowed:
      raise UserError(f'{folder}: {line}')
    print(f'parti-jax: warning: {folder}: {line}', file=sys.stderr)
  parts = {
    name: Part(own, _read_parameters(paths[name], abstract(name, own)), made_with[name])
    for name, own in sizes.items()
  }
  generator, tokenizer = (parts.pop(name) for name in REQUIRED)
  return Model(
    generator.config,
    tokenizer.config,
    generator.params,
    tokenizer.params,
    vocabulary,
    sampling,
    provenance,
    stored_as,
    parts,
    made_with,
  )


def load_tokenizer(folder) -> Part:
  """Reads only the image tokenizer of a model folder, under the same conditions as `load`."""
  folder = _local(folder, [CONFIG_FILE, parameter_file('tokenizer')])
  _check_complete(folder, [CONFIG_FILE, parameter_file('tokenizer')])
  where = folder / CONFIG_FILE
  sizes = model_config.sizes(
    NETWORKS['tokenizer'].kinds, model_config.read(where), 'tokenizer', _compute_dtype(), where
  )
  file = folder / parameter_file('tokenizer')
  return Part(sizes, _read_parameters(file, abstract('tokenizer', sizes)), _read_made_with(file))


def tokenizer_provenance(folder) -> dict[str, Any]:
  """Returns what config.json says about the origin of a folder's tokenizer."""
  where = _local(folder, [CONFIG_FILE]) / CONFIG_FILE
  found = model_config.provenance(model_config.read(where), where)
  return {name: value for name, value in found.items() if name.startswith('tokenizer')}


def _local(folder, names: list[str]) -> pathlib.Path:
  """Returns the folder; for a URL, a local copy with the files in `names`."""
  folder = checks.text('folder', folder)
  if storage.is_url(folder):
    if CONFIG_FILE not in storage.names(folder):
      raise UserError(f"{folder} isn't a model folder: it has no {CONFIG_FILE}")
    folder = storage.local_folder(folder, names)
  return pathlib.Path(folder)


def _compute_dtype() -> str:
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


@functools.cache
@numerics.fixed()
def abstract(name: str, config: Any) -> PyTree:
  """Returns abstract parameters of a network with their logical axis names; computes nothing.

  Args:
    name: the network's name in NETWORKS.
    config: the network's config.
  """
  network = NETWORKS[name]
  rng = jax.eval_shape(lambda: jax.random.key(0))
  inputs = jax.eval_shape(lambda: network.example_inputs(config))
  return jax.eval_shape(network.module(config).init, rng, *inputs)['params']


def _flat(tree) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nn.meta.unbox(tree), sep='/')


def _stored(params, expected, dtype: str, file: str) -> dict[str, np.ndarray]:
  """Checks parameters and returns {path: array in the stored dtype}."""
  params = {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
  _check_shapes({path: leaf.shape for path, leaf in params.items()}, _flat(expected), file)
  stored = {}
  for path, leaf in params.items():
    with np.errstate(over='ignore'):
      stored[path] = leaf.astype(STORED_DTYPES[dtype], order='C')
    if not np.all(np.isfinite(stored[path].astype(np.float32))):
      raise UserError(
        f'{file}: the parameter {path} has values that are not finite as {dtype}; '
        'store the model as float32, or check whether its training diverged'
      )
  return stored


def _check_shapes(shapes: dict[str, tuple[int, ...]], expected, file):
  """Raises UserError unless all expected parameters exist and have the expected shapes."""
  problems = [f'{path} is missing' for path in expected if path not in shapes]
  problems += [f'{path} is not part of the network' for path in shapes if path not in expected]
  problems += [
    f'{path} is {list(shapes[path])} instead of {list(leaf.shape)}'
    for path, leaf in expected.items()
    if path in shapes and tuple(shapes[path]) != tuple(leaf.shape)
  ]
  if problems:
    more = f', and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
    raise UserError(
      f'{file} does not fit the sizes in {CONFIG_FILE}: {"; ".join(problems[:_SHOWN])}{more}'
    )


def _read_parameters(path: pathlib.Path, expected):
  """Reads a tree of float32 arrays and checks it against the shapes of the network."""
  arrays = {}
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
      _check_shapes(shapes, _flat(expected), path)
      for name in shapes:
        arrays[name] = file.get_tensor(name).astype(np.float32)
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return flax.traverse_util.unflatten_dict(arrays, sep='/')


def _known(networks: Mapping[str, Part], made_with: Mapping) -> dict[str, dict[str, str]]:
  """Returns the known fingerprints of each network, including the tokenizer's own."""
  known = {
    name: {kind: value for kind, value in made_with.get(name, {}).items() if value}
    for name in networks
  }
  if 'tokenizer' not in known['tokenizer']:
    params = nn.meta.unbox(networks['tokenizer'].params)
    known['tokenizer'] = {'tokenizer': fingerprints.of_tokenizer(params)}
  return known


def _mismatches(
  made_with: Mapping[str, Mapping[str, str]], vocabulary, sources: Mapping[str, str] = {}
) -> list[str]:
  """Returns a sentence for each network that was trained with another vocabulary or tokenizer.

  Args:
    made_with: {name of a network: {kind: fingerprint}}.
    vocabulary: the model's SentencePiece file.
    sources: {name of a network: its origin}.
  """

  def full_name(network: str) -> str:
    name = 'super-resolution network' if network == 'super_resolution' else network
    return f'the {name} {sources.get(network, "")}'.strip()

  try:
    content = storage.read(vocabulary, text_tokenizer.LARGEST_FILE)
  except OSError as error:
    raise UserError(
      f'the vocabulary {vocabulary} cannot be read ({error.strerror or error})'
    ) from error
  given = fingerprints.named(full_name('tokenizer'), made_with['tokenizer']) | fingerprints.named(
    f'the vocabulary {vocabulary}', {'vocabulary': fingerprints.of_vocabulary(content)}
  )
  remedies = {
    'vocabulary': 'give the vocabulary that it was trained with',
    'tokenizer': 'give the tokenizer that it was trained with, or tokenize the pictures with this '
    'tokenizer and train on these tokens',
  }
  return [
    line
    for name, kept in made_with.items()
    for line in fingerprints.mismatches(fingerprints.named(full_name(name), kept), given, remedies)
  ]


def _read_made_with(path: pathlib.Path) -> dict[str, str]:
  """Reads the fingerprints in a parameter file's metadata; files of older versions have none."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return {kind: metadata[kind] for kind in fingerprints.KINDS if kind in metadata}


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  return UserError(f'{path} is damaged or unfinished ({error}); export or download the model again')


def _check_complete(folder: pathlib.Path, files: Iterable[str]):
  """Raises UserError unless the folder and these files exist."""
  if not folder.is_dir():
    raise UserError(f'the model folder {folder} does not exist')
  if not any((folder / name).is_file() for name in _ALL_FILES):
    raise UserError(f"{folder} isn't a model folder: it has none of {', '.join(FILES)}")
  missing = [name for name in files if not (folder / name).is_file()]
  if missing:
    raise UserError(
      f'the model folder {folder} is unfinished: {", ".join(missing)} missing; '
      'export or download the model again'
    )


def check_sizes(
  generator: parti_config.PartiConfig, tokenizer: image_tokenizers.Config, where: str
):
  """Raises UserError unless the generator's codebook size and grid match the tokenizer's."""
  for name in ('codebook_size', 'grid'):
    ours, theirs = getattr(generator, name), getattr(tokenizer, name)
    if ours != theirs:
      raise UserError(
        f"{where}: the generator's {name} is {ours}, but the tokenizer's is {theirs}; "
        'the generator was trained on the tokens of another tokenizer'
      )


def check_target(folder: pathlib.Path | str, overwrite: bool):
  """Raises UserError if a folder exists and may not be replaced."""
  if not (storage.exists(folder) or os.path.lexists(folder)):
    return
  if not storage.exists(storage.join(folder, CONFIG_FILE)):
    raise UserError(f"{folder} exists and isn't a model folder; choose another folder")
  if not overwrite:
    raise UserError(f'the model folder {folder} exists; choose another one, or allow overwriting')


@contextlib.contextmanager
def _uploaded_folder(url: str):
  """Yields a temporary folder and uploads its files to a URL afterwards, config.json last."""
  with tempfile.TemporaryDirectory(prefix='parti_jax_model_') as temporary:
    yield pathlib.Path(temporary)
    ours = set(_ALL_FILES) & set(storage.names(url))
    for name in sorted(ours, key=lambda name: name != CONFIG_FILE):
      storage.remove(storage.join(url, name))
    for name in sorted(os.listdir(temporary), key=lambda name: name == CONFIG_FILE):
      storage.upload(os.path.join(temporary, name), storage.join(url, name))


@contextlib.contextmanager
def _replaced_folder(folder: pathlib.Path):
  """Yields a temporary folder that replaces `folder` afterwards."""
  temporary = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
  try:
    temporary.mkdir(parents=True)
    yield temporary
    old = folder.with_name(f'{temporary.name}.old')
    if folder.exists():
      for other in set(os.listdir(folder)) - set(_ALL_FILES):
        copy = shutil.copytree if (folder / other).is_dir() else shutil.copy2
        copy(folder / other, temporary / other)
      os.replace(folder, old)
    try:
      os.replace(temporary, folder)
    except OSError:
      if old.exists():
        os.replace(old, folder)
      raise
    shutil.rmtree(old, ignore_errors=True)
  except OSError as error:
    raise UserError(f'the model folder {folder} cannot be written: {error}') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
