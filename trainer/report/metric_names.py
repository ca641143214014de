"""What metrics are called on a page, and which come first."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.retrieval import results

_PREFIX = "eval/"
_WORDS = {"map": "mAP", "ndcg": "nDCG"}


def title(name: str) -> str:
  """A metric as the field writes it, such as recall@1.

  Args:
    name: such as "eval/recall_at_1", with or without "eval/".
  """
  name = name if name.startswith(_PREFIX) else _PREFIX + name
  base, at, k = name[len(_PREFIX) :].rpartition("_at_")
  generic = f"{_WORDS.get(base, base)}@{k}" if at else k
  return results.titles([name]).get(name, generic.replace("_", " "))


def ordered(names: Iterable[str]) -> tuple[list[str], list[str]]:
  """The metrics that are shown at once, and the others, in the order given.

  Args:
    names: such as "eval/recall_at_1"; what has no such prefix is left out.
  """
  known = [name for name in dict.fromkeys(names) if name.startswith(_PREFIX)]
  first = list(results.titles(known))
  return first, [name for name in known if name not in first]
