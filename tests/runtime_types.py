"""Checks the shapes and types in annotations whenever a test calls what they annotate."""

import inspect
import re

import beartype
import jaxtyping

_PACKAGES = [
  f'parti_jax.{name}'
  for name in ('exported_model', 'models', 'partitioning', 'sampling', 'training')
]
_KINDS = [
  name
  for name, kind in vars(jaxtyping).items()
  if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype)
]
_HAS_SHAPES = re.compile(rf'\b({"|".join(_KINDS)})\[')

# An int is a float, as type checkers see it too.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def _has_shapes(function) -> bool:
  """Whether a function's annotations give the shape of an array.

  Others are left alone: what users call checks its arguments itself, and tests pass it wrong ones.
  So are the fields of dataclasses, because JAX puts anything into those that are pytrees.
  """
  annotations = [] if inspect.isclass(function) else function.__annotations__.values()
  return any(_HAS_SHAPES.search(str(annotation)) for annotation in annotations)


def install() -> None:
  """Has the packages that give shapes checked, once they are imported."""
  wrap = jaxtyping.jaxtyped

  def jaxtyped(**options):
    return lambda function: wrap(**options)(function) if _has_shapes(function) else function

  jaxtyping.jaxtyped = jaxtyped  # The hook puts it before every function and class.
  jaxtyping.install_import_hook(_PACKAGES, f'{__name__}.check')
