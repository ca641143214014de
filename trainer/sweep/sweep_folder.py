"""The folder of a sweep: made, checked against the sweep file, and its results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from trainer import config as config_lib
from trainer.config.statements import Binding
from trainer.data import paths
from trainer.errors import UserError
from trainer.sweep import page, rows
from trainer.sweep.rows import Row
from trainer.sweep.spec import Spec

_SPEC_FILE = "sweep.json"
CSV_FILE = "sweep.csv"
PAGE_FILE = "sweep.html"
_NUM_SHOWN = 3
# More trials of the same search are no other sweep.
_MAY_CHANGE = ("sweep.num_trials",)


def open_sweep_folder(spec: Spec, folder: str) -> None:
  """Makes the folder, or checks that it holds the same sweep.

  Args:
    spec: the sweep file.
    folder: is made if it is missing.

  Raises:
    UserError: it holds another sweep, or can't be written to.
  """
  said = _said(spec)
  path = os.path.join(folder, _SPEC_FILE)
  if os.path.exists(path):
    before = _read(path)
    lines = config_lib.diff(_fixed(before), _fixed(said))
    if lines:
      more = [f"and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
      raise UserError(
        f"{folder} holds another sweep: {'; '.join(lines[:_NUM_SHOWN] + more)}. Take "
        "another --sweep_dir; runs that are in both are not made twice."
      )
  try:
    os.makedirs(folder, exist_ok=True)
    paths.replace_file(path, json.dumps(said, indent=2))
  except OSError as error:
    raise UserError(
      f"--sweep_dir={folder} can't be written to: {error.strerror}."
    ) from error


def _read(path: str) -> dict[str, str]:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({error}); remove it.") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} is damaged (it has no object); remove it.")
  return content


def write_results(found: Sequence[Row], spec: Spec, folder: str) -> None:
  """Writes `sweep.csv` and `sweep.html`.

  Args:
    found: best first.
    spec: the sweep file.
    folder: of the sweep.
  """
  rows.write_csv(found, spec.options, os.path.join(folder, CSV_FILE))
  page.write(found, spec, os.path.join(folder, PAGE_FILE))


def _said(spec: Spec) -> dict[str, str]:
  """All that the sweep file says, by name."""
  options = {f"sweep.{k}": repr(v) for k, v in vars(spec.options).items()}
  swept = {name: repr(domain) for name, domain in spec.domains.items()}
  base = {s.key: repr(s.value) for s in spec.base if isinstance(s, Binding)}
  return {**base, **swept, **options}


def _fixed(said: Mapping[str, str]) -> dict[str, str]:
  return {name: value for name, value in said.items() if name not in _MAY_CHANGE}
