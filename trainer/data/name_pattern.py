"""Regular expressions of the user's that take a part out of a name."""

from __future__ import annotations

import re
from typing import Optional

from trainer.errors import UserError


class NamePattern:
  """A regular expression whose first group, searched in a name, is what is wanted.

  Args:
    pattern: the expression.
    parameter: where the user gives it, for the message.

  Raises:
    UserError: it is no regular expression, or has no group.
  """

  def __init__(self, pattern: str, parameter: str):
    try:
      self._pattern = re.compile(pattern)
    except re.error as error:
      raise UserError(
        f"{parameter}={pattern!r} is no regular expression: {error}."
      ) from error
    if not self._pattern.groups:
      raise UserError(
        f"{parameter}={pattern!r} has no group; put what it shall take of a name into "
        "parentheses."
      )

  def part_of(self, name: str) -> Optional[str]:
    """What the first group matches; None where that is nothing."""
    found = self._pattern.search(name)
    return None if found is None else found[1]
