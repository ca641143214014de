"""Text tables (CSV, TSV) as written by spreadsheets, pandas and labelling tools."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from trainer.errors import UserError, reading
from trainer.runtime import filesystem

# UTF-32 first: its byte order mark begins with that of UTF-16.
_MARKS = (
  (codecs.BOM_UTF8, "utf-8-sig"),
  (codecs.BOM_UTF32_LE, "utf-32"),
  (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_SEPARATOR_LINE = "sep="  # Excel reads the separator from such a first line.
_NUM_COLUMNS_SHOWN = 20


class CsvRow(NamedTuple):
  """A row after the header.

  Attributes:
    line: number of its last line in the file, from 1.
    cells: its texts.
  """

  line: int
  cells: list[str]


class CsvFile:
  """A text table whose first row names its columns.

  The separator is a comma, a tab, a semicolon or a vertical bar, whichever yields the
  needed columns. The text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

  Attributes:
    path: path of the file.
    content: its bytes.
    columns: column names without surrounding blanks; "" for an unnamed column.
    separator: the character between cells.
    has_blanks: whether a blank follows each separator; it is not part of a cell.

  Args:
    path: path of the file.
    needed: names of columns that the table must have.
    errors: "strict", or "replace" for bytes that can't be decoded.

  Raises:
    UserError: the file can't be read, is not text, lacks a needed column, or has two
      columns with the same name.
  """

  def __init__(self, path: str, needed: Sequence[str], *, errors: str = "strict"):
    self.path = path
    self.content = _content(path)
    self._errors = errors
    self._encoding = _encoding(path, self.content)
    self._skip, separator = self._separator_line()
    headers = self._headers([separator] if separator else self._separators())
    fitting = [s for s, names in headers.items() if {*needed} <= {*map(_name, names)}]
    # Without the needed columns, the separator with the most columns is the likeliest.
    self.separator = next(
      iter(fitting), max(headers, key=lambda each: len(headers[each]), default=",")
    )
    names = headers.get(self.separator, [])
    self.columns = [_name(name) for name in names]
    self.has_blanks = any(name.startswith(" ") for name in names[1:])
    self._check_columns(needed, names)

  def rows(self) -> Iterator[CsvRow]:
    """Yields every row after the first; rows without any text are skipped.

    Raises:
      UserError: the table is damaged, or its bytes can't be decoded.
    """
    reader = self._reader(self.separator, skip_blanks=self.has_blanks)
    line = self._skip
    try:
      next(reader, None)
      line = reader.line_num + self._skip
      for cells in reader:
        line = reader.line_num + self._skip
        if any(cells):
          yield CsvRow(line, cells)
    except csv.Error as error:
      raise UserError(f"{self.path}: after line {line}: {error}.") from error
    except UnicodeError as error:
      raise self._no_text() from error

  def separator_note(self) -> Optional[str]:
    """Returns a message if the separator does not match the extension, or None."""
    if self.separator == self._separators()[0]:
      return None
    return f"{self.path} is read with {_SEPARATORS[self.separator]} as separators."

  def _separators(self) -> list[str]:
    """Returns the separators to try, the one implied by the file extension first."""
    promised = "\t" if self.path.lower().endswith((".tsv", ".tab")) else ","
    return sorted(_SEPARATORS, key=lambda each: each != promised)

  def _separator_line(self) -> tuple[int, Optional[str]]:
    """Returns the number of lines before the table and the separator they declare."""
    try:
      line = self._text().readline().rstrip("\r\n").strip('"')
    except UnicodeError as error:
      raise self._no_text() from error
    separator = line[len(_SEPARATOR_LINE) :]
    if line.lower().startswith(_SEPARATOR_LINE) and separator in _SEPARATORS:
      return 1, separator
    return 0, None

  def _headers(self, separators: Sequence[str]) -> dict[str, list[str]]:
    """Returns the first row for each separator that can parse it."""
    headers: dict[str, list[str]] = {}
    for separator in separators:
      try:
        headers[separator] = next(self._reader(separator), [])
      except csv.Error:  # The quotes may be valid with another separator.
        continue
      except UnicodeError as error:
        raise self._no_text() from error
    return headers

  def _reader(self, separator: str, *, skip_blanks: bool = False):
    text = self._text()
    for _ in range(self._skip):
      text.readline()
    return csv.reader(
      text, delimiter=separator, skipinitialspace=skip_blanks, strict=True
    )

  def _text(self) -> io.TextIOWrapper:
    return io.TextIOWrapper(
      io.BytesIO(self.content), encoding=self._encoding, errors=self._errors, newline=""
    )

  def _no_text(self) -> UserError:
    name = self._encoding.upper().replace("-SIG", "")
    try:
      self.content.decode(self._encoding)
    except UnicodeDecodeError as error:
      where = f" (byte {error.start})"
    else:
      where = ""
    return UserError(f"{self.path} is not {name}{where}; save it as UTF-8.")

  def _check_columns(self, needed: Sequence[str], names: Sequence[str]) -> None:
    for name in needed:
      if name not in self.columns:
        shown = ", ".join(map(repr, names[:_NUM_COLUMNS_SHOWN])) or "nothing"
        raise UserError(
          f"{self.path} has no column {name!r}: its first row must name the columns; "
          f"it has {shown}."
        )
    for name in self.columns:
      if name and self.columns.count(name) > 1:
        raise UserError(f"{self.path} has two columns called {name!r}; rename one.")


def _name(text: str) -> str:
  """Returns a column name without surrounding blanks and byte order marks."""
  return text.strip().strip("\ufeff").strip()


def _content(path: str) -> bytes:
  with reading(path):
    return filesystem.read_bytes(path)


def _encoding(path: str, content: bytes) -> str:
  for mark, encoding in _MARKS:
    if content.startswith(mark):
      return encoding
  if b"\0" in content:
    raise UserError(
      f"{path} contains zero bytes, as UTF-16 without a byte order mark does; save it "
      "as UTF-8."
    )
  return "utf-8"
