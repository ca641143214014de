"""The one place that imports tensorflow-io: file systems of object stores.

It has no release for Python 3.12 and later; what needs it says so there.
"""

from __future__ import annotations

import functools
from typing import Any

from trainer.errors import UserError


def load(purpose: str) -> Any:
  """The package; importing it also registers its file systems.

  Args:
    purpose: what needs it, for the message.

  Raises:
    UserError: it is not installed, or doesn't load.
  """
  module, reason = _import()
  if module is None:
    raise UserError(
      f"{purpose} need tensorflow-io, which is not there ({reason}); install this "
      "package on Python 3.9, 3.10 or 3.11, which has it."
    )
  return module


@functools.cache
def _import() -> tuple[Any, str]:
  try:
    import tensorflow_io
  except Exception as error:  # Its compiled part raises more than ImportError.
    return None, str(error).strip().splitlines()[0]
  return tensorflow_io, ""
