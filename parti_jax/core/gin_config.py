"""gin for the command line: finds gin files, and turns gin's errors into helpful messages.

A configurable must be imported before a gin file can name it; the commands do that.
"""

import argparse
import contextlib
import difflib
import inspect
import io
import pathlib
import re
import sys
import tokenize
import typing
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from parti_jax.core import checks
from parti_jax.core import optional_packages
from parti_jax.core import user_modules
from parti_jax.core.errors import UserError

# gin names in parti_jax.data; tests/core/test_gin_config.py checks that the list is complete.
DATA_NAMES = (
  'classes',
  'data',
  'decode_images',
  'drop_text',
  'folder',
  'hf_datasets',
  'loader',
  'mixture',
  'openmoji',
  'openmoji_scenes',
  'parquet',
  'prepared',
  'shuffle',
  'text',
  'tfrecord',
  'token_cache',
  'vocabulary',
  'webdataset',
)
_DATA_IMPORT = re.compile(r'^import parti_jax\.data\b.*$', re.MULTILINE)

# Names of earlier versions, which still work -> current names.
RENAMED = {
  'GeneratorStage': 'GeneratorObjective',
  'RankerStage': 'RankerObjective',
  'SuperResolutionStage': 'SuperResolutionObjective',
  'TextEncoderStage': 'TextEncoderObjective',
  'TokenizerStage': 'TokenizerObjective',
  'train.stage': 'train.objective',
}
# Strings and comments are matched first, and kept.
_RENAMED_NAME = re.compile(
  r'("""|\'\'\')(?:.|\n)*?\1|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*|'
  rf'(?<![\w.])(?P<name>{"|".join(map(re.escape, RENAMED))})\b'
)

# The bindings that the last `parse` was given, besides files.
_given: list[str] = []

_CALL_CHAIN = '\n  In call to configurable'
_LOCATION = re.compile(r'\n  In file "(?P<file>[^\n]*)", line (?P<line>\d+)\n(?P<text>[^\n]*)')


def add_gin_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds `--gin_file` to a command's parser and explains `--gin.NAME=VALUE` in its help.

  `main` collects the `--gin.NAME=VALUE` arguments in `args.gin_bindings`.
  """
  group = parser.add_argument_group(
    'gin',
    'Any --gin.NAME=VALUE sets one value and overrides the files, for example '
    '--gin.train.steps=100; quote strings: --gin.NAME="\'text\'".',
  )
  group.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    help='a gin file, in the working folder or among those installed with the package '
    '(gin_configs/...); may be given several times, later files win',
  )


def folder() -> pathlib.Path:
  """Returns the folder of the package's gin files, installed or in a checkout."""
  package = pathlib.Path(__file__).resolve().parents[1]
  installed = package / 'gin_configs'
  return installed if installed.is_dir() else package.parent / 'gin_configs'


def find(gin_file: str) -> pathlib.Path:
  """Returns the path of a gin file, which is the path given or one in the package's `gin_configs`.

  Args:
    gin_file: a path, or a name in the package's folder, optionally prefixed with `gin_configs/`.

  Raises:
    UserError: the file doesn't exist; the message suggests similar names.
  """
  path = _find(gin_file)
  if path is None:
    raise UserError(_missing_file(gin_file))
  return path


def parse(gin_files: Sequence[str], bindings: Sequence[str], data: bool = True) -> None:
  """Reads gin files, then single bindings; discards any earlier configuration.

  Args:
    gin_files: paths or names, resolved by `find`; their includes are resolved the same way.
    bindings: strings 'NAME=VALUE', or 'import MODULE', which comes before the files.
    data: whether to read the data settings. If False, imports of `parti_jax.data` and values of
      its names are skipped, so TensorFlow isn't needed.

  Raises:
    UserError: a file is missing or isn't valid gin, a name is unknown (the message suggests valid
      ones), a value doesn't match its parameter's annotation or bounds, a required value isn't
      set, a macro is undefined, or a macro given as a binding isn't used.
  """
  import gin

  gin.clear_config()
  _given.clear()
  skipped = () if data else DATA_NAMES
  imports = [binding for binding in bindings if binding.startswith('import ')]
  bindings = [binding for binding in bindings if not binding.startswith('import ')]
  old_names: dict[str, str] = {}
  try:
    for text in imports:
      user_modules.load(text.removeprefix('import '))
      gin.parse_config(text)  # It belongs to the configuration, too.
    with _includes_found_as_files_are(gin, data, old_names):
      for gin_file in gin_files:
        path = str(find(gin_file))
        with _translated_parse_errors(path):
          gin.parse_config_file(path, skipped)
      for binding in bindings:
        with _translated_parse_errors(f'--gin.{binding}', is_binding=True):
          gin.parse_config(_with_new_names(binding, f'--gin.{binding}', old_names), skipped)
    _check_macros(gin, bindings)
    with _translated_parse_errors(', '.join(gin_files) or 'gin'):
      gin.finalize()
    _check_types(gin)
  except BaseException:
    gin.clear_config()
    raise
  _given.extend(bindings)
  for old, source in old_names.items():
    print(f'{source}: {old} is now named {RENAMED[old]}; the old name still works', file=sys.stderr)


