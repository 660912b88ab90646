"""What can't be read or used of the data, and why."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Damaged:
  """Something that can't be read; it keeps its place among the examples until it is counted.

  Attributes:
    reason: what it is, in a few words, for the count.
    name: what it is called in its file, if it has a name.
    file: the file that it is in, which a warning names; '' for no warning.
  """

  reason: str
  name: str = ''
  file: str = ''

  @property
  def where(self) -> str:
    """The file, and the name in it, for a warning."""
    return f'{self.file}, {self.name!r}' if self.name and self.file else self.file


class Unusable(Exception):
  """An example can't be used; the message is the reason in a few words."""
