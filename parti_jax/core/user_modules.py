"""Imports the modules that a user names with `--import`."""

import importlib

from parti_jax.core.errors import UserError

FLAG = '--import'

_loaded: list[str] = []


def load(name: str) -> None:
  """Imports a module.

  Args:
    name: the module's full name, such as mine.kinds.

  Raises:
    UserError: the module doesn't exist, or it fails when it is imported. The message names it.
  """
  flag = f'{FLAG}={name}'
  _loaded.append(name)
  try:
    importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
      raise UserError(f'{flag}: it imports a missing module: {error}') from error
    raise UserError(
      f'{flag}: there is no module {error.name}; install it, or put its folder in PYTHONPATH'
    ) from error
  except UserError as error:
    raise UserError(f'{flag}: {error}') from error
  except (Exception, SystemExit) as error:
    raise UserError(f'{flag}: {type(error).__name__}: {error}') from error


def loaded() -> bool:
  """Returns whether `load` has imported a module, which may have changed the package."""
  return bool(_loaded)
