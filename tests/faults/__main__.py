"""python -m tests.faults [--only=NAME] [--soak=100]: the fault table, with real faults.

--soak kills runs N times at random moments, ten times per run, alternating between one
and two replicas, and prints how many ended equal.
"""

from __future__ import annotations

import argparse
import random
import tempfile

from tests.faults import table
from tests.faults.every_row import ROWS
from tests.faults.kills import EQUAL, ended_as, kill_at_random
from tests.faults.runs import Runs

_KILLS_A_RUN = 10


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="part of the names of rows")
  parser.add_argument("--soak", type=int, default=0, help="number of kills")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    runs = Runs(folder)
    if options.soak:
      return _soak(runs, options.soak)
    return _print_rows(runs, options.only)


def _print_rows(runs, only):
  print(table.header(), flush=True)
  failed = 0
  for name, row_fn in ROWS.items():
    if only in name:
      outcome = _outcome(row_fn, runs)
      failed += outcome.seen != outcome.expected
      print(table.as_text(name, outcome), flush=True)
  print(f"{failed} rows are not as expected")
  return int(failed > 0)


def _outcome(row_fn, runs):
  try:
    return row_fn(runs)
  except Exception as error:  # A failing row must not hide the others.
    words = " ".join(str(error).split())
    return table.Outcome("", f"{type(error).__name__}: {words}", 0.0)


def _soak(runs, num_kills):
  seed = random.SystemRandom().randrange(10**6)
  print(f"seed {seed}", flush=True)
  equal = ended = lost = killed = 0
  while killed < num_kills:
    num_replicas = 1 + ended % 2
    name = f"soak-{ended}"
    kills = min(_KILLS_A_RUN, num_kills - killed)
    status, _, lost_steps = kill_at_random(
      runs, name, num_replicas=num_replicas, num_kills=kills, seed=seed + ended
    )
    seen = ended_as(status, runs.folder / name, runs.finished(num_replicas))
    killed, ended, lost = killed + kills, ended + 1, lost + lost_steps
    equal += seen == EQUAL
    print(f"{num_replicas} replicas, {kills} kills: {seen}", flush=True)
  print(f"{killed} kills, {equal} of {ended} runs ended equal, {lost} steps done again")
  return int(equal != ended)


if __name__ == "__main__":
  raise SystemExit(main())
