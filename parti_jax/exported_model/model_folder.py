"""A released model: one folder with its sizes, its parameters and its vocabulary.

```
config.json                   format version, sizes of the networks, sampling defaults, provenance
parti.safetensors             parameters of the text encoder and the image-token decoder
tokenizer.safetensors         parameters of the image tokenizer
vocabulary.model              SentencePiece vocabulary of the prompts
super_resolution.safetensors  parameters of the super-resolution network; may be absent
ranker.safetensors            parameters of the ranker; may be absent
```

NETWORKS is the table of the networks that there may be; config.json has the sizes of each under its
name. The metadata of a file of parameters says which vocabulary and which tokenizer its network was
trained with, see `parti_jax.core.fingerprints`, so that files of two models are never taken for one.
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
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary as vocabulary_lib
from parti_jax.exported_model import model_config
from parti_jax.exported_model import sampling_settings as settings_lib
from parti_jax.models import coca
from parti_jax.models import parti as parti_lib
from parti_jax.models import parti_config
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan

CONFIG_FILE = 'config.json'
VOCABULARY_FILE = 'vocabulary.model'


class Network(NamedTuple):
  """A network that a model folder may hold.

  Attributes:
    config: the dataclass of its sizes.
    module: makes the linen module from them.
    example_inputs: makes arrays that the module takes from them.
  """

  config: type
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]


# Every model has the required networks; of the optional ones, those that were exported with it.
REQUIRED = {
  'parti': Network(parti_config.PartiConfig, parti_lib.Parti, parti_lib.example_inputs),
  'tokenizer': Network(vit_vqgan.ViTVQGANConfig, vit_vqgan.ViTVQGAN, vit_vqgan.example_inputs),
}
OPTIONAL = {
  'super_resolution': Network(
    super_resolution.SuperResolutionConfig,
    super_resolution.SuperResolution,
    super_resolution.example_inputs,
  ),
  'ranker': Network(coca.CoCaConfig, coca.CoCa, coca.example_inputs),
}
NETWORKS = REQUIRED | OPTIONAL


def parameter_file(name: str) -> str:
  """The file with the parameters of a network in NETWORKS."""
  return f'{name}.safetensors'


FILES = (CONFIG_FILE, *map(parameter_file, REQUIRED), VOCABULARY_FILE)
STORED_DTYPES = model_config.STORED_DTYPES

# Names of parameters that an error shows.
_SHOWN = 5


class Part(NamedTuple):
  """A network of a model.

  Attributes:
    config: its sizes.
    params: its parameters, as those of `Model`.
    made_with: {kind: fingerprint} of the vocabulary and the tokenizer that it was trained with, as
      far as they are known; of a tokenizer its own.
  """

  config: Any
  params: Any
  made_with: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Model:
  """A model folder in memory.

  Attributes:
    parti_config: sizes of Parti.
    tokenizer_config: sizes of the image tokenizer.
    parti_params: parameters of Parti, a tree of float32 numpy arrays.
    tokenizer_params: parameters of the tokenizer, likewise.
    vocabulary_path: of the SentencePiece vocabulary.
    sampling: the settings that the model is meant to be sampled with.
    provenance: what it was trained on and for how long; any JSON.
    stored_as: name of the dtype that the parameters were stored as.
    parts: the optional networks that the model has, by their names in OPTIONAL.
    made_with: {name of a network: {kind: fingerprint}}, see `Part`, of all of them.
  """

  parti_config: parti_config.PartiConfig
  tokenizer_config: vit_vqgan.ViTVQGANConfig
  parti_params: Any
  tokenizer_params: Any
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
      'parti': (self.parti_config, self.parti_params),
      'tokenizer': (self.tokenizer_config, self.tokenizer_params),
    }
    return {
      name: Part(*part, self.made_with.get(name, {})) for name, part in required.items()
    } | self.parts


def save(
  folder,
  *,
  parti_config,
  parti_params,
  tokenizer_config,
  tokenizer_params,
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
  """Writes a model folder; it appears complete or not at all.

  Args:
    folder: to be made; a path or a URL, where config.json is uploaded last.
    parti_config: PartiConfig.
    parti_params: of Parti, with or without axis names.
    tokenizer_config: ViTVQGANConfig.
    tokenizer_params: of ViTVQGAN, with or without axis names.
    vocabulary_path: the SentencePiece vocabulary's file.
    parts: optional networks by their names in OPTIONAL, with or without axis names.
    sampling: defaults of `generate`.
    provenance: JSON: data, training steps, and whatever else tells where the model is from.
    dtype: what the parameters are stored as, a name in STORED_DTYPES.
    overwrite: whether a model that is there already may be replaced; other files in its folder
      are kept.
    made_with: {name of a network: {kind: fingerprint}} of the vocabulary and the tokenizer that it
      was trained with, where they are known; a tokenizer's own by default is that of its
      parameters.
    sources: {name of a network: where it is from}, for messages.
    allow_mismatch: whether a network may have been trained with another vocabulary or tokenizer
      than the model's; then it is noted in config.json, and `load` warns of it.

  Returns:
    The folder, a pathlib.Path, or the URL as it is.

  Raises:
    UserError: if the folder exists and may not be replaced, the parameters or the vocabulary do
      not fit the sizes, a network was trained with another vocabulary or tokenizer, a parameter is
      too large for the dtype, or nothing can be written.
  """
  folder = checks.text('folder', folder)
  folder = folder if storage.is_url(folder) else pathlib.Path(folder)
  _check_target(folder, overwrite)
  if dtype not in STORED_DTYPES:
    raise UserError(f'dtype={dtype!r} is not one of {", ".join(STORED_DTYPES)}')
  check_sizes(parti_config, tokenizer_config, 'the model to save')
  networks = {
    'parti': Part(parti_config, parti_params),
    'tokenizer': Part(tokenizer_config, tokenizer_params),
  } | (parts or {})
  known = _known(networks, made_with or {})
  mismatches = _mismatches(known, vocabulary_path, sources or {})
  if mismatches and not allow_mismatch:
    raise UserError(mismatches[0])
  stored = {
    name: _stored(part.params, abstract(name, part.config), dtype, parameter_file(name))
    for name, part in networks.items()
  }
  config = {
    'format_version': model_config.FORMAT_VERSION,
    **{name: dataclasses.asdict(part.config) for name, part in networks.items()},
    'sampling': dataclasses.asdict(sampling),
    'parameters': {
      'stored_as': dtype,
      **{name: sum(leaf.size for leaf in arrays.values()) for name, arrays in stored.items()},
    },
    'provenance': provenance or {},
  }
  if mismatches:
    config['mismatch_allowed'] = True
  filled = _uploaded_folder if storage.is_url(folder) else _replaced_folder
  with filled(folder) as temporary:
    for name, arrays in stored.items():
      safetensors.numpy.save_file(arrays, temporary / parameter_file(name), known[name] or None)
    with storage.local_copy(vocabulary_path) as vocabulary:
      shutil.copyfile(vocabulary, temporary / VOCABULARY_FILE)
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (temporary / CONFIG_FILE).write_text(text, encoding='utf-8')
  return folder


def load(folder) -> Model:
  """Reads a model folder.

  On a CPU the networks compute in float32, elsewhere in bfloat16, whatever they were trained in.

  Args:
    folder: as `save` wrote it; a path, or a URL, whose files are copied to a temporary folder that
      stays until the process ends.

  Raises:
    UserError: if the folder or a file of it is missing, unfinished, or of another format version,
      if a value in config.json can't be, if parameters are missing, unknown or of other shapes
      than the sizes say, or if a network was trained with another vocabulary or tokenizer.
  """
  folder = _local(folder, [*FILES, *map(parameter_file, OPTIONAL)])
  _check_complete(folder)
  where = folder / CONFIG_FILE
  config = model_config.read(where)
  optional = [
    name for name in OPTIONAL if name in config or (folder / parameter_file(name)).exists()
  ]
  _check_complete(folder, [parameter_file(name) for name in optional])
  sizes = {
    name: model_config.sizes(NETWORKS[name].config, config, name, _compute_dtype(), where)
    for name in [*REQUIRED, *optional]
  }
  check_sizes(sizes['parti'], sizes['tokenizer'], str(where))
  others = [
    read(config, where)
    for read in (model_config.sampling, model_config.provenance, model_config.stored_as)
  ]
  made_with = {name: _read_made_with(folder / parameter_file(name)) for name in sizes}
  vocabulary = folder / VOCABULARY_FILE
  allowed = model_config.mismatch_allowed(config, where)
  for line in _mismatches(made_with, vocabulary):
    if not allowed:
      raise UserError(f'{folder}: {line}')
    print(f'parti-jax: warning: {folder}: {line}', file=sys.stderr)
  parts = {
    name: Part(
      own, _read_parameters(folder / parameter_file(name), abstract(name, own)), made_with[name]
    )
    for name, own in sizes.items()
  }
  parti, tokenizer = (parts.pop(name) for name in REQUIRED)
  return Model(
    parti.config,
    tokenizer.config,
    parti.params,
    tokenizer.params,
    vocabulary,
    *others,
    parts,
    made_with,
  )


def load_tokenizer(folder) -> Part:
  """Reads the image tokenizer of a model folder and nothing else; see `load`."""
  folder = _local(folder, [CONFIG_FILE, parameter_file('tokenizer')])
  _check_complete(folder, [CONFIG_FILE, parameter_file('tokenizer')])
  where = folder / CONFIG_FILE
  sizes = model_config.sizes(
    vit_vqgan.ViTVQGANConfig, model_config.read(where), 'tokenizer', _compute_dtype(), where
  )
  file = folder / parameter_file('tokenizer')
  return Part(sizes, _read_parameters(file, abstract('tokenizer', sizes)), _read_made_with(file))


def _local(folder, names: list[str]) -> pathlib.Path:
  """The folder, or a copy of these of its files where it is a URL."""
  folder = checks.text('folder', folder)
  if storage.is_url(folder):
    if CONFIG_FILE not in storage.names(folder):
      raise UserError(f'{folder} is no model folder: it has no {CONFIG_FILE}')
    folder = storage.local_folder(folder, names)
  return pathlib.Path(folder)


def _compute_dtype() -> str:
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


@functools.cache
@numerics.fixed()
def abstract(name: str, config):
  """Shapes of a network's parameters with their logical axis names; nothing is computed.

  Args:
    name: of the network, in NETWORKS.
    config: its sizes.
  """
  network = NETWORKS[name]
  rng = jax.eval_shape(lambda: jax.random.key(0))
  inputs = jax.eval_shape(lambda: network.example_inputs(config))
  return jax.eval_shape(network.module(config).init, rng, *inputs)['params']


def _flat(tree) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nn.meta.unbox(tree), sep='/')


def _stored(params, expected, dtype: str, file: str) -> dict[str, np.ndarray]:
  """Checked parameters by their paths, as they are stored."""
  params = {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
  _check_shapes({path: leaf.shape for path, leaf in params.items()}, _flat(expected), file)
  stored = {}
  for path, leaf in params.items():
    with np.errstate(over='ignore'):
      stored[path] = leaf.astype(STORED_DTYPES[dtype], order='C')
    if not np.all(np.isfinite(stored[path].astype(np.float32))):
      raise UserError(
        f'{file}: the parameter {path} has values that are not finite as {dtype}; '
        'store the model as float32, or look whether its training diverged'
      )
  return stored


def _check_shapes(shapes: dict[str, tuple[int, ...]], expected, file):
  """Raises UserError unless parameters are there with the shapes that the sizes say."""
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
  """A tree of float32 arrays, checked against the shapes of the network."""
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
  """The fingerprints that are known of each network, with that of the tokenizer."""
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
  """A sentence for each network that was made with another vocabulary or tokenizer.

  Args:
    made_with: {name of a network: {kind: fingerprint}}.
    vocabulary: the model's SentencePiece file.
    sources: as in `save`.
  """

  def full_name(network: str) -> str:
    names = {'parti': 'generator', 'super_resolution': 'super-resolution network'}
    return f'the {names.get(network, network)} {sources.get(network, "")}'.strip()

  try:
    content = storage.read(vocabulary, vocabulary_lib.LARGEST_MODEL)
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
    'one and train on these tokens',
  }
  return [
    line
    for name, kept in made_with.items()
    for line in fingerprints.mismatches(fingerprints.named(full_name(name), kept), given, remedies)
  ]


def _read_made_with(path: pathlib.Path) -> dict[str, str]:
  """The fingerprints in the metadata of a file of parameters; none in files of before."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return {kind: metadata[kind] for kind in fingerprints.KINDS if kind in metadata}


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  return UserError(f'{path} is damaged or unfinished ({error}); export or download the model again')


