"""Command line of a sweep; checks everything before the first run."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from trainer import errors, task
from trainer.config import gin_statements
from trainer.runtime import shutdown
from trainer.sweep import points as points_lib
from trainer.sweep import spec, sweep_results
from trainer.sweep.run_process import RunFolder

if TYPE_CHECKING:
  from trainer.sweep.study import SweepStudy, Worker

_USAGE = """python -m trainer.sweep SWEEP.gin [flags] [-- flags of trainer.task]

The same command resumes the sweep. Run it on several machines with the same folders to
share the runs."""
_REFRESH_S = 1.0


def main(arguments: Sequence[str]) -> int:
  """Runs the command line.

  Args:
    arguments: with the program's name first, as `sys.argv`.

  Returns:
    The exit status: 0 when every run is done, 1 when some failed, 2 for a user error, 3
    when a stop was requested, 130 when interrupted.
  """
  return task.run_command(arguments, help_text, lambda: _run(*_parse(arguments)))


def define_flags() -> flags.FlagValues:
  """Defines the flags of the sweep."""
  values = flags.FlagValues()
  flags.DEFINE_string(
    "sweep_dir", None, "Folder of the results. [runs/sweeps/NAME]", flag_values=values
  )
  flags.DEFINE_string(
    "runs_dir",
    os.path.join("runs", "points"),
    "Folder of all runs, shared by all sweeps.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_parallel", 1, "Number of parallel runs.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_list(
    "devices", [], "GPUs, such as 0,1,2; one run at a time on each.", flag_values=values
  )
  flags.DEFINE_string(
    "storage",
    None,
    "URL of a database for the study. [a file in sweep_dir]",
    flag_values=values,
  )
  flags.DEFINE_bool("retry", False, "Run failed runs again.", flag_values=values)
  flags.DEFINE_bool("dry_run", False, "List the points and exit.", flag_values=values)
  return values


def help_text() -> str:
  """Returns the text of `--help`."""
  return "\n".join([_USAGE, "", *task.flag_lines(define_flags(), width=14)])


def _parse(
  arguments: Sequence[str],
) -> tuple[str, flags.FlagValues, Sequence[str]]:
  """Parses the sweep file, its flags, and those of the task.

  Raises:
    UserError: a flag is unknown, or there is not exactly one sweep file.
  """
  own, task_flags = list(arguments), []
  if "--" in own:
    place = own.index("--")
    own, task_flags = own[:place], own[place + 1 :]
  values = define_flags()
  try:
    _, *rest = values(own)
  except flags.Error as error:
    raise errors.UserError(f"{str(error).rstrip(' .?')}. See --help.") from error
  if len(rest) != 1:
    raise errors.UserError(f"one sweep file is needed, {len(rest)} given. See --help.")
  if values.devices and values["num_parallel"].present:
    raise errors.UserError(
      "--num_parallel and --devices exclude each other: each device has one run."
    )
  for flag in task_flags:
    name = flag.lstrip("-").partition("=")[0]
    if name not in task.define_flags()["hardware"]:
      known = list(task.define_flags()["hardware"])
      raise errors.UserError(
        f"{flag!r} is not a flag for hardware; the sweep sets the other flags"
        f"{gin_statements.nearest_name(name, known)}"
      )
  return rest[0], values, task_flags


def _run(path: str, values: flags.FlagValues, task_flags: Sequence[str]) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  flags.FLAGS(["trainer"])
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  from trainer.sweep import study  # Late: it needs Optuna, which is an extra.

  importlib.import_module("trainer.gin_registrations")
  read = spec.read_spec(path)
  builder = points_lib.PointBuilder(read)
  is_listed = read.options.method != "tpe"
  list_fn = points_lib.listed if is_listed else points_lib.extremes
  known = list_fn(read, builder)  # Checks each of them like a run.
  for name in (read.options.metric, read.options.prune_metric):
    if name:
      _check_metric(name, known[0])
  if values.dry_run:
    _print_points(known, read, values.runs_dir)
    return errors.DONE
  folder = values.sweep_dir or os.path.join("runs", "sweeps", read.name)
  sweep_results.open_sweep_folder(read, folder)
  _make(values.runs_dir, "runs_dir")
  machine = study.Machine(
    runs_dir=values.runs_dir,
    devices=values.devices or (None,) * values.num_parallel,
    task_flags=task_flags,
  )
  listed = known if is_listed else None
  shared = study.SweepStudy(
    read, builder, folder, listed=listed, storage=values.storage
  )
  with contextlib.closing(shared):
    own = study.Worker(shared, read.options, machine)
    if values.retry:
      for point in shared.points():
        own.folder(point).forget_failure()
    shared.requeue_unconfirmed(own.folder)
    return _work(own, shared, read, folder)


def _work(worker: Worker, study: SweepStudy, read: spec.Spec, folder: str) -> int:
  """Runs all trials, and shows and writes their results."""

  def collect_rows() -> list[sweep_results.SweepRow]:
    return sweep_results.collect_rows(
      study.points(), worker.folder, read.options, set(worker.running)
    )

  live = sweep_results.LiveTable(read.options.metric)
  with _stopped_by_signals(worker.stop) as received:
    with concurrent.futures.ThreadPoolExecutor(worker.num_devices) as pool:
      futures = worker.start(pool)
      left = set(futures)
      while left:
        _, left = concurrent.futures.wait(left, _REFRESH_S)
        live.show(collect_rows())
    rows = collect_rows()
    sweep_results.write_results(rows, read, folder)
  for future in futures:
    future.result()
  print(sweep_results.table_text(rows, read.options.metric))
  for name in (sweep_results.CSV_FILE, sweep_results.PAGE_FILE):
    print(os.path.join(folder, name))
  if received:
    print("stopped; run the same command again to resume.", file=sys.stderr)
    is_interrupt = received[0] == signal.SIGINT
    return errors.INTERRUPTED if is_interrupt else errors.PreemptedError.exit_status
  has_failed = any(
    run.state == sweep_results.FAILED for row in rows for run in row.runs
  )
  return errors.FAILURE if has_failed else errors.DONE


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[list[int]]:
  """Sets `stop` on Ctrl-C and on SIGTERM; yields the signals received."""
  received: list[int] = []

  def note(number, frame):
    del frame
    received.append(number)
    stop.set()

  with shutdown.handlers_restored():
    for number in shutdown.SIGNALS:
      signal.signal(number, note)
    yield received


def _check_metric(name: str, point: points_lib.Point) -> None:
  """Raises if a metric is neither logged nor evaluated."""
  from trainer.retrieval import metrics, ranking
  from trainer.training import callbacks  # Imported late: --help does not need it.

  ks = ast.literal_eval(point.config.values.get("evaluate.ks", "(1, 5, 10)"))
  known = [
    *callbacks.LOGGED,
    *ranking.metric_names(ks),
    *metrics.Verification().metric_names(),
    "eval/nmi",
  ]
  if name not in known:
    raise errors.UserError(
      f"sweep.metric: {name!r} is neither logged nor measured"
      f"{gin_statements.nearest_name(name, known) or '; use ' + ', '.join(known)}"
    )


def _print_points(
  known: Sequence[points_lib.Point], read: spec.Spec, runs_dir: str
) -> None:
  """Prints the state of the points, and then each with the name of its run's folder."""

  def folder_fn(point: points_lib.Point) -> RunFolder:
    return RunFolder(runs_dir, point, read.options.mode)

  rows = sweep_results.collect_rows(known, folder_fn, read.options, ())
  print(sweep_results.table_text(rows, read.options.metric, num_shown=len(rows)))
  for point in known:
    print(f"{point.run_id}  {point}")


def _make(folder: str, flag: str) -> None:
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--{flag}={folder} can't be created: {error.strerror}."
    ) from error


if __name__ == "__main__":
  sys.exit(main(sys.argv))
