"""The folder of an export: made aside, and put in its place when it was tried."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from trainer.config import saved
from trainer.data.folder_lock import alone_in
from trainer.serving import lite, model_card, saved_model

_ASIDE = "aside"
# All that an export may hold; the card says what the rest is, and comes last.
_NAMES = (
  *(saved_model.FOLDER, saved_model.SCRIPT_NAME, lite.FILE_NAME, saved.CONFIG),
  model_card.FILE_NAME,
)


@contextlib.contextmanager
def replacing(folder: str) -> Iterator[str]:
  """Replaces an export, if no error is raised inside; nothing of the old one stays.

  Args:
    folder: of the export; is made if it is missing.

  Yields:
    The folder in which the new one is to be made.

  Raises:
    UserError: another process exports into the folder.
  """
  aside = os.path.join(folder, _ASIDE)
  os.makedirs(folder, exist_ok=True)
  with alone_in(folder, "exporting into"):
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    try:
      yield aside
      _publish(aside, folder)
    finally:
      shutil.rmtree(aside)


def _publish(aside: str, folder: str) -> None:
  for name in reversed(_NAMES):
    _remove(os.path.join(folder, name))
  for name in _NAMES:
    if os.path.exists(os.path.join(aside, name)):
      os.replace(os.path.join(aside, name), os.path.join(folder, name))


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.exists(path):
    os.remove(path)
