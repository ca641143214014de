"""The command line: converts flags to a `Run`, and errors to an exit status.

Heavy modules are imported only after the mode is known to be valid, so that `--help`
and a misspelt flag respond at once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging as python_logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from trainer import errors
from trainer.runtime import shutdown

STRATEGIES = ("auto", "cpu", "mirrored", "multi_worker", "tpu")
_RUN_ERRORS = (
  errors.CheckFailedError,
  errors.UserError,
  errors.PreemptedError,
  errors.StalledError,
  errors.NotFiniteError,
  errors.WorkerFailedError,
)


@dataclasses.dataclass(frozen=True)
class Mode:
  """A value of `--mode`.

  Attributes:
    summary: one line for `--help`.
    module: the module with `main(run)`.
    roots: the gin roots that it calls; all their required parameters must be set.
  """

  summary: str
  module: str
  roots: Sequence[str]


MODES = {
  "ingest": Mode("Convert raw data to records.", "trainer.cli.ingest", ("ingest",)),
  "validate": Mode(
    "Check data and batches before training.", "trainer.cli.validate", ("validate",)
  ),
  "train": Mode("Train, or resume a run.", "trainer.cli.train", ("train",)),
  "evaluate": Mode("Evaluate retrieval.", "trainer.cli.evaluate", ("evaluate",)),
  "train_and_evaluate": Mode(
    "Ingest if needed, train, evaluate before and after.",
    "trainer.cli.train_and_evaluate",
    ("train", "evaluate"),
  ),
  "follow": Mode(
    "Evaluate each checkpoint of a running training.",
    "trainer.cli.follow",
    ("evaluate",),
  ),
  "mine": Mode(
    "Mine a round for each checkpoint of a running training.",
    "trainer.cli.mine",
    ("mine", "evaluate"),
  ),
  "embed": Mode("Write embeddings of records.", "trainer.cli.embed", ("evaluate",)),
  "index": Mode("Index embeddings for fast search.", "trainer.cli.index", ()),
  "search": Mode(
    "Search for the nearest items to --query.", "trainer.cli.search", ("evaluate",)
  ),
  "export": Mode(
    "Write a self-contained SavedModel.", "trainer.cli.export", ("evaluate",)
  ),
  "check": Mode(
    "Compare 1, 2 and 4 virtual replicas on this run.", "trainer.cli.check", ("train",)
  ),
}


def main(arguments: Sequence[str]) -> int:
  """Runs the command line.

  Args:
    arguments: as `sys.argv`, with the program's name first.

  Returns:
    The exit status.
  """

  def run() -> int:
    values = _parse(arguments)
    with shutdown.listening_for_signals(values.grace_s):
      _run(values)
    return errors.DONE

  return run_command(arguments, help_text, run)


def run_command(
  arguments: Sequence[str], help_fn: Callable[[], str], run_fn: Callable[[], int]
) -> int:
  """Runs a command line, or prints its help; prints an error of a run in one line.

  Args:
    arguments: with the program's name first.
    help_fn: returns the text of `--help`.
    run_fn: runs the command and returns its exit status.

  Returns:
    The exit status, also that of an error.
  """
  try:
    if {"-h", "--help", "-help"} & set(arguments[1:]):
      print(help_fn())
      return errors.DONE
    return run_fn()
  except _RUN_ERRORS as error:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return error.exit_status
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return errors.INTERRUPTED
  except Exception as error:
    full = errors.out_of_space(error)
    if full is None:
      raise
    print(f"error: {_one_line(full)}", file=sys.stderr)
    return full.exit_status


def define_flags() -> dict[str, flags.FlagValues]:
  """Returns the flags by group, separate from those that absl's modules define."""
  what, where, hardware, search = (flags.FlagValues() for _ in range(4))
  flags.DEFINE_enum("mode", None, list(MODES), "Mode.", what)
  flags.DEFINE_multi_string("gin_file", [], "Config file (repeatable).", what)
  define_gin_flags(what)
  flags.DEFINE_string("model_dir", None, "Folder of the run's outputs.", where)
  flags.DEFINE_bool(
    "allow_config_change", False, "Continue in a model_dir with another config.", where
  )
  flags.DEFINE_enum("strategy", "auto", STRATEGIES, "Distribution strategy.", hardware)
  flags.DEFINE_integer(
    *("num_virtual_replicas", 1, "Virtual replicas on one CPU."),
    lower_bound=1,
    flag_values=hardware,
  )
  flags.DEFINE_string("tpu", None, "'local' for the attached TPU.", hardware)
  define_seconds = functools.partial(
    flags.DEFINE_float, lower_bound=0.0, flag_values=hardware
  )
  define_seconds("worker_timeout_s", 300.0, "Seconds to wait for other workers.")
  define_seconds("grace_s", 30.0, "Seconds from a stop signal to the forced exit.")
  define_seconds(
    "step_deadline_s", None, "Longest step, seconds; default 20 medians, at least 60."
  )
  define_seconds(
    "start_deadline_s",
    1800.0,
    "Longest wait without progress outside of steps, seconds.",
  )
  flags.DEFINE_multi_string(
    "query", [], "Image, .npy file of vectors, or key (repeatable).", search
  )
  flags.DEFINE_bool("json", False, "Print results as JSON.", search)
  flags.DEFINE_string("picture", None, "File for a picture of the results.", search)
  return {"what": what, "where": where, "hardware": hardware, "search": search}


