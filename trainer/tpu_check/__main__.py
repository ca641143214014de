"""`python -m trainer.tpu_check`: see `--help`."""

import sys

from trainer.tpu_check import command

if __name__ == "__main__":
  sys.exit(command.main(sys.argv))
