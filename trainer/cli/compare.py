"""Command line that compares runs in a table and, if requested, a page."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import flags

from trainer import errors

_USAGE = """python -m trainer.cli.compare MODEL_DIR MODEL_DIR ... [flags]

Compares the results, curves and configs of several runs.
"""


def main(arguments: Sequence[str]) -> int:
  """Runs the command line.

  Args:
    arguments: with the program's name first, as `sys.argv`.

  Returns:
    The exit status.
  """
  values = flags.FlagValues()
  flags.DEFINE_string(
    "output", None, "File for an HTML page of the comparison.", flag_values=values
  )
  if {"-h", "--help"} & set(arguments[1:]):
    print(f"{_USAGE}\n  --output        {values['output'].help}")
    return errors.DONE
  try:
    _, *model_dirs = values(list(arguments))
    _compare(model_dirs, values.output)
  except flags.Error as error:
    print(f"error: {str(error).rstrip(' .?')}. See --help.", file=sys.stderr)
    return errors.UserError.exit_status
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_status
  return errors.DONE


def _compare(model_dirs: Sequence[str], output: str | None) -> None:
  """Prints the comparison and writes the page.

  Raises:
    UserError: a folder has no results, or the page cannot be written.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # Imported late, so that --help is fast.
  from trainer.report import comparison, measured_runs

  measured = measured_runs.read_measured(model_dirs)
  print(comparison.comparison_text(measured))
  if output:
    try:
      comparison.write_comparison_page(measured, output)
    except OSError as error:
      raise errors.UserError(
        f"--output={output} can't be written: {error.strerror}."
      ) from error
    print(f"\n{output}")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