def define_gin_flags(values: flags.FlagValues) -> None:
  """Defines the flags of gin that several command lines have."""
  flags.DEFINE_multi_string(
    "gin_param", [], "Binding, such as 'X.y = 1' (repeatable).", values
  )
  flags.DEFINE_multi_string(
    "allow_gin_import", [], "A module that gin files may import (repeatable).", values
  )


def help_text() -> str:
  """Returns the full text of `--help`."""
  groups = define_flags()
  lines = [
    "python -m trainer.task --mode=MODE --gin_file=RUN.gin --model_dir=DIR [flags]",
    "Modes:",
    *(f"  {name:<24}{mode.summary}" for name, mode in MODES.items()),
  ]
  titles = {
    "what": "Configuration",
    "where": "Output",
    "hardware": "Hardware",
    "search": "Mode search",
  }
  for group, title in titles.items():
    lines.append(f"{title}:")
    lines += flag_lines(groups[group], width=22)
  return "\n".join(lines)


def flag_lines(values: flags.FlagValues, width: int) -> list[str]:
  """Returns the line of each flag for `--help`: name, summary and default.

  Args:
    values: the flags.
    width: number of characters for the longest name.
  """
  lines = []
  for name in values:
    flag = values[name]
    default = "" if flag.default in (None, [], False) else f" [{flag.default}]"
    lines.append(f"  --{name:<{width}}{_summary(flag)}{default}")
  return lines


def _summary(flag: flags.Flag) -> str:
  """Returns the help of a flag without absl's addition for lists."""
  return str(flag.help).split("\n", maxsplit=1)[0].rstrip(";")


def _parse(arguments: Sequence[str]) -> flags.FlagValues:
  """Parses the flags.

  Raises:
    UserError: a flag is unknown, has an invalid value, or is missing.
  """
  values = flags.FlagValues()
  for group in define_flags().values():
    values.append_flag_values(group)
  try:
    rest = values(arguments)[1:]
  except flags.Error as error:
    raise errors.UserError(f"{str(error).rstrip(' .?')}. See --help.") from error
  if rest:
    raise errors.UserError(f"unknown flag {rest[0]!r}. See --help.")
  for name in ("mode", "gin_file", "model_dir"):
    if not values[name].value:
      raise errors.UserError(
        f"--{name} is missing: {_summary(values[name])} See --help."
      )
  if "://" in values.model_dir:
    # The run renames, locks and appends to files there, which no store supports.
    raise errors.UserError(
      f"--model_dir={values.model_dir} is not a local or mounted folder (for example "
      "by gcsfuse); only data may be on a remote store, not a run's own files."
    )
  return values


def _run(values: flags.FlagValues) -> None:
  """Loads the config and calls the mode."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # absl's own flags take their defaults; otherwise absl warns at the first log line.
  flags.FLAGS(["trainer"])
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  from trainer import run  # Late: see the module's docstring.
  from trainer.config import run_config
  from trainer.distribute import workers

  importlib.import_module("trainer.gin_registrations")
  # TensorFlow logs every reduction over replicas at level INFO.
  python_logging.getLogger("tensorflow").setLevel(python_logging.WARNING)
  mode = MODES[values.mode]
  module = importlib.import_module(mode.module)
  hardware = run.Hardware(
    strategy=values.strategy,
    num_virtual_replicas=values.num_virtual_replicas,
    tpu=values.tpu,
    worker_timeout_s=values.worker_timeout_s,
    step_deadline_s=values.step_deadline_s,
    start_deadline_s=values.start_deadline_s,
  )
  with workers.reporting_lost_workers():
    module.main(
      run.Run(
        model_dir=values.model_dir,
        config=run_config.load(
          values.gin_file,
          values.gin_param,
          needed=mode.roots,
          allowed_imports=values.allow_gin_import,
        ),
        hardware=hardware,
        allow_config_change=values.allow_config_change,
        search_request=run.SearchRequest(values.query, values.json, values.picture),
      )
    )


def _one_line(error: Exception) -> str:
  """Returns the message without the call information that gin appends."""
  return " ".join(str(error).split("\n  In call to configurable")[0].split())


if __name__ == "__main__":
  shutdown.exit_process(main(sys.argv))
