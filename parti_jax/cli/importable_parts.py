"""The parts whose public weights `parti-jax import` reads, and how files of each format are read.

PARTS is the table of them. A new part or format is one entry.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import flax.traverse_util

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import class_tokenizer
from parti_jax.data import text_tokenizer
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.exported_model import preprocessing
from parti_jax.exported_model import sampling_settings
from parti_jax.importers import clip
from parti_jax.importers import dalle_mini
from parti_jax.importers import enhancing_vit_vqgan
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import llamagen
from parti_jax.importers import min_dalle
from parti_jax.importers import real_esrgan
from parti_jax.importers import siglip
from parti_jax.importers import t5
from parti_jax.importers import tokenizer_files
from parti_jax.importers import vqgan
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import text_encoders
from parti_jax.sampling import ranking

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
# Share of the first file in an interpolation; the default of Real-ESRGAN's script.
DENOISE_STRENGTH = 0.5
# Id of the unknown piece in Gemma's SentencePiece model; in other models it is 2.
_GEMMA_UNKNOWN = 3
# Rows of T5's and DALL·E mini's tables of pieces beyond their vocabularies.
_T5_SPARE_ROWS = _DALLE_MINI_SPARE_ROWS = 128
# What is done to DALL·E mini's texts unless --text_normalizer says otherwise.
TEXT_NORMALIZER = 'min_dalle'


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


def find(args: argparse.Namespace) -> Format:
  """Returns the format that the flags name.

  Raises:
    UserError: if the format is of another part, or a flag doesn't apply to it.
  """
  formats, name = PARTS[args.part].formats, args.part.replace('_', ' ')
  if args.format not in formats:
    raise UserError(
      f'--format={args.format} is not a format of a {name}: choose from {", ".join(formats)}'
    )
  found = formats[args.format]
  for flag in FLAGS:
    if getattr(args, flag) is not None and flag not in found.flags:
      raise UserError(f'--{flag} does not apply to --format={args.format}')
  if found.tokenizer and found.tokenizer.default is None and args.vocabulary is None:
    raise UserError(
      f"--vocabulary is required: the file of the {name}'s text tokenizer, {found.tokenizer.files}"
    )
  if 'tokenizer' in found.flags and args.tokenizer is None:
    raise UserError(
      "--tokenizer is required: the generator's image tokenizer, a folder that `parti-jax import "
      f'tokenizer` wrote, or its weights of the format {found.image_tokenizer}'
    )
  return found


def open_files(args: argparse.Namespace, found: Format) -> Given:
  """Opens the files that the flags name.

  Raises:
    UserError: if a file is missing, damaged or of another format.
  """
  weights = found.open(args.files)
  if args.interpolate_with is not None:
    share = DENOISE_STRENGTH if args.denoise_strength is None else args.denoise_strength
    if not 0 <= share <= 1:
      raise UserError(f'--denoise_strength={share} must lie in [0, 1]')
    weights = files.interpolated(weights, files.open_weights([args.interpolate_with]), share)
  elif args.denoise_strength is not None:
    raise UserError('--denoise_strength needs --interpolate_with=FILE, the weights for 0')
  config = _json_file(args.config, found.config_file, weights)
  name = 'preprocessor_config.json' if 'preprocessor' in found.flags else None
  preprocessor = _json_file(args.preprocessor, name, weights)
  flags = {flag: getattr(args, flag) for flag in FLAGS}
  given = Given(weights, args.format, flags, config, preprocessor)
  if args.tokenizer is None:
    return given
  return dataclasses.replace(given, image_tokenizer=_image_tokenizer(args.tokenizer, found, given))


def _image_tokenizer(path: str, found: Format, generator: Given) -> ImageTokenizer:
  """Opens the image tokenizer of a generator: of our folder, or weights of its format."""
  if storage.exists(storage.join(path, model_folder.parameter_file('tokenizer'))):
    if generator.flags['image_size'] is not None:
      raise UserError(f'--image_size is for weights; {path} says it for itself')
    part = model_folder.load_part('tokenizer', path)
    origin = model_folder.part_provenance('tokenizer', path)
    fingerprint = part.made_with.get('tokenizer') or _fingerprint(part.config, part.params)
    return ImageTokenizer(part.config, part.params, origin, fingerprint)
  storage.check_local(path)
  assert found.image_tokenizer is not None
  weights = files.open_weights([path])
  given = dataclasses.replace(
    generator, weights=weights, file_format=found.image_tokenizer, config=None
  )
  network = opened('tokenizer', PARTS['tokenizer'].formats[given.file_format], given)
  params, origin = network.params(), {'tokenizer': origin_of(given)}
  return ImageTokenizer(network.config, params, origin, _fingerprint(network.config, params))


def _fingerprint(config: Any, params: Any) -> str:
  return fingerprints.of_tokenizer(params, image_tokenizers.token_settings(config))


class Opened(NamedTuple):
  """A network in files of weights, of which the names and shapes of all arrays are checked.

  Attributes:
    config: its config.
    sources: {path of a parameter: the arrays that make it}.
    stored: {name: array in the files}.
    size: number of values of its parameters.
    others: the result of `Format.others`.
  """

  config: Any
  sources: key_map.KeyMap
  stored: Mapping[str, key_map.StoredArray]
  size: int
  others: Mapping[str, Any] = {}

  def params(self, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Returns the tree of parameters, each of which is read when it is used.

    Memory then holds one at a time.

    Args:
      progress: is called when a parameter has been read.
    """
    found = key_map.convert(self.sources, self.stored, progress)
    return flax.traverse_util.unflatten_dict(found, sep='/') | dict(self.others)


