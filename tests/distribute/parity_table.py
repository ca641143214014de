"""Prints every combination of the parity test: -m tests.distribute.parity_table."""

from __future__ import annotations

import sys

from tests.distribute.parity_test import ALL, LOSSES, errors_of
from trainer.distribute.strategy import divide_cpu, mirrored_on_cpu
from trainer.loop import parity


def main() -> int:
  divide_cpu(4)
  strategies = {number: mirrored_on_cpu(number) for number in (1, 2, 4)}
  rows = []
  for loss in sorted(LOSSES):
    for case in ALL:
      found = errors_of(strategies.get, loss, *case)
      rows.append((" ".join([loss, *map(str, case)]), found))
  print(parity.table(rows))
  return 0 if all(parity.is_equal(found) for _, found in rows) else 1


if __name__ == "__main__":
  sys.exit(main())