def with_new_names(text: str) -> str:
  """Returns gin text with the old names in `RENAMED` replaced by the current ones."""
  return _with_new_names(text, '', {})


def _with_new_names(text: str, source: str, old_names: dict[str, str]) -> str:
  """Like `with_new_names`; also adds each old name found, with its source, to `old_names`."""

  def replace(found):
    name = found['name']
    if name is None:
      return found[0]
    old_names.setdefault(name, source)
    return RENAMED[name]

  return _RENAMED_NAME.sub(replace, text)


def operative() -> str:
  """Returns the gin values used by all calls so far, including defaults."""
  import gin

  return gin.operative_config_str()


def unused(kind: type) -> list[str]:
  """Returns the names of `parse`'s bindings, such as 'MyObjective.ema', whose class was never built.

  Bindings of files don't count: one file may serve several runs.

  Args:
    kind: the base class of these classes. All that the command needs must have been built.
  """
  import gin

  built = {selector for _, selector in gin.config._OPERATIVE_CONFIG}
  found = []
  for binding in _given:
    name = with_new_names(binding).split('=', maxsplit=1)[0].strip()
    scope, _, selector = name.rpartition('.')[0].rpartition('/')
    configurable = gin.config._REGISTRY.get_match(selector) if selector else None
    if (
      configurable
      and inspect.isclass(configurable.wrapped)
      and issubclass(configurable.wrapped, kind)
      and configurable.selector not in built
      # Nobody has cleared gin's values since.
      and (scope, configurable.selector) in gin.config._CONFIG
    ):
      found.append(name)
  return found


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
  """Turns gin's errors for an unset required value or a premature call into UserErrors."""
  try:
    yield
  except TypeError as error:
    found = re.match(
      r'(\w+)\(\) missing \d+ required positional arguments?: ([^\n]+)\n'
      r"(?:  [^\n]*\n)*?  In call to configurable '(?:\w+\.)*\1'",
      str(error),
    )
    if not found:
      raise
    name = found.group(1)
    raise UserError(
      f'gin: @{name}() is called without {found.group(2)}; write @{name}, without parentheses'
    ) from error
  except RuntimeError as error:
    found = re.search(
      r'Required bindings for `(.+?)` not provided in config: \[(.*?)\]', str(error)
    )
    if not found:
      raise
    name, missing = found.group(1), re.findall(r"'(\w+)'", found.group(2))
    flags = ' '.join(f'--gin.{name}.{parameter}=VALUE' for parameter in missing)
    raise UserError(
      f'gin: no value for {", ".join(missing)} of {name}; set it in a gin file or with {flags}'
    ) from error


def without_call_chain(error: Exception) -> str:
  """Returns an error's message without the call chain that gin appends."""
  return str(error).split(_CALL_CHAIN, maxsplit=1)[0]


def _find(gin_file: str) -> pathlib.Path | None:
  # The parent of the folder serves names that begin with gin_configs/.
  for base in (pathlib.Path(), folder(), folder().parent):
    if (base / gin_file).is_file():
      return base / gin_file
  return None


def _known_files() -> list[str]:
  return sorted(
    f'gin_configs/{path.relative_to(folder()).as_posix()}' for path in folder().rglob('*.gin')
  )


def _missing_file(gin_file: str) -> str:
  message = f'gin file {gin_file!r} not found: neither as given nor in {folder()}'
  known = _known_files()
  near = _nearest(gin_file, known) or _nearest_by_name(gin_file, known)
  return message + (f'; did you mean {_either(near)}?' if near else '')


