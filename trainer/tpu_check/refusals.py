"""What does not compile, in the user's words: operation, layer, line of the source."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple, Optional

_OPERATION = re.compile(r"(\w+) \(No registered '\w+' OpKernel.*?\{\{node ([^}]+)\}\}")
_LINE = re.compile(r'^File "([^"]+)", line (\d+), in ', re.MULTILINE)
_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\]|^<")
_TOO_LARGE = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
_MAX_LENGTH = 300

_PYTHON = "Python runs on the host alone: write it in TensorFlow's operations"
_HOST = "do it in the dataset's decoder or augmentation, which run on the host"
# By what an operation's name begins with.
_ADVICE = {
  "EagerPyFunc": _PYTHON,
  "PyFunc": _PYTHON,
  "Print": "take tf.print out of the step",
  "String": "strings, as of tf.print, stay on the host: take them out of the step",
  "Decode": _HOST,
  "Encode": _HOST,
  "ImageProjective": _HOST,
  "Unique": "its result has no shape that is known beforehand: use a mask instead",
  "Where": "its result has no shape that is known beforehand: use a mask instead",
}
_OTHER_ADVICE = f"use others in its place, or {_HOST}"


class Refusal(NamedTuple):
  """An operation that XLA does not compile.

  Attributes:
    operation: its type, such as "DecodeJpeg".
    node: its name, which begins with those of the layers it is in.
    line: file and line that made it, the innermost that is no library's; None where
      that isn't told.
  """

  operation: str
  node: str
  line: Optional[str]

  def __str__(self):
    layer = self.node.rpartition("/")[0] or "no layer"
    place = f", {self.line}" if self.line else ""
    matching = [
      text for start, text in _ADVICE.items() if self.operation.startswith(start)
    ]
    advice = matching[0] if matching else _OTHER_ADVICE
    return f"XLA has no {self.operation} (in {layer}{place}); {advice}."


def of_lowering(error: Exception) -> Optional[Refusal]:
  """What TensorFlow could not lower; None where the error is about something else.

  Args:
    error: as `replica_step.export` raises it.
  """
  message = str(error)
  operation = _OPERATION.search(message)
  if operation is None:
    return None
  # Of several operations each is followed by its own calls, innermost last.
  calls = message[operation.end() :].split("(No registered", 1)[0]
  own = [call for call in _LINE.findall(calls) if not _LIBRARIES.search(call[0])]
  line = f"{pathlib.Path(own[-1][0]).name}, line {own[-1][1]}" if own else None
  return Refusal(operation[1], operation[2], line)


def needed_share(message: str) -> Optional[float]:
  """How many times the memory that there is a program needs, as libtpu tells it.

  Args:
    message: libtpu's.

  Returns:
    More than 1; None where the message is about something else.
  """
  sizes = _TOO_LARGE.search(message)
  return None if sizes is None else float(sizes[1]) / float(sizes[2])


def of_compiler(message: str) -> str:
  """The compiler's own words, in one line that is not too long."""
  line = " ".join(message.split())
  return line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]} ..."