def opened(part: str, found: Format, given: Given) -> Opened:
  """Finds a network in files of weights.

  Args:
    part: its name in `model_folder.NETWORKS`.
    found: the format of the files.
    given: the files.

  Raises:
    UserError: if the files don't hold such a network, naming what is missing or left over.
  """
  config = found.config_of(given)
  sources = found.key_map(given, config)
  shapes = parameter_files.shapes(model_folder.abstract(part, config))
  where, others = ', '.join(map(str, given.weights.files)), found.others(given, config)
  own = {path: shape for path, shape in shapes.items() if path.partition('/')[0] not in others}
  key_map.check(sources, given.arrays, own, where, tuple(found.ignored(given)))
  count = sum(map(math.prod, shapes.values()))
  return Opened(config, sources, given.arrays, count, others)


def origin_of(given: Given) -> dict[str, Any]:
  """Returns what a folder keeps about files of weights."""
  return {
    'format': given.file_format,
    'files': [os.path.basename(file) for file in given.weights.files],
    'sha256': given.weights.digest(),
  }


def _json_file(
  path: str | None, name: str | None, weights: files.Weights
) -> Mapping[str, Any] | None:
  """Reads a JSON file: the given one, or the one of this name next to the weights."""
  if path is None and name is not None:
    path = os.path.join(os.path.dirname(weights.files[0]), name)
    if not os.path.isfile(path):
      return None
    print(f'parti-jax: using {path}', file=sys.stderr)
  if path is None:
    return None
  try:
    found = storage.read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error})') from error
  if not isinstance(found, dict):
    raise UserError(f'{path} is {checks.shown_as_json(found)} instead of a JSON object')
  return found


def _vqgan_config(given: Given):
  size, pixel_range = given.flags['image_size'], given.flags['pixel_range']
  return vqgan.config_of(
    given.arrays,
    given.file_format,
    256 if size is None else size,
    None if pixel_range is None else tuple(pixel_range),
  )


def _described_tokenizer(config, count: int) -> str:
  rows, columns = config.grid
  return (
    f'an image tokenizer of {count:,} parameters, {config.codebook_size:,} codes, '
    f'{rows}×{columns} tokens for images of {config.image_size}×{config.image_size} pixels'
  )


def _clip_config(given: Given, layout: str, activation: str | None = None):
  found = clip.layout(given.arrays)
  if found != layout:
    hint = '; give --format=open_clip' if found == 'open_clip' else '; give --format=clip'
    raise UserError(f'the weights have the names of {found}, not those of {layout}{hint}')
  activation = activation or given.flags['activation']
  return clip.config_of(given.arrays, given.config, given.preprocessor, activation)


def _clip_preprocessing(given: Given, config) -> preprocessing.Preprocessing:
  return clip.preprocessing_of(given.arrays, config, given.config, given.preprocessor)


