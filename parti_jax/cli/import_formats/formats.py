"""What a format of public weights consists of, and what the user gives to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import preprocessing
from parti_jax.exported_model import sampling_settings
from parti_jax.importers import files
from parti_jax.importers import key_map

# Flags that only some formats take.
FLAGS = (
  'image_size',
  'pixel_range',
  'vocabulary',
  'config',
  'preprocessor',
  'activation',
  'text_length',
  'interpolate_with',
  'denoise_strength',
  'tokenizer',
  'text_normalizer',
  'start_token',
  'text_encoder',
  'heads',
)


@dataclasses.dataclass(frozen=True)
class Given:
  """What the user gives.

  Attributes:
    weights: the files of weights.
    file_format: the name of the format.
    flags: {name in FLAGS: its value, or None}.
    config: content of the weights' config file; None if there is none.
    preprocessor: content of their preprocessor_config.json; None if there is none.
    image_tokenizer: the image tokenizer that a generator belongs to; None of other parts.
  """

  weights: files.Weights
  file_format: str
  flags: Mapping[str, Any]
  config: Mapping[str, Any] | None = None
  preprocessor: Mapping[str, Any] | None = None
  image_tokenizer: ImageTokenizer | None = None

  @property
  def arrays(self) -> Mapping[str, key_map.StoredArray]:
    """{name: array in the files}."""
    return self.weights.arrays


class ImageTokenizer(NamedTuple):
  """The image tokenizer of a generator.

  Attributes:
    config: its config.
    params: its parameters, a tree of arrays that are read when they are used.
    origin: what a folder keeps about its origin, by keys as `model_folder.part_provenance` returns
      them.
    fingerprint: its fingerprint. That of a folder is the folder's, because stored parameters may be
      rounded.
  """

  config: Any
  params: Any
  origin: dict[str, Any]
  fingerprint: str


class TokenizerFile(NamedTuple):
  """A text tokenizer for a folder.

  Attributes:
    content: of its file.
    lower_case: whether texts become lower case before it sees them.
  """

  content: bytes
  lower_case: bool = False


class Tokenizer(NamedTuple):
  """The text tokenizer that belongs to the weights of a format.

  Attributes:
    files: the public files that may be given, for messages.
    read: makes a TokenizerFile from the path that is given, and from the rest that is.
    check: raises UserError unless an opened tokenizer fits a config.
    default: names what is read if no path is given, from the folder of the weights; None if a path
      has to be given.
  """

  files: str
  read: Callable[[str, Given], TokenizerFile]
  check: Callable[[text_tokenizer.TextTokenizer, Any], None]
  default: Callable[[str, Given], str] | None = None


class Format(NamedTuple):
  """How files of a format are read.

  Attributes:
    config_of: makes the network's config.
    key_map: says which arrays make which parameters, from the config.
    ignored: regular expressions of names that the network does not need.
    flags: names in FLAGS of the flags that the format takes.
    tokenizer: the network's text tokenizer; None if it has none.
    preprocessing: says how pictures become the network's input, from the config.
    config_file: name of the file that is read for `Given.config`, if it lies next to the weights.
    sampling: makes the default settings of `generate`, of a generator, from the config.
    origin: more that the folder keeps about the origin of the weights, from the config.
    others: parts of the parameters that come from elsewhere, from the config: {name: tree}.
    provenance: what the folder keeps about the origin of such parts, by keys as
      `model_folder.part_provenance` returns them.
    open: lists the arrays in the files.
    image_tokenizer: the format that the weights of a generator's image tokenizer have.
  """

  config_of: Callable[[Given], Any]
  key_map: Callable[[Given, Any], key_map.KeyMap]
  ignored: Callable[[Given], Iterable[str]]
  flags: tuple[str, ...] = ()
  tokenizer: Tokenizer | None = None
  preprocessing: Callable[[Given, Any], preprocessing.Preprocessing | None] = lambda *_: None
  config_file: str | None = None
  sampling: Callable[[Any], sampling_settings.SamplingSettings] = lambda _: (
    sampling_settings.SamplingSettings()
  )
  origin: Callable[[Given, Any], Mapping[str, Any]] = lambda *_: {}
  others: Callable[[Given, Any], Mapping[str, Any]] = lambda *_: {}
  provenance: Callable[[Given], Mapping[str, Any]] = lambda _: {}
  open: Callable[[Sequence[str]], files.Weights] = files.open_weights
  image_tokenizer: str | None = None


class Part(NamedTuple):
  """A part, named as in `model_folder.NETWORKS`.

  Attributes:
    formats: its formats by their names.
    described: describes a network for the user, from its config and its number of parameters.
    use: how the folder is used; {} stands for the folder.
  """

  formats: Mapping[str, Format]
  described: Callable[[Any, int], str]
  use: str


def check_size(tokenizer: text_tokenizer.TextTokenizer, config: Any, spare_rows: int = 0) -> None:
  """Checks the number of a text tokenizer's pieces.

  Args:
    tokenizer: the text tokenizer.
    config: config of the network.
    spare_rows: number of rows of the network's table of pieces that may have none.

  Raises:
    UserError: if the table has another number of rows.
  """
  if not config.text_vocabulary - spare_rows <= tokenizer.size <= config.text_vocabulary:
    raise of_another_network(tokenizer, config)


def of_another_network(tokenizer: text_tokenizer.TextTokenizer, config: Any) -> UserError:
  """Returns the error that a text tokenizer has another number of pieces than a network."""
  return UserError(
    f'{tokenizer.path} has {tokenizer.size} pieces, but the weights are of '
    f'{config.text_vocabulary}; it belongs to another network'
  )
