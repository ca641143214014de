"""Prints every combination of the parity test: -m tests.distribute.parity_table.

One table of 24 rows per loss, printed when complete; then the number of failed rows.
"""

from __future__ import annotations

import sys

from tests.distribute.parity_test import ALL, LOSSES, errors_of
from trainer.distribute.strategy import divide_cpu, mirrored_on_cpu
from trainer.training import parity


def main() -> int:
  divide_cpu(4)
  strategies = {number: mirrored_on_cpu(number) for number in (1, 2, 4)}
  num_rows = num_failures = 0
  for loss in sorted(LOSSES):
    rows = [
      (" ".join([loss, *map(str, case)]), errors_of(strategies.get, loss, *case))
      for case in ALL
    ]
    print(parity.table(rows), flush=True)
    num_rows += len(rows)
    num_failures += sum(not parity.is_equal(found) for _, found in rows)
  print(f"{num_rows} rows, {num_failures} failures")
  return 1 if num_failures else 0


if __name__ == "__main__":
  sys.exit(main())