def _siglip_tokenizer(path: str, given: Given) -> TokenizerFile:
  """Reads Gemma's tokenizer.json, its folder, or Gemma's SentencePiece model."""
  del given
  if os.path.isdir(path) or text_tokenizer.read_file(path).lstrip()[:1] == b'{':
    return TokenizerFile(tokenizer_files.of_siglip_2(path))
  found = vocabulary.TextVocabulary(path)
  if found.unknown_id != _GEMMA_UNKNOWN:
    raise UserError(
      f"{path} isn't Gemma's SentencePiece model, which SigLIP 2 uses: its unknown piece has the "
      f'id {found.unknown_id} instead of {_GEMMA_UNKNOWN}. SigLIP of 2023 has another vocabulary '
      'and is not read'
    )
  return TokenizerFile(text_tokenizer.read_file(path), lower_case=True)


def _check_ranker_tokenizer(tokenizer: text_tokenizer.TextTokenizer, config) -> None:
  if tokenizer.size < config.text_vocabulary:
    raise UserError(
      f'{tokenizer.path} has {tokenizer.size} pieces, but the weights are of '
      f'{config.text_vocabulary}; it belongs to another network'
    )
  ranking.check_tokenizer(tokenizer, config)


def _described_ranker(config, count: int) -> str:
  return (
    f'a ranker of {count:,} parameters, vectors of {config.feature_dim}, images of '
    f'{config.image_size}×{config.image_size} pixels, {config.text_length} text tokens'
  )


def _t5_config(given: Given):
  config = t5.config_of(given.arrays, given.config)
  length = given.flags['text_length']
  return config if length is None else dataclasses.replace(config, text_length=length)


def _check_text_encoder_tokenizer(
  tokenizer: text_tokenizer.TextTokenizer, config, spare_rows: int = 0
) -> None:
  """Checks a text tokenizer; tables may have a few more rows than it has pieces."""
  _check_size(tokenizer, config, spare_rows)
  text_encoders.check_empty_text(config, tokenizer.encode('', 3)[0], tokenizer.path)


def _check_generator_tokenizer(
  tokenizer: text_tokenizer.TextTokenizer, config, spare_rows: int = 0
) -> None:
  _check_size(tokenizer, config, spare_rows)
  generators.check_empty_text(config, tokenizer.encode('', 3)[0], tokenizer.path)


def _check_size(tokenizer: text_tokenizer.TextTokenizer, config, spare_rows: int) -> None:
  if not config.text_vocabulary - spare_rows <= tokenizer.size <= config.text_vocabulary:
    raise UserError(
      f'{tokenizer.path} has {tokenizer.size} pieces, but the weights are of '
      f'{config.text_vocabulary}; it belongs to another network'
    )


def _dalle_mini_config(given: Given):
  assert given.image_tokenizer is not None
  sizes = given.image_tokenizer.config
  return dalle_mini.config_of(given.arrays, given.config, sizes.codebook_size, sizes.grid)


def _dalle_mini_start(given: Given, config) -> int:
  settings = dict(given.config or {})
  if (start := given.flags['start_token']) is not None:
    settings['decoder_start_token_id'] = start
  return dalle_mini.first_input(given.arrays, settings, config)


def _text_normalizer(given: Given) -> str:
  return given.flags['text_normalizer'] or TEXT_NORMALIZER


def _llamagen_config(given: Given):
  assert given.image_tokenizer is not None
  tokenizer = given.image_tokenizer.config
  for file in given.weights.files:
    named = re.search(r'_(256|384|512)$', os.path.splitext(os.path.basename(file))[0])
    if named and int(named[1]) != tokenizer.image_size:  # The arrays don't show it.
      raise UserError(
        f'{file} is named as a generator of images of {named[1]} pixels, but the image tokenizer '
        f'makes {tokenizer.image_size}; give its weights with --image_size={named[1]}, or a folder '
        'that was imported so'
      )
  folder, encoder = given.flags['text_encoder'], None
  if folder is not None:
    encoder = model_folder.part_config('text_encoder', folder)
    if given.flags['vocabulary'] is not None:
      raise UserError('--vocabulary: the text tokenizer is that of --text_encoder; leave it out')
  return llamagen.config_of(given.arrays, tokenizer.grid, encoder, given.flags['heads'])


def _llamagen_tokenizer(path: str, given: Given) -> TokenizerFile:
  """Returns the text tokenizer of a text encoder, or the names of classes, if they are given."""
  if (folder := given.flags['text_encoder']) is not None:
    part = model_folder.load_part('text_encoder', folder)
    if part.vocabulary_path is None:
      raise UserError(f'{folder} has no text tokenizer; import the text encoder again')
    return TokenizerFile(text_tokenizer.read_file(part.vocabulary_path), part.lower_case)
  count = llamagen.class_count(given.arrays)
  names = None if given.flags['vocabulary'] is None else class_names.read(path)
  return TokenizerFile(class_tokenizer.content(count, names))


