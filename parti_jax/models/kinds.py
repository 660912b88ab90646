"""The kinds of a part of a model, by their names in config.json and in checkpoints.

A part, such as the image tokenizer, may be one of several networks. Each is a kind: a config class, and
functions that take such a config. `image_tokenizers`, `text_encoders`, `rankers` and `upscalers` have
a `Kinds` each. `register` adds to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import Protocol
from typing import TypeVar

from parti_jax.core import errors
from parti_jax.models import config_checks

# What to do about an unknown kind, for messages.
REMEDY = (
  'a kind of your own is known once the module that registers it is imported: by a line '
  '`import MODULE` in a gin file, by --import=MODULE on the command line, or in Python'
)


def remedy(kinds: Mapping[str, type]) -> str:
  """Returns the end of a message on an unknown kind: what to do, if kinds can be registered."""
  return f'; {REMEDY}' if isinstance(kinds, Configs) else ''


class HasConfig(Protocol):
  """What all kinds have."""

  @property
  def config(self) -> type:
    """Its config class."""


_Kind = TypeVar('_Kind', bound=HasConfig)


class Configs(Mapping[str, type]):
  """The config classes of a part's kinds, by the names of the kinds."""

  def __init__(self, part: str, module: str, protocol: type, classes: Mapping[str, type]):
    """Takes the classes that this package has.

    Args:
      part: what the kinds are, with an article, such as 'a ranker'; for messages.
      module: name of the module whose `register` adds a kind; for messages.
      protocol: the class, a Protocol, that says what a config must have.
      classes: {name: class}.
    """
    self.part, self._module, self._protocol = part, module, protocol
    self._classes = dict(classes)

  def __getitem__(self, name: str) -> type:
    return self._classes[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._classes)

  def __len__(self) -> int:
    return len(self._classes)

  def name_of(self, config: Any) -> str:
    """Returns the name of a config's kind.

    Raises:
      UserError: if it is of none.
    """
    name = config_checks.kind_name(self._classes, config)
    if name is None:
      known = ', '.join(f'{name} ({kind.__name__})' for name, kind in self._classes.items())
      raise errors.UserError(
        f'{type(config).__name__} is not the config of {self.part}; the kinds are {known}; {REMEDY}'
      )
    return name

  def add(self, name: str, config: type, protocol: type | None = None) -> None:
    """Adds a class. One of the same module and name replaces an earlier one.

    Args:
      name: name of its kind.
      config: the class.
      protocol: what it must have, if that is more than for all kinds.

    Raises:
      UserError: if the name is invalid or taken, or the class lacks something.
    """
    where = f'{self._module}.register'
    if not isinstance(name, str) or not name.isidentifier():
      raise errors.UserError(
        f'{where}: the name {name!r} must consist of letters, digits and underscores'
      )
    known = self._classes.get(name)
    origin = lambda kind: (kind.__module__, kind.__qualname__)
    if known and origin(known) != origin(config):
      raise errors.UserError(
        f'{where}: the kind {name!r} is {known.__module__}.{known.__qualname__}; choose another name'
      )
    parameters = getattr(config, '__dataclass_params__', None)
    if parameters is None or not parameters.frozen:
      raise errors.UserError(f'{where}: {config.__qualname__} must be a frozen dataclass')
    fields = {field.name for field in dataclasses.fields(config)}
    if 'kind' in fields:
      raise errors.UserError(
        f"{where}: rename {config.__qualname__}.kind; config.json has the kind's name there"
      )
    if 'dtype' not in fields:
      raise errors.UserError(
        f'{where}: {config.__qualname__} needs a field dtype, which sampling sets'
      )
    members = _members(protocol or self._protocol)
    if missing := [name for name in members if name not in fields and not hasattr(config, name)]:
      raise errors.UserError(
        f'{where}: {config.__qualname__} has no {", ".join(missing)}; add fields or properties of '
        'these names'
      )
    self._classes[name] = config

  def remove(self, name: str) -> None:
    """Removes a class, for tests."""
    del self._classes[name]


class Kinds(Mapping[str, _Kind]):
  """The kinds of a part, by their names.

  Attributes:
    configs: their config classes.
  """

  def __init__(self, configs: Configs, kinds: Mapping[str, _Kind]):
    """Takes the kinds that this package has.

    Args:
      configs: their config classes, under the same names.
      kinds: {name: kind}.
    """
    assert {name: kind.config for name, kind in kinds.items()} == dict(configs)
    self.configs = configs
    self._kinds = dict(kinds)

  @classmethod
  def of_part(
    cls, part: str, module: str, protocol: type, kinds: Mapping[str, _Kind]
  ) -> Kinds[_Kind]:
    """Returns the kinds of a part; the arguments are those of `Configs`."""
    classes = {name: kind.config for name, kind in kinds.items()}
    return cls(Configs(part, module, protocol, classes), kinds)

  def __getitem__(self, name: str) -> _Kind:
    return self._kinds[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._kinds)

  def __len__(self) -> int:
    return len(self._kinds)

  def of(self, config: Any) -> _Kind:
    """Returns the kind of a config; raises UserError if it is of none."""
    return self._kinds[self.configs.name_of(config)]

  def register(self, name: str, kind: _Kind, protocol: type | None = None) -> None:
    """Adds a kind; the arguments are those of `Configs.add`."""
    self.configs.add(name, kind.config, protocol)
    self._kinds[name] = kind

  def remove(self, name: str) -> None:
    """Removes a kind, for tests."""
    self.configs.remove(name)
    del self._kinds[name]


def _members(protocol: type) -> list[str]:
  """Returns the names that a Protocol and those that it extends define."""
  return [name for owner in protocol.__mro__ for name in vars(owner) if not name.startswith('_')]
