"""Command line that exports the step of a run file, compiles it and reports."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags, logging

from trainer import errors, task
from trainer.tpu_check import compiler

_USAGE = """./launch/tpu_check.sh RUN.gin --topology=v5e:2x4 [flags]

Compiles the run's training step for a TPU on this machine, without a TPU or data, and
reports the memory of a replica. TPUs are named by their chips, v2 to v6e, such as
v5e:2x2, v6e:2x4, v4:2x2x1; --topology=gpu:4x16GB estimates the same for four GPUs.
Exit status: 0 if the step compiles and fits, 1 if it does not, 2 for a user error."""


def main(arguments: Sequence[str]) -> int:
  """Runs the command line.

  Args:
    arguments: with the program's name first, as `sys.argv`.

  Returns:
    The exit status: 0 if the step compiles and fits, 1 if not, 2 for a user error.
  """
  return task.run_command(arguments, help_text, lambda: _run(*_parse(arguments)))


def define_flags() -> flags.FlagValues:
  """Defines the flags of this command."""
  values = flags.FlagValues()
  flags.DEFINE_string("topology", None, "Device topology, such as v5e:2x4.", values)
  flags.DEFINE_bool(
    "fit", False, "Search the largest P that fits, with K unchanged.", values
  )
  task.define_gin_flags(values)
  flags.DEFINE_string(
    "compiler_python",
    os.path.join(".venv-tpu", "bin", "python"),
    "Python with JAX and libtpu.",
    flag_values=values,
  )
  return values


def help_text() -> str:
  """Returns the text of `--help`."""
  return "\n".join([_USAGE, "", *task.flag_lines(define_flags(), width=17)])


def _parse(arguments: Sequence[str]) -> tuple[str, flags.FlagValues]:
  """Parses the run file and the flags.

  Raises:
    UserError: a flag is unknown or missing, or there is not exactly one run file.
  """
  values = define_flags()
  try:
    _, *rest = values(list(arguments))
  except flags.Error as error:
    raise errors.UserError(f"{str(error).rstrip(' .?')}. See --help.") from error
  if len(rest) != 1:
    raise errors.UserError(f"one run file is needed; got {len(rest)}. See --help.")
  if not values.topology:
    raise errors.UserError(
      "--topology is missing; give one such as v5e:2x4. See --help."
    )
  compiler.parse_topology(values.topology)
  return rest[0], values


def _run(run_file: str, values: flags.FlagValues) -> int:
  """Loads the config and checks its step."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # Lowering is the same on the CPU.
  flags.FLAGS(["trainer"])
  logging.use_absl_handler()
  from trainer import gin_registrations  # noqa: F401  Imported late: --help is fast.
  from trainer.config import run_config
  from trainer.tpu_check import compile_check

  run_config.load(
    [run_file],
    values.gin_param,
    needed=("train",),
    allowed_imports=values.allow_gin_import,
  )
  done = compile_check.check(
    compiler.parse_topology(values.topology),
    compiler_python=values.compiler_python,
    is_fitting=values.fit,
  )
  return errors.DONE if done else errors.FAILURE


if __name__ == "__main__":
  sys.exit(main(sys.argv))
