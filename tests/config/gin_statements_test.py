from __future__ import annotations

import pytest

from trainer import errors
from trainer.config import gin_statements


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "runs").mkdir()
  (tmp_path / "models").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  return tmp_path


def _refusal(*args):
  with pytest.raises(errors.UserError) as refusal:
    gin_statements.read_statements(*args)
  assert "\n" not in str(refusal.value)
  return str(refusal.value)


def test_include_is_found_next_to_the_including_file(folder):
  (folder / "models" / "m.gin").write_text("M.x = 1\n")
  (folder / "runs" / "r.gin").write_text("include '../models/m.gin'\nR.y = 2\n")
  read = gin_statements.read_statements([str(folder / "runs" / "r.gin")], [])
  assert [str(statement) for statement in read] == ["M.x = 1", "R.y = 2"]
  assert read[0].origin == f"{folder}/models/m.gin:1"


def test_include_is_found_from_the_working_directory(folder):
  (folder / "elsewhere" / "m.gin").write_text("M.x = 1\n")
  (folder / "runs" / "r.gin").write_text("include 'm.gin'\n")
  read = gin_statements.read_statements(["../runs/r.gin"], [])
  assert read[0].origin == "m.gin:1"


def test_flags_come_after_files(folder):
  (folder / "r.gin").write_text("R.y = 2\n")
  read = gin_statements.read_statements(["../r.gin"], ["R.y = 3"])
  assert [statement.value for statement in read] == [2, 3]
  assert read[1].origin == "--gin_param='R.y = 3'"


def test_values_are_written_as_gin_reads_them(folder):
  text = "a/b/R.y = [@s/X(), @X, (%M,), {'k': -1.5e-07}, 'it\\'s', None, True]"
  (read,) = gin_statements.read_statements([], [text])
  (again,) = gin_statements.read_statements([], [str(read)])
  assert str(again) == str(read)
  assert again.value == read.value


def test_missing_file_is_refused_with_the_nearest(folder):
  (folder / "runs" / "digits.gin").write_text("")
  message = _refusal(["../runs/digit.gin"], [])
  assert "file not found" in message
  assert "'digits.gin'?" in message


def test_missing_include_is_refused_with_its_location(folder):
  (folder / "r.gin").write_text("R.y = 2\ninclude 'nowhere/m.gin'\n")
  message = _refusal(["../r.gin"], [])
  assert "r.gin:2: include 'nowhere/m.gin'" in message


def test_cycle_of_includes_is_refused(folder):
  (folder / "a.gin").write_text("include 'b.gin'\n")
  (folder / "b.gin").write_text("include 'a.gin'\n")
  assert "a.gin includes itself" in _refusal(["../a.gin"], [])


def test_binary_file_is_refused(folder):
  (folder / "r.gin").write_bytes(b"\xff\xfe\x00")
  assert "cannot read the gin file" in _refusal(["../r.gin"], [])


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("A = 1\nR.y = word\n", 2),
    ("A = 1\nR.y 2\n", 2),
    ("A = 1\n\nR.y = (1,\n", None),
    ("R.y = 'open\n", 1),
    ("R:\n y = 1\n  z = 2\n", 3),
  ],
)
def test_text_that_is_not_gin_is_refused_with_its_line(folder, text, line):
  (folder / "r.gin").write_text(text)
  message = _refusal(["../r.gin"], [])
  assert f"r.gin:{line or ''}" in message
  assert "invalid gin syntax" in message
