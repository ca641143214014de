"""`python -m trainer.sweep`: see `--help`."""

import sys

from trainer.sweep import command

if __name__ == "__main__":
  sys.exit(command.main(sys.argv))