def _nearest_by_name(gin_file: str, known: Sequence[str]) -> list[str]:
  names = {pathlib.PurePath(path).name: path for path in known}
  return [names[name] for name in _nearest(pathlib.PurePath(gin_file).name, names)]


@contextlib.contextmanager
def _includes_found_as_files_are(gin, data: bool, old_names: dict[str, str]) -> Iterator[None]:
  """Resolves `include` in gin files the way `find` does."""

  def read(name):
    path = _find(name)
    assert path is not None  # gin has called `_find` before.
    content = _with_new_names(path.read_text(encoding='utf-8-sig'), str(path), old_names)
    # An empty line replaces each import, which keeps the line numbers of errors right.
    text = io.StringIO(content if data else _DATA_IMPORT.sub('', content))
    text.name = str(path)  # For gin's errors.
    return text

  # Replaces gin's own readers: the one for packages logs errors while it searches, and fails
  # on an importable folder without __init__.py, such as gin_configs in a checkout.
  readers = gin.config._FILE_READERS
  saved = list(readers)
  readers[:] = [(read, _find)]
  try:
    yield
  finally:
    readers[:] = saved


@contextlib.contextmanager
def _translated_parse_errors(source: str, is_binding: bool = False) -> Iterator[None]:
  """Turns gin's parse errors into UserErrors that begin with the file and line, or the flag."""
  try:
    yield
  except (SyntaxError, tokenize.TokenError) as error:
    raise UserError(_syntax_message(error, source, is_binding)) from error
  except ModuleNotFoundError as error:
    if optional_packages.missing_extra(error):
      raise
    raise UserError(_located(str(error), source)[0]) from error
  except (ValueError, KeyError, AttributeError, NameError, RuntimeError, OSError) as error:
    raise UserError(_parse_message(str(error), source)) from error


def _syntax_message(error: SyntaxError | tokenize.TokenError, source: str, is_binding: bool) -> str:
  if is_binding:
    return (
      f'{source}: not a gin value; a string needs quotes that survive the shell: '
      '--gin.NAME="\'text\'"'
    )
  if isinstance(error, tokenize.TokenError):
    return f'{source}: {error.args[0]}; check for an unclosed bracket or quote'
  location = f'{error.filename or source}:{error.lineno}'
  text = (error.text or '').strip()
  return f'{location}: {error.msg}' + (f' In: {text}' if text else '')


def _located(message: str, source: str) -> tuple[str, str]:
  """Returns 'location: problem', and the gin text at that location."""
  what = message.strip('"').split('\n', maxsplit=1)[0]
  found = _LOCATION.search(message.replace('\\n', '\n'))
  if not found:
    return f'{source}: {what}', source
  return f'{found["file"]}:{found["line"]}: {what}', found['text']


def _parse_message(message: str, source: str) -> str:
  located, text = _located(message, source)
  location = located.split(': ', maxsplit=1)[0]
  if found := re.search(r'Unable to open file: (.+?)\. Searched config paths', message):
    return f'{location}: {_missing_file(found.group(1))}'
  if found := re.search(r"No configurable matching (reference )?'@?(.+?)(\(\))?'", message):
    return f'{location}: {_unknown_name(found.group(2), text)}'
  if found := re.search(r"Configurable '(.+?)' doesn't have a parameter named '(.+?)'", message):
    return f'{location}: {_unknown_parameter(*found.groups())}'
  if found := re.search(
    r"Configurable '(.+?)' (?:has denylisted|doesn't include) kwarg '(.+?)'", message
  ):
    return f'{location}: {".".join(found.groups())} cannot be set by gin'
  return located


def _unknown_name(name: str, text: str) -> str:
  """Suggests the most similar configurables, with the parameter that the gin text sets."""
  known = _configurables()
  parameter = re.search(re.escape(name) + r'\.(\w+)\s*=', text)
  choices = list(known)
  if parameter:
    name = f'{name}.{parameter.group(1)}'
    choices = [f'{selector}.{p}' for selector, c in known.items() for p in _parameters(c)]
  near = _nearest(name, choices)
  hint = f'did you mean {_either(near)}?' if near else f'the names are {", ".join(known)}'
  return f'unknown gin name {name!r}; {hint}'


