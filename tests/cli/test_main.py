"""Tests the command line: its table, its errors and its exit statuses."""

import subprocess
import sys
import types

import pytest

import parti_jax
from parti_jax.cli import main
from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError


@pytest.fixture(name='command')
def _command(monkeypatch):
  """Adds the command `echo` to the table; `command.run` sets its `run`."""
  module = types.ModuleType('echo_command')
  module.add_arguments = lambda parser: parser.add_argument('--number', type=int, default=3)
  module.run = lambda args: args.number
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(main.COMMANDS, 'echo', (module.__name__, 'say it again'))
  return module


def _with_gin(module):
  """Gives a command the argument for gin, and records its arguments."""
  seen = []
  module.add_arguments = lambda parser: parser.add_argument('--gin_file', action='append')
  module.run = lambda args: seen.extend(args.gin_bindings) or 0
  return seen


def test_status_is_the_commands(command):
  del command
  assert main.main(['echo', '--number=5']) == 5
  assert main.main(['echo']) == 3


def test_help_lists_all_commands(capsys):
  assert main.main(['--help']) == 0
  printed = capsys.readouterr().out
  for name, (_, summary) in main.COMMANDS.items():
    assert f'  {name}' in printed and summary in printed
  assert 'in JAX and Flax.' in printed and 'imported' not in printed


@pytest.mark.parametrize(
  'argument, reason',
  [
    ('--numbr=2', 'unrecognized arguments: --numbr=2; did you mean --number? see'),
    ('more', 'unrecognized arguments: more; see'),
    ('--number=x', "argument --number: invalid int value: 'x'; see"),
  ],
)
def test_errors_of_flags_are_one_line(command, capsys, argument, reason):
  del command
  assert main.main(['echo', argument]) == 2
  message = f'parti-jax echo: error: {reason} parti-jax echo --help\n'
  assert capsys.readouterr().err == message


def test_help_of_a_command(command, capsys):
  del command
  assert main.main(['echo', '--help']) == 0
  printed = capsys.readouterr().out
  assert 'parti-jax echo' in printed and '--number' in printed and 'Say it again.' in printed


def test_version(capsys):
  assert main.main(['--version']) == 0
  assert capsys.readouterr().out == f'parti_jax {parti_jax.__version__}\n'


def test_no_command_is_an_error(capsys):
  assert main.main([]) == 2
  assert 'no command given' in capsys.readouterr().err


@pytest.mark.parametrize(
  'name, hint',
  [
    ('generat', 'did you mean generate?'),
    ('trian', 'did you mean train?'),
    ('xyz', 'the commands are generate, serve, ui, '),
  ],
)
def test_unknown_command(name, hint, capsys):
  assert main.main([name]) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith(f"parti-jax: error: unknown command '{name}'; {hint}")
  assert printed.err.count('\n') == 1 and not printed.out


def test_bad_flag(command, capsys):
  del command
  assert main.main(['echo', '--numbr=3']) == 2
  assert '--numbr=3' in capsys.readouterr().err
  assert main.main(['echo', '--numb=3']) == 2  # No abbreviations.
  assert main.main(['echo', '--number=x']) == 2


def test_user_error_is_one_line(command, capsys):
  def run(args):
    raise UserError('prompts.txt: no prompt\nin it')

  command.run = run
  assert main.main(['echo']) == 2
  assert capsys.readouterr().err == 'parti-jax: error: prompts.txt: no prompt in it\n'


def test_other_errors_are_not_hidden(command):
  def run(args):
    raise ValueError('a defect')

  command.run = run
  with pytest.raises(ValueError, match='a defect'):
    main.main(['echo'])


_CRASH = """
import sys, threading, types
from parti_jax.cli import main
def crash(args):
  threading.Thread(target=threading.Event().wait).start()
  raise RuntimeError('boom')
module = types.ModuleType('crash')
module.add_arguments, module.run = lambda parser: None, crash
sys.modules['crash'], main.COMMANDS['crash'] = module, ('crash', 'fail')
main._SECONDS_TO_END = 0.2
sys.argv = ['parti-jax', 'crash']
main.main()
"""