def _llamagen_default(folder: str, given: Given) -> str:
  del folder
  if (encoder := given.flags['text_encoder']) is not None:
    return f'the vocabulary of {encoder}'
  return 'the numbers of the classes; --vocabulary gives them names'


def _check_llamagen_tokenizer(tokenizer: text_tokenizer.TextTokenizer, config) -> None:
  spare_rows = 0 if config.text_encoder is None else _T5_SPARE_ROWS
  _check_generator_tokenizer(tokenizer, config, spare_rows)


def _text_encoder_of_llamagen(given: Given, config) -> Mapping[str, Any]:
  del config
  folder = given.flags['text_encoder']
  if folder is None:
    return {}
  return {'text_encoder': model_folder.load_part('text_encoder', folder).params}


def _described_generator(config, count: int) -> str:
  classes = getattr(config, 'classes', None)
  condition = f'{config.text_length} text tokens' if classes is None else f'{classes:,} classes'
  return (
    f'a generator of {count:,} parameters, {config.decoder_layers} decoder layers of width '
    f'{config.width}, {condition}'
  )


def _described_text_encoder(config, count: int) -> str:
  return (
    f'a text encoder of {count:,} parameters, {config.layers} layers of width {config.width}, '
    f'{config.text_length} text tokens'
  )


def _described_upscaler(config, count: int) -> str:
  return (
    f'a super-resolution network of {count:,} parameters, which enlarges pictures by '
    f'{config.factor}'
  )


_CLIP_TOKENIZER = Tokenizer(
  "OpenAI CLIP's tokenizer.json, or a folder with its vocab.json and merges.txt",
  lambda path, given: TokenizerFile(tokenizer_files.of_clip(path)),
  _check_ranker_tokenizer,
)


def _clip_format(config_of: Callable[[Given], Any], **others: Any) -> Format:
  settings: dict[str, Any] = {
    'flags': ('vocabulary', 'config', 'activation'),
    'preprocessing': _clip_preprocessing,
  } | others
  return Format(
    config_of,
    lambda given, config: clip.key_map(config, given.arrays),
    lambda given: clip.IGNORED,
    tokenizer=_CLIP_TOKENIZER,
    **settings,
  )


_DALLE_MINI = Format(
  _dalle_mini_config,
  lambda given, config: dalle_mini.key_map(config, given.arrays, _dalle_mini_start(given, config)),
  lambda given: (),
  flags=('tokenizer', 'image_size', 'vocabulary', 'config', 'text_normalizer', 'start_token'),
  tokenizer=Tokenizer(
    "DALL·E mini's tokenizer.json, or a folder with its vocab.json and merges.txt",
    lambda path, given: TokenizerFile(tokenizer_files.of_dalle_mini(path, _text_normalizer(given))),
    functools.partial(_check_generator_tokenizer, spare_rows=_DALLE_MINI_SPARE_ROWS),
    default=lambda folder, given: f'the vocabulary in {folder}',
  ),
  config_file='config.json',
  # The authors' notebook.
  sampling=lambda _: sampling_settings.SamplingSettings(guidance_scale=10.0),
  origin=lambda given, config: {
    'start_token': _dalle_mini_start(given, config),
    'text_normalizer': _text_normalizer(given),
  },
  image_tokenizer='dalle-mini',
)

