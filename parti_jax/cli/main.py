"""Entry point of `parti-jax`: finds the module of a command and runs it.

A command is a module with `add_arguments(parser)` and `run(args) -> exit status`. A module with
`OTHER_FLAGS = True` gets unknown flags as `args.other_flags`. One with `SHORT = True` runs without
a search for garbage until it calls `garbage.resume`. Only the module of the given command
is imported, so that `--help` and errors in flags appear at once.
"""

import argparse
import atexit
import contextlib
import difflib
import faulthandler
import functools
import importlib
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NoReturn

import parti_jax
from parti_jax.core import garbage
from parti_jax.core import gin_config
from parti_jax.core import optional_packages
from parti_jax.core import storage
from parti_jax.core import user_modules
from parti_jax.core.errors import UserError

# Commands whose --output_dir, or --output, may be a URL.
_WRITE_TO_URLS = ('export', 'import', 'prepare', 'vocabulary', 't5x_checkpoint', 'tokenize')
# command -> (module, one line of help)
COMMANDS = {
  'generate': ('parti_jax.cli.generate', 'generate pictures for prompts'),
  'serve': (
    'parti_jax.cli.serve',
    "draw for other programs over HTTP, with the API of OpenAI's images endpoints",
  ),
  'ui': ('parti_jax.cli.ui', 'show a page in the browser on which to draw'),
  'upscale': ('parti_jax.cli.upscale', 'enlarge picture files with super-resolution'),
  'train': ('parti_jax.cli.train', 'train a model with the objective that the gin files select'),
  'own_pictures': (
    'parti_jax.cli.own_pictures',
    'train all parts on a folder of captioned pictures, and generate pictures with them',
  ),
  'info': (
    'parti_jax.cli.info',
    'show the progress, checkpoints and history of a run, or describe an exported model',
  ),
  'batch': (
    'parti_jax.cli.batch',
    'show a training batch, such as one whose step could not be applied',
  ),
  'prepare': (
    'parti_jax.cli.prepare',
    'filter, deduplicate and resize the pictures of a source, with Apache Beam',
  ),
  'tokenize': (
    'parti_jax.cli.tokenize',
    'write the image tokens of a task, for training the generator',
  ),
  'detokenize': (
    'parti_jax.cli.detokenize',
    'turn image tokens written by t5x.infer into pictures',
  ),
  'import': (
    'parti_jax.cli.import_part',
    'turn public weights of a part, such as an image tokenizer, into a folder for all commands',
  ),
  'export': ('parti_jax.cli.export', 'export checkpoints to one model folder for sampling'),
  't5x_checkpoint': (
    'parti_jax.cli.t5x_checkpoint',
    "convert a run's checkpoint to t5x, or a t5x checkpoint to a run",
  ),
  'vocabulary': ('parti_jax.cli.vocabulary', 'train a SentencePiece vocabulary'),
  'plan': (
    'parti_jax.cli.plan',
    'compile a step for other devices, to see whether it fits and what limits its speed',
  ),
  'calibrate': (
    'parti_jax.cli.calibrate',
    'find the early-exit threshold that preserves image quality',
  ),
  'evaluate_upscaling': (
    'parti_jax.cli.evaluate_upscaling',
    'compare super-resolution with bicubic enlargement',
  ),
  'evaluate': ('parti_jax.cli.evaluate', 'measure a model and compare it with baselines'),
  'evaluate_samples': (
    'parti_jax.cli.evaluate_samples',
    'compare samples with a reference: FID, sFID, inception score, precision, recall',
  ),
  'evaluate_tokenizer': (
    'parti_jax.cli.evaluate_tokenizer',
    'measure how well an image tokenizer reconstructs pictures: rFID, PSNR, SSIM, LPIPS, code use',
  ),
  'compare': (
    'parti_jax.cli.compare',
    'compare the numbers of two measurements, if their protocols are the same',
  ),
  'prompts': (
    'parti_jax.cli.prompts',
    'generate pictures for the prompts of PartiPrompts or another benchmark, and show results',
  ),
}

_GIN_FLAG = '--gin.'
# Seconds that a process may take to end after an exception; then it is ended with status 1.
_SECONDS_TO_END = 20.0
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, with the flags that an unknown one is close to."""

  def error(self, message: str) -> NoReturn:
    _, _, unknown = message.partition('unrecognized arguments: ')
    flag = unknown.partition('=')[0].partition(' ')[0]
    near = difflib.get_close_matches(flag, self._option_string_actions, n=3, cutoff=0.7)
    hint = f'did you mean {" or ".join(near)}? ' if near else ''
    self.exit(2, f'{self.prog}: error: {message}; {hint}see {self.prog} --help\n')


def split_gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits `--gin.NAME=VALUE` and `--gin.NAME VALUE` from the other arguments.

  Args:
    argv: the arguments, without the program's name. Arguments after `--` are left alone.

  Returns:
    The other arguments in their order, and the bindings as 'NAME=VALUE'.

  Raises:
    UserError: a name has no value.
  """
  rest, bindings = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument == '--':
      rest += [argument, *arguments]
    elif not argument.startswith(_GIN_FLAG):
      rest.append(argument)
    else:
      name, equals, value = argument.removeprefix(_GIN_FLAG).partition('=')
      if not equals:
        value = next(arguments, '')
      if not name.strip() or not value.strip():
        raise UserError(
          f'{argument}: no value; write --gin.NAME=VALUE, for example --gin.train.steps=100'
        )
      bindings.append(f'{name}={value}')
  return rest, bindings


