"""The command `parti-jax`: finds the module of the chosen command and runs it.

Every command is a module with `add_arguments(parser)` and `run(args) -> exit status`. One with
`OTHER_FLAGS = True` gets the flags that it does not know as `args.other_flags`. Only the
chosen command's module is imported, so that `--help` and errors in flags come at once.
"""

import argparse
import difflib
import faulthandler
import importlib
import sys
from collections.abc import Sequence

import parti_jax
from parti_jax.core import gin_config
from parti_jax.core import optional_packages
from parti_jax.core import storage
from parti_jax.core.errors import UserError

# Commands whose --output_dir, or --output, may be a URL.
_WRITE_TO_URLS = ('export', 'prepare', 'vocabulary', 't5x_checkpoint', 'tokenize')
# command -> (module, one line of help)
COMMANDS = {
  'generate': ('parti_jax.cli.generate', 'draw pictures for prompts'),
  'train': ('parti_jax.cli.train', 'train a model: any objective, chosen by gin files'),
  'own_pictures': (
    'parti_jax.cli.own_pictures',
    'train all parts on a folder of captioned pictures, and draw with them',
  ),
  'info': (
    'parti_jax.cli.info',
    'tell about a run (how far it is, its checkpoints, its story) or an exported model',
  ),
  'batch': (
    'parti_jax.cli.batch',
    'show a batch of training, such as one whose step could not be applied',
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
    'turn image tokens that t5x.infer has written into pictures',
  ),
  'export': ('parti_jax.cli.export', 'turn checkpoints into one folder for sampling'),
  't5x_checkpoint': (
    'parti_jax.cli.t5x_checkpoint',
    'turn a checkpoint of a run into one of t5x, and one of t5x into a run',
  ),
  'vocabulary': ('parti_jax.cli.vocabulary', 'train a SentencePiece vocabulary'),
  'plan': (
    'parti_jax.cli.plan',
    'compile a step for devices that are not there: does it fit, what bounds it',
  ),
  'calibrate': (
    'parti_jax.cli.calibrate',
    'find the threshold of early exit that keeps pictures as good',
  ),
  'evaluate_upscaling': (
    'parti_jax.cli.evaluate_upscaling',
    'measure super-resolution, beside bicubic enlargement',
  ),
  'evaluate': ('parti_jax.cli.evaluate', 'measure a model, beside its yardsticks'),
  'prompts': (
    'parti_jax.cli.prompts',
    'draw every prompt of a file such as PartiPrompts.tsv, and show them on a page',
  ),
}

_GIN_FLAG = '--gin.'
# How long a process may take to end after an exception, until it is ended with status 1.
_SECONDS_TO_END = 20.0


def split_gin_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes the `--gin.NAME=VALUE` and `--gin.NAME VALUE` out of a command line.

  Args:
    argv: the arguments, without the program's name. Nothing after `--` is taken.

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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `parti-jax` and returns its exit status.

  Args:
    argv: the arguments, without the program's name; those of the process when None.

  Returns:
    The command's own status (0 when all went well), 2 for bad input, 130 after Ctrl-C.
  """
  try:
    return _run_or_complain(sys.argv[1:] if argv is None else argv)
  except Exception:
    if argv is None and sys.stderr is not None:
      # A library's thread that never returns must not keep a crashed process, and its devices.
      faulthandler.dump_traceback_later(_SECONDS_TO_END, exit=True)
    raise


def _run_or_complain(argv: Sequence[str]) -> int:
  try:
    return _run(argv)
  except SystemExit as exit_:  # How argparse ends after --help and after a bad flag.
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
    return 130


def _run(argv: Sequence[str]) -> int:
  argv, bindings = split_gin_bindings(argv)
  if not argv or argv[0].startswith('-'):
    parser = _main_parser()
    parser.parse_args(argv)
    parser.error('no command given; see parti-jax --help')
  name, *arguments = argv
  if name not in COMMANDS:
    raise UserError(f'unknown command {name!r}; ' + _nearest_commands(name))
  module_name, summary = COMMANDS[name]
  module = importlib.import_module(module_name)
  parser = argparse.ArgumentParser(
    prog=f'parti-jax {name}', description=_description(summary), allow_abbrev=False
  )
  module.add_arguments(parser)
  if getattr(module, 'OTHER_FLAGS', False):
    args, args.other_flags = parser.parse_known_args(arguments)
  else:
    args = parser.parse_args(arguments)
  if bindings and not hasattr(args, 'gin_file'):
    raise UserError(f'{_GIN_FLAG}{bindings[0]}: the command {name!r} takes no gin values')
  args.gin_bindings = bindings
  _check_outputs(args, urls=name in _WRITE_TO_URLS)
  with gin_config.translated_errors():
    return module.run(args)


def _check_outputs(args: argparse.Namespace, urls: bool):
  """Raises UserError if a file or folder that the command will write can't be written."""
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
  parser = argparse.ArgumentParser(
    prog='parti-jax',
    usage='parti-jax COMMAND [ARGUMENTS]',
    description=parti_jax.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='\n'.join(['commands:', *table, '', 'parti-jax COMMAND --help explains one.']),
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
