"""Checks a run's flags and config as the task does: python launch/lint.py FLAGS.

A misspelt name fails within a second here, instead of after a night in a queue. Prints
the whole config, as one gin file without includes.
"""

from __future__ import annotations

import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import flags, logging

from trainer import errors, task
from trainer.config import run_config


def main(arguments) -> int:
  """Reads the flags and the config, and prints the config."""
  values = flags.FlagValues()
  for group in task.define_flags().values():
    values.append_flag_values(group)
  try:
    values(arguments)
    flags.FLAGS(["lint"])
    logging.set_verbosity(logging.ERROR)
    importlib.import_module("trainer.gin_registrations")
    needed = task.MODES[values.mode].roots
    assembled = run_config.read(
      values.gin_file,
      values.gin_param,
      needed=needed,
      allowed_imports=values.allow_gin_import,
    )
    print(assembled.text, end="")
  except (flags.Error, errors.UserError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