def split_imports(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits `--import=MODULE` and `--import MODULE` from the other arguments.

  Args:
    argv: the arguments, without the program's name. Arguments after `--` are left alone.

  Returns:
    The other arguments in their order, and the names of the modules.

  Raises:
    UserError: a name is missing or isn't that of a module.
  """
  rest, modules = [], []
  arguments = iter(argv)
  for argument in arguments:
    flag, equals, module = argument.partition('=')
    if argument == '--':
      rest += [argument, *arguments]
    elif flag != user_modules.FLAG:
      rest.append(argument)
    else:
      module = module if equals else next(arguments, '')
      if not all(name.isidentifier() for name in module.split('.')):
        raise UserError(
          f'{user_modules.FLAG}={module}: must be the name of a module, such as mine.kinds'
        )
      modules.append(module)
  return rest, modules


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `parti-jax` and returns its exit status.

  Args:
    argv: the arguments, without the program's name; None for those of the process.

  Returns:
    The command's status (0 for success), 2 for bad input, 130 after Ctrl-C.
  """
  if argv is None:
    garbage.pause()
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
  try:
    if argv is not None:
      return _run_or_complain(argv)
    # Registered before the command's own functions, so that it is called after them.
    atexit.register(at_exit := _AtExit())
    at_exit.status = _run_or_complain(sys.argv[1:])
    return at_exit.status
  except Exception:
    if argv is None and sys.stderr is not None:
      # A library's hanging thread must not keep a crashed process, and its devices, alive.
      faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)
    raise


class _AtExit:
  """Ends an interrupted process at once, since programs that still run on a device may crash its end."""

  status: int | None = None

  def __call__(self) -> None:
    if self.status == _INTERRUPTED:
      for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
          stream.flush()
      os._exit(_INTERRUPTED)


def _unraisable(before: Callable[[Any], Any], unraisable: Any) -> None:
  """Passes errors that nobody can handle to another hook, except those of a closed event loop.

  A thread of gRPC that outlives the loop of a store that was given up raises many of them, which
  would bury the message of the error.
  """
  error = unraisable.exc_value
  if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
    before(unraisable)


def _run_or_complain(argv: Sequence[str]) -> int:
  try:
    return _run(argv)
  except SystemExit as exit_:  # argparse exits after --help and after a bad flag.
    if not isinstance(exit_.code, int):
      raise
    return exit_.code
  except UserError as error:
    return _complain(gin_config.without_call_chain(error))
  except ImportError as error:
    message = optional_packages.missing_extra(error)
    if message is None:
      raise
    return _complain(message)
  except KeyboardInterrupt:
    print('parti-jax: interrupted', file=sys.stderr)
    return _INTERRUPTED


def _run(argv: Sequence[str]) -> int:
  argv, bindings = split_gin_bindings(argv)
  argv, modules = split_imports(argv)
  if not argv or argv[0].startswith('-'):
    parser = _main_parser()
    parser.parse_args(argv)
    parser.error('no command given')
  name, *arguments = argv
  if name not in COMMANDS:
    raise UserError(f'unknown command {name!r}; ' + _nearest_commands(name))
  module_name, summary = COMMANDS[name]
  module = importlib.import_module(module_name)
  if not getattr(module, 'SHORT', False):
    garbage.resume()
  parser = _Parser(prog=f'parti-jax {name}', description=_description(summary), allow_abbrev=False)
  module.add_arguments(parser)
  if getattr(module, 'OTHER_FLAGS', False):
    args, other_flags = parser.parse_known_args(arguments)
    args.other_flags = other_flags
  else:
    args = parser.parse_args(arguments)
  if bindings and not hasattr(args, 'gin_file'):
    raise UserError(f'{_GIN_FLAG}{bindings[0]}: the command {name!r} takes no gin values')
  _check_outputs(args, urls=name in _WRITE_TO_URLS)
  if hasattr(args, 'gin_file'):
    # gin imports them: later, since some commands fork first, and registering gin names is allowed.
    bindings = [f'import {module}' for module in modules] + bindings
  else:
    for module_of_user in modules:
      user_modules.load(module_of_user)
  args.gin_bindings = bindings
  with gin_config.translated_errors():
    return module.run(args)


def _check_outputs(args: argparse.Namespace, urls: bool):
  """Raises UserError if an output file or folder of the command can't be written."""
  for flag in ('output_dir', 'output', 'json'):
    path = getattr(args, flag, None)
    if not isinstance(path, str):
      continue
    if not storage.is_url(path):
      storage.check_can_write(f'--{flag}={path}', path)
    elif not urls:
      storage.check_local(path)


def _main_parser() -> argparse.ArgumentParser:
  width = max(map(len, COMMANDS))
  table = [f'  {name:{width}}  {summary}' for name, (_, summary) in COMMANDS.items()]
  parser = _Parser(
    prog='parti-jax',
    usage='parti-jax COMMAND [ARGUMENTS]',
    description=(parti_jax.__doc__ or '').partition('\n')[0],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='\n'.join(
      [
        'commands:',
        *table,
        '',
        'parti-jax COMMAND --help explains a command.',
        'Any command takes --import=MODULE, which imports a module of your own first.',
      ]
    ),
  )
  parser.add_argument('--version', action='version', version=f'parti_jax {parti_jax.__version__}')
  return parser


def _description(summary: str) -> str:
  return f'{summary[0].upper()}{summary[1:]}.'


def _nearest_commands(name: str) -> str:
  near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.5)
  if near:
    return 'did you mean ' + ' or '.join(near) + '?'
  return 'the commands are ' + ', '.join(COMMANDS)


def _complain(message: str) -> int:
  print(f'parti-jax: error: {" ".join(message.splitlines())}', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(main())
