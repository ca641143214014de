"""`python -m trainer.report MODEL_DIR`: writes the page of a run again."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer import errors
from trainer.report import page


def main(arguments: Sequence[str]) -> int:
  """Runs the command line.

  Args:
    arguments: with the program's name first, as `sys.argv`.

  Returns:
    The exit status.
  """
  if {"-h", "--help"} & set(arguments[1:]):
    print(__doc__)
    return errors.DONE
  try:
    if len(arguments) != 2:
      raise errors.UserError(
        f"{len(arguments) - 1} folders given; give the model_dir of one run."
      )
    print(page.write_page(arguments[1]))
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_status
  return errors.DONE


if __name__ == "__main__":
  sys.exit(main(sys.argv))
