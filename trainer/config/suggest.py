"""The nearest known name, for messages about a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the known name nearest to `name`; "" if none is near.

  Case is ignored, since it is the commonest mistake of all.
  """
  by_lower_case = {candidate.lower(): candidate for candidate in sorted(known)}
  near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
  return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""
