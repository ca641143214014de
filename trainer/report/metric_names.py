"""What metrics are called on a page, and which come first."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.retrieval import results

_PREFIX = "eval/"


def title(name: str) -> str:
  """A metric as the field writes it, such as recall@1.

  Args:
    name: such as "eval/recall_at_1", with or without "eval/".
  """
  name = name if name.startswith(_PREFIX) else _PREFIX + name
  generic = re.sub(r"_at_(\d+)$", r"@\1", name[len(_PREFIX) :]).replace("_", " ")
  return results.titles([name]).get(name, generic)


def ordered(names: Iterable[str]) -> tuple[list[str], list[str]]:
  """The metrics that are shown at once, and the others, in the order given.

  Args:
    names: such as "eval/recall_at_1"; what has no such prefix is left out.
  """
  known = [name for name in dict.fromkeys(names) if name.startswith(_PREFIX)]
  first = list(results.titles(known))
  return first, [name for name in known if name not in first]
