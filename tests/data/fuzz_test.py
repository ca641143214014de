"""Short fuzz test of hostile files; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import re
import subprocess
import sys


def test_hostile_files_are_refused_in_one_line_or_read_correctly():
  command = [sys.executable, "-m", "tests.fuzz", "--num_examples=40"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  counts = re.findall(r"(\d+) examples, (\d+) refused .*, (\d+) read", done.stdout)
  assert len(counts) == 6
  num_examples, num_refused, num_read = map(sum, zip(*[map(int, c) for c in counts]))
  assert num_examples == num_refused + num_read >= 6 * 40
  assert num_refused >= 6 and num_read >= 1


def test_missing_check_is_detected():
  program = (
    "from trainer.data.records import RecordIndex\n"
    "RecordIndex._check = lambda self, numbers: None\n"
    "import sys, tests.fuzz\n"
    "sys.argv = ['fuzz', '--num_examples=300', '--target=arrays, of other values']\n"
    "tests.fuzz.main()\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode != 0
  assert re.search(r"Error", done.stderr), done.stderr[-3000:]
