"""Two runs in one folder."""

from __future__ import annotations

import signal

from tests.faults.kills import EQUAL, ended_as
from tests.faults.runs import Runs
from tests.faults.stops import harmful
from tests.faults.table import Outcome, row


@row
def second_run_in_the_folder(runs: Runs) -> Outcome:
  """Started twice, then the first gets SIGKILL; one folder, while the first trains."""
  name, file = "shared", runs.folder / "shared-hangs"
  model_dir = runs.folder / name
  file.write_text("")
  first = runs.start(name, *harmful(hang_file=str(file)))
  first.wait_until(lambda: first.said("writing to"))
  second = runs.start(name, *harmful(hang_file=str(file)))
  status, seconds = second.wait()
  is_named = f"error: process {first.pid} of " in second.last_line()
  first.tell(signal.SIGKILL)
  first.wait()
  file.unlink()
  again, _ = runs.start(name, *harmful(hang_file=str(file))).wait()
  seen = f"{status}, the first named: {is_named}; then "
  seen += ended_as(again, model_dir, runs.finished(1))
  return Outcome(f"2, the first named: True; then {EQUAL}", seen, seconds)
