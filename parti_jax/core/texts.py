"""Numbers as text, for people."""


def short_count(count: int) -> str:
  """Returns a number in three or more digits, such as '27,840', '4.0M' or '20.23B'."""
  if count < 1e6:
    return f'{count:,}'
  return f'{count / 1e6:.1f}M' if count < 1e9 else f'{count / 1e9:.2f}B'


def counted(count: int, noun: str) -> str:
  """Returns a number with its noun in the singular or plural, such as '1 device'."""
  return f'{count:,} {noun}' if count == 1 else f'{count:,} {noun}s'
