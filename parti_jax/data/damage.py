"""Describes data that can't be read or used."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Damaged:
  """An example that can't be read; it keeps its position until it is counted.

  Attributes:
    reason: a short description, for the count.
    name: the example's name in its file, if it has one.
    file: the file with the example, which a warning names; '' for no warning.
  """

  reason: str
  name: str = ''
  file: str = ''

  @property
  def where(self) -> str:
    """The file, and the name within it, for a warning."""
    return f'{self.file}, {self.name!r}' if self.name and self.file else self.file


class Unusable(Exception):
  """An example can't be used; the message is a short reason."""
