"""FAISS, which is optional: imported here only, and without its remarks."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from trainer.errors import UserError


def is_installed() -> bool:
  """Whether it can be loaded."""
  return importlib.util.find_spec("faiss") is not None


def load() -> Any:
  """The module.

  Raises:
    UserError: it is not installed.
  """
  # It tells at length which instructions of the processor it uses.
  logging.getLogger("faiss.loader").setLevel(logging.WARNING)
  try:
    import faiss
  except ImportError as error:
    raise UserError(
      "An index needs FAISS: pip install 'retrieval-trainer[search]'."
    ) from error
  return faiss