def _check_complete(folder: pathlib.Path, files=FILES):
  if not folder.is_dir():
    raise UserError(f'there is no model folder {folder}')
  missing = [name for name in files if not (folder / name).is_file()]
  if missing == list(FILES):
    raise UserError(f'{folder} is no model folder: it has none of {", ".join(FILES)}')
  if missing:
    raise UserError(
      f'the model folder {folder} is unfinished: {", ".join(missing)} missing; '
      'export or download the model again'
    )


def check_sizes(parti, tokenizer, where: str):
  """Raises UserError unless Parti's image tokens are those of the tokenizer."""
  for name in ('codebook_size', 'grid'):
    ours, theirs = getattr(parti, name), getattr(tokenizer, name)
    if ours != theirs:
      raise UserError(
        f'{where}: parti.{name} is {ours}, but that of the tokenizer is {theirs}; '
        'the generator was trained on the tokens of another tokenizer'
      )


def _check_target(folder: pathlib.Path | str, overwrite: bool):
  if not (storage.exists(folder) or os.path.lexists(folder)):
    return
  if not storage.exists(storage.join(folder, CONFIG_FILE)):
    raise UserError(f'{folder} exists and is no model folder; name another folder')
  if not overwrite:
    raise UserError(f'the model folder {folder} exists; name another one, or allow to overwrite it')


@contextlib.contextmanager
def _uploaded_folder(url: str):
  """A temporary folder whose files go to a URL once it is filled; without config.json it's none."""
  with tempfile.TemporaryDirectory(prefix='parti_jax_model_') as temporary:
    yield pathlib.Path(temporary)
    ours = {*FILES, *map(parameter_file, OPTIONAL)} & set(storage.names(url))
    for name in sorted(ours, key=lambda name: name != CONFIG_FILE):
      storage.remove(storage.join(url, name))
    for name in sorted(os.listdir(temporary), key=lambda name: name == CONFIG_FILE):
      storage.upload(os.path.join(temporary, name), storage.join(url, name))


@contextlib.contextmanager
def _replaced_folder(folder: pathlib.Path):
  """A temporary folder that takes the place of `folder` once it is filled."""
  temporary = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
  try:
    temporary.mkdir(parents=True)
    yield temporary
    old = folder.with_name(f'{temporary.name}.old')
    if folder.exists():
      ours = {*FILES, *map(parameter_file, OPTIONAL)}
      for other in set(os.listdir(folder)) - ours:
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