def _unknown_parameter(name: str, parameter: str) -> str:
  configurable = next(
    (
      c
      for selector, c in _configurables().items()
      if c.selector == name or f'.{c.selector}'.endswith(f'.{name}')
    ),
    None,
  )
  parameters = _parameters(configurable) if configurable else []
  near = _nearest(parameter, parameters)
  hint = (
    f'did you mean {_either(f"{name}.{p}" for p in near)}?'
    if near
    else f'its parameters are {", ".join(parameters)}'
  )
  return f'unknown gin name {f"{name}.{parameter}"!r}; {hint}'


def _configurables() -> dict[str, Any]:
  """Returns gin's record of each configurable by its shortest unambiguous name."""
  import gin

  registry = gin.config._REGISTRY
  return {
    registry.minimal_selector(selector): configurable
    for selector, configurable in sorted(registry.items())
    if not selector.startswith('gin.')
  }


def _parameters(configurable) -> list[str]:
  """Returns the names of a configurable's parameters that gin may set."""
  named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  try:
    signature = inspect.signature(configurable.wrapped)
  except (TypeError, ValueError):  # Some built-in callables have none.
    return []
  return [
    name
    for name, parameter in signature.parameters.items()
    if parameter.kind in named
    and name not in (configurable.denylist or ())
    and (not configurable.allowlist or name in configurable.allowlist)
  ]


def _check_macros(gin, bindings: Iterable[str]) -> None:
  """Raises UserError for an undefined macro, or for one that a flag sets and no file uses."""
  # gin reports the first only when the value is needed, and the second never.
  values = gin.config._CONFIG
  references = gin.config.iterate_references(values, to=gin.get_configurable(gin.config.macro))
  used = {reference.config_key for reference in references}
  names = sorted({scope for scope, selector in {*values, *used} if selector == 'gin.macro'})
  for scope, selector in sorted(used - set(values)):
    near = _nearest(scope, [name for name in names if (name, selector) in values])
    hint = f'did you mean %{near[0]}?' if near else f'set it with --gin.{scope}=VALUE'
    raise UserError(f'gin: the macro %{scope} is used but has no value; {hint}')
  for binding in bindings:
    name = binding.split('=', maxsplit=1)[0].strip()
    if '.' not in name and (name, 'gin.macro') not in used:
      near = _nearest(name, [name for name, _ in used])
      hint = f'did you mean {_either(near)}?' if near else 'write --gin.NAME.PARAMETER=VALUE'
      raise UserError(f'--gin.{binding}: the gin files use no macro {name!r}; {hint}')


def _check_types(gin) -> None:
  """Raises UserError for a value that doesn't match its parameter's annotation or bounds."""
  registry = gin.config._REGISTRY
  for (scope, selector), values in gin.config._CONFIG.items():
    if selector == 'gin.macro' or selector not in registry:
      continue
    wrapped = registry[selector].wrapped
    kinds, bounds = _annotations(wrapped), checks.bounds_of(wrapped)
    name = '/'.join(filter(None, [scope, registry.minimal_selector(selector)]))
    for parameter, value in values.items():
      value = _literal(gin, value)
      if value is not _NO_LITERAL and parameter in kinds:
        checks.typed(
          f'{name}.{parameter}', value, kinds[parameter], *bounds.get(parameter, (None, None))
        )


_NO_LITERAL = object()


def _literal(gin, value):
  """Returns a gin value with macros resolved; _NO_LITERAL if it contains a call or a function."""
  if isinstance(value, gin.config.ConfigurableReference):
    scope, selector = value.config_key
    if selector != 'gin.macro':
      return _NO_LITERAL
    return _literal(gin, gin.config._CONFIG.get((scope, selector), {}).get('value', _NO_LITERAL))
  if isinstance(value, (list, tuple)):
    items = [_literal(gin, item) for item in value]
    return _NO_LITERAL if any(item is _NO_LITERAL for item in items) else type(value)(items)
  return value


def _annotations(wrapped) -> dict[str, object]:
  """Returns {parameter: type} of a function or class; {} if annotations can't be resolved."""
  try:
    return typing.get_type_hints(wrapped.__init__ if inspect.isclass(wrapped) else wrapped)
  except Exception:
    return {}  # Third-party configurables may have any annotations.


def _nearest(name: str, choices: Iterable[str]) -> list[str]:
  return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)


def _either(names: Iterable[str]) -> str:
  return ' or '.join(names)