PARTS: Mapping[str, Part] = {
  'generator': Part(
    {
      'dalle-mini': _DALLE_MINI,
      'min-dalle': _DALLE_MINI._replace(open=min_dalle.open_weights),
      'llamagen': Format(
        _llamagen_config,
        lambda given, config: llamagen.key_map(config, given.arrays),
        lambda given: llamagen.ignored(given.arrays),
        flags=('tokenizer', 'image_size', 'vocabulary', 'text_encoder', 'heads'),
        tokenizer=Tokenizer(
          'names of the classes, such as LOC_synset_mapping.txt or imagenet_class_index.json',
          _llamagen_tokenizer,
          _check_llamagen_tokenizer,
          default=_llamagen_default,
        ),
        # Those of sample_c2i.py and sample_t2i.py.
        sampling=lambda config: (
          sampling_settings.SamplingSettings(guidance_scale=4.0, top_k=2000)
          if config.text_encoder is None
          else sampling_settings.SamplingSettings(guidance_scale=7.5, top_k=1000)
        ),
        others=_text_encoder_of_llamagen,
        provenance=lambda given: (
          {}
          if given.flags['text_encoder'] is None
          else model_folder.part_provenance('text_encoder', given.flags['text_encoder'])
        ),
        image_tokenizer='llamagen',
      ),
    },
    _described_generator,
    '--model={} of `parti-jax generate` and other commands',
  ),
  'tokenizer': Part(
    {
      name: Format(
        _vqgan_config,
        lambda given, config: vqgan.key_map(config, given.arrays, given.file_format),
        lambda given: vqgan.ignored(given.arrays, given.file_format),
        flags=('image_size', 'pixel_range'),
      )
      for name in vqgan.FORMATS
    }
    | {
      enhancing_vit_vqgan.FORMAT: Format(
        lambda given: enhancing_vit_vqgan.config_of(given.arrays),
        lambda given, config: enhancing_vit_vqgan.key_map(config, given.arrays),
        lambda given: enhancing_vit_vqgan.ignored(given.arrays),
      )
    },
    _described_tokenizer,
    '--tokenizer={} of `parti-jax tokenize` and `parti-jax export`',
  ),
  'ranker': Part(
    {
      'clip': _clip_format(
        functools.partial(_clip_config, layout='transformers'),
        flags=('vocabulary', 'config', 'preprocessor', 'activation'),
        config_file='config.json',
      ),
      'open_clip': _clip_format(
        functools.partial(_clip_config, layout='open_clip'), config_file='open_clip_config.json'
      ),
      'hpsv2': _clip_format(
        functools.partial(_clip_config, layout='open_clip', activation='gelu'),
        flags=('vocabulary',),
        preprocessing=lambda *_: preprocessing.Preprocessing(fit='pad'),
      ),
      'siglip2': Format(
        lambda given: siglip.config_of(given.arrays, given.config, given.preprocessor),
        lambda given, config: siglip.key_map(config, given.arrays),
        lambda given: siglip.IGNORED,
        flags=('vocabulary', 'config', 'preprocessor'),
        tokenizer=Tokenizer(
          "SigLIP 2's tokenizer.json, or Gemma's tokenizer.model",
          _siglip_tokenizer,
          _check_ranker_tokenizer,
        ),
        preprocessing=lambda given, config: siglip.preprocessing_of(given.preprocessor, config),
        config_file='config.json',
      ),
    },
    _described_ranker,
    '--ranker={} of `parti-jax generate`, `prompts`, `evaluate` and `export`',
  ),
  'text_encoder': Part(
    {
      't5': Format(
        _t5_config,
        lambda given, config: t5.key_map(config, given.arrays),
        lambda given: t5.IGNORED,
        flags=('vocabulary', 'config', 'text_length'),
        tokenizer=Tokenizer(
          "its spiece.model or tokenizer.json; of t5x's checkpoints T5's sentencepiece.model",
          lambda path, given: TokenizerFile(text_tokenizer.read_file(path)),
          functools.partial(_check_text_encoder_tokenizer, spare_rows=_T5_SPARE_ROWS),
        ),
        config_file='config.json',
      ),
      'clip': Format(
        lambda given: clip.text_config_of(given.arrays, given.config, given.flags['activation']),
        lambda given, config: clip.text_key_map(config, given.arrays),
        lambda given: clip.IGNORED_BY_TEXT,
        flags=('vocabulary', 'config', 'activation'),
        tokenizer=Tokenizer(
          _CLIP_TOKENIZER.files, _CLIP_TOKENIZER.read, _check_text_encoder_tokenizer
        ),
        config_file='config.json',
      ),
    },
    _described_text_encoder,
    '--gin_file=models/imported_text_encoder.gin --gin.TEXT_ENCODER="\'{}\'" of `parti-jax train`',
  ),
  'super_resolution': Part(
    {
      real_esrgan.FORMAT: Format(
        lambda given: real_esrgan.config_of(given.arrays),
        lambda given, config: real_esrgan.key_map(config, given.arrays),
        lambda given: real_esrgan.ignored(given.arrays),
        flags=('interpolate_with', 'denoise_strength'),
      )
    },
    _described_upscaler,
    '--upscaler={0} of `parti-jax generate` and `evaluate_upscaling`, and --super_resolution={0} of '
    '`export`',
  ),
}
FORMATS = tuple(dict.fromkeys(name for part in PARTS.values() for name in part.formats))