@pytest.mark.process
def test_a_crash_ends_although_a_thread_does_not():
  done = subprocess.run(
    [sys.executable, '-c', _CRASH], capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 1 and 'RuntimeError: boom' in done.stderr, done.stderr


def test_interrupt(command, capsys):
  def run(args):
    raise KeyboardInterrupt

  command.run = run
  assert main.main(['echo']) == 130
  assert capsys.readouterr().err == 'parti-jax: interrupted\n'


_INTERRUPTED = """
import atexit, os, sys, types
from parti_jax.cli import main
atexit.register(os._exit, 7)  # Stands for a crash when the interpreter ends.
def interrupted(args):
  atexit.register(print, 'cleaned up')
  raise KeyboardInterrupt
module = types.ModuleType('interrupted')
module.add_arguments, module.run = lambda parser: None, interrupted
sys.modules['interrupted'], main.COMMANDS['slow'] = module, ('interrupted', 'wait')
sys.argv = ['parti-jax', 'slow']
sys.exit(main.main())
"""


@pytest.mark.process
def test_an_interrupted_process_can_not_crash_at_its_end():
  done = subprocess.run(
    [sys.executable, '-c', _INTERRUPTED], capture_output=True, text=True, timeout=120, check=False
  )
  assert (done.returncode, done.stdout) == (130, 'cleaned up\n'), done.stderr
  assert done.stderr == 'parti-jax: interrupted\n'


def test_missing_optional_package_names_its_extra(command, capsys):
  def run(args):
    raise ModuleNotFoundError("No module named 'seqio.vocabularies'", name='seqio.vocabularies')

  command.run = run
  assert main.main(['echo']) == 2
  printed = capsys.readouterr().err
  assert 'the package seqio' in printed and 'pip install "parti_jax[data]"' in printed


def test_missing_module_of_another_kind_is_not_hidden(command):
  def run(args):
    raise ModuleNotFoundError("No module named 'parti_jax.nothing'", name='parti_jax.nothing')

  command.run = run
  with pytest.raises(ModuleNotFoundError):
    main.main(['echo'])


def test_missing_extra_reads_only_names_of_modules():
  assert optional_packages.missing_extra(ImportError('cannot import name tensorflow')) is None
  message = optional_packages.missing_extra(ImportError("No module named 't5x'"))
  assert 'parti_jax[t5x]' in message


@pytest.mark.parametrize(
  'argv, rest, bindings',
  [
    (['train', '--gin.a.b=1', '--x=2'], ['train', '--x=2'], ['a.b=1']),
    (['--gin.a.b=1', 'train'], ['train'], ['a.b=1']),
    (['train', '--gin.a.b', '1', 'y'], ['train', 'y'], ['a.b=1']),
    (['train', "--gin.a.b='x=y'"], ['train'], ["a.b='x=y'"]),
    (['train', '--gin.a.b', '-1'], ['train'], ['a.b=-1']),
    (['train', '--gin.A=1', '--gin.A=2'], ['train'], ['A=1', 'A=2']),
    (['train', '--gin_file=f'], ['train', '--gin_file=f'], []),
    (['generate', '--', '--gin.a=1'], ['generate', '--', '--gin.a=1'], []),
  ],
)
def test_split_gin_bindings(argv, rest, bindings):
  assert main.split_gin_bindings(argv) == (rest, bindings)


@pytest.mark.parametrize('argv', [['--gin.a.b'], ['--gin.a.b='], ['--gin.=3']])
def test_gin_binding_without_name_or_value(argv, capsys):
  assert main.main(['train', *argv]) == 2
  assert 'write --gin.NAME=VALUE' in capsys.readouterr().err


def test_gin_bindings_reach_the_command(command):
  seen = _with_gin(command)
  assert main.main(['--gin.a.b=1', 'echo', '--gin.c.d', '2']) == 0
  assert seen == ['a.b=1', 'c.d=2']


def test_gin_bindings_for_a_command_without_gin(command, capsys):
  del command
  assert main.main(['echo', '--gin.a.b=1']) == 2
  assert "the command 'echo' takes no gin values" in capsys.readouterr().err


@pytest.mark.process
def test_help_and_unknown_commands_import_neither_jax_nor_gin():
  code = (
    'import sys\nfrom parti_jax.cli import main\nmain.main(["--help"])\nmain.main(["no"])\n'
    'print(sorted({"jax", "gin", "numpy", "tensorflow"} & set(sys.modules)))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines()[-1] == '[]'


@pytest.mark.process
def test_train_as_a_module():
  done = subprocess.run(
    [sys.executable, '-m', 'parti_jax.train', '--gin.steps'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('parti-jax: error: --gin.steps: no value')


@pytest.mark.parametrize(
  'command',
  [
    ['generate', 'red apple', '--output_dir'],
    ['vocabulary', '--output'],
    ['tokenize', '--tokenizer=nowhere', '--output_dir'],
    ['evaluate', '--output_dir'],
    ['export', '--base=nowhere', '--output_dir'],
    ['plan', '--json'],
  ],
)
def test_outputs_that_cannot_be_written_are_refused_before_reading(tmp_path, capsys, command):
  (tmp_path / 'file').write_text('')
  *first, flag = command
  assert main.main([*first, f'{flag}={tmp_path}/file/below']) == 2
  assert capsys.readouterr().err.startswith(
    f'parti-jax: error: {flag}={tmp_path}/file/below: {tmp_path}/file is not a folder'
  )


def test_errors_of_a_closed_event_loop_are_not_shown():
  shown = []
  for error in (RuntimeError('Event loop is closed'), RuntimeError('another'), KeyError('a')):
    main._unraisable(shown.append, types.SimpleNamespace(exc_value=error))
  assert [str(found.exc_value) for found in shown] == ['another', "'a'"]
