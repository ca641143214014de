"""A counter of the work that was done, for whoever watches that it goes on."""

from __future__ import annotations

import itertools

_beats = itertools.count(1)
_last = 0


def beat() -> None:
  """Says that something was done."""
  global _last
  _last = next(_beats)


def count() -> int:
  """How often something was done."""
  return _last
