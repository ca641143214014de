"""Comparison of runs: in the terminal, on a page, and refused inputs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.report import example_run
from trainer.cli import compare
from trainer.errors import UserError
from trainer.report import measured_runs


@pytest.fixture
def folders(tmp_path):
  """Two runs; the second is worse and has another margin."""
  example_run.make(tmp_path / "a", margin=0.2)
  example_run.make(tmp_path / "b", margin=0.4, has_report_data=False)
  path = tmp_path / "b" / "eval" / "metrics.json"
  results = json.loads(path.read_text())
  results["latest"]["eval/recall_at_1"] = 0.5
  del results["latest"]["intervals"]
  path.write_text(json.dumps(results))
  return [str(tmp_path / "a"), str(tmp_path / "b")]


def _lines(folders, capsys):
  assert compare.main(["compare", *folders]) == 0
  return capsys.readouterr().out.splitlines()


def test_metrics_have_columns_with_intervals_and_the_best_is_marked(folders, capsys):
  lines = _lines(folders, capsys)
  assert lines[0].split() == ["a", "b"]
  assert "recall@1        0.7500 (0.7000 to 0.8000) *  0.5000" in lines
  [equal] = [line for line in lines if line.startswith("MAP@R")]
  assert "*" not in equal


def test_curves_share_one_scale(folders, capsys):
  lines = _lines(folders, capsys)
  place = lines.index("Loss by step, to 30; 0.006667 to 0.04")
  assert lines[place + 1 : place + 3] == ["  a  ▄▂▁  0.006667", "  b  █▄▂  0.01333"]


def test_only_config_differences_are_shown(folders, capsys):
  lines = _lines(folders, capsys)
  assert [line.split() for line in lines[-2:]] == [
    ["config", "a", "b"],
    ["train.loss.margin", "0.2", "0.4"],
  ]
  assert not any("train.seed" in line for line in lines)


def test_long_values_are_on_separate_lines(tmp_path, capsys):
  long = repr(tuple(range(20)))
  folders = [example_run.make(tmp_path / n, has_report_data=False) for n in ("b", "c")]
  config = tmp_path / "c" / "config.gin"
  config.write_text(config.read_text().replace("margin = 0.2", f"margin = {long}"))
  lines = _lines(folders, capsys)
  assert lines[-3:] == ["train.loss.margin", "  b  0.2", f"  c  {long}"]


def test_equal_configs_are_reported_as_equal(tmp_path, capsys):
  folders = [
    example_run.make(tmp_path / name, has_report_data=False) for name in ("a", "b")
  ]
  assert _lines(folders, capsys)[-1] == "The configs are the same."


def test_page_has_results_curves_differences_and_report_links(folders, tmp_path):
  (tmp_path / "a" / "report.html").write_text("", encoding="utf-8")
  (tmp_path / "pages").mkdir()
  path = tmp_path / "pages" / "all.html"
  assert compare.main(["compare", *folders, f"--output={path}"]) == 0
  text = path.read_text(encoding="utf-8")
  assert '<a href="../a/report.html">a</a>' in text
  assert "<td><b>0.7500</b><small>0.7000\N{EN DASH}0.8000</small></td>" in text
  loss = re.search(r'aria-label="(Loss by step[^"]*)"', text).group(1)
  assert loss.endswith("a 0.02 at 10 to 0.006667 at 30; b 0.04 at 10 to 0.01333 at 30")
  assert "<code>train.loss.margin</code>" in text
  assert "train.seed" not in text


def test_names_of_runs_and_settings_are_escaped_on_the_page(tmp_path):
  name = "<script>alert('x')</script>\"&ü"
  names = (name.replace("/", "\N{FRACTION SLASH}"), "b")
  folders = [example_run.make(tmp_path / each, margin=len(each)) for each in names]
  config = tmp_path / "b" / "config.gin"
  config.write_text(config.read_text().replace("margin = 1", "margin = '<b>'"))
  (tmp_path / names[0] / "report.html").write_text("", encoding="utf-8")
  path = tmp_path / "all.html"
  assert compare.main(["compare", *folders, f"--output={path}"]) == 0
  text = path.read_text(encoding="utf-8")
  assert "<script>alert" not in text and "'<b>'" not in text
  assert "&lt;script&gt;alert" in text and "&#39;&lt;b&gt;&#39;" in text
  [plot, *_] = re.findall("data-plot='([^']*)'", text)
  assert json.loads(plot)["series"][0]["name"] == names[0]


def test_folders_of_equal_names_are_distinguished_by_path(tmp_path):
  folders = [
    example_run.make(tmp_path / parent / "run", has_report_data=False)
    for parent in ("x", "y")
  ]
  assert [run.name for run in measured_runs.read_measured(folders)] == folders


def test_single_folder_is_refused(folders):
  with pytest.raises(UserError, match="1 folders given; two runs or more"):
    measured_runs.read_measured(folders[:1])


def test_a_folder_given_twice_is_refused(folders):
  with pytest.raises(UserError, match="a is given twice"):
    measured_runs.read_measured([folders[0], folders[0] + "/"])


def test_run_without_results_is_reported_in_one_line(folders, tmp_path, capsys):
  (tmp_path / "b" / "eval" / "metrics.json").unlink()
  assert compare.main(["compare", *folders]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line == (
    f"error: {folders[1]} has no results after training; run --mode=evaluate on it "
    "first."
  )


def test_folder_without_a_run_is_reported_in_one_line(folders, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  assert compare.main(["compare", folders[0], str(tmp_path / "empty")]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert "holds no config.gin, so no run" in line


def test_unwritable_page_is_reported_in_one_line(folders, tmp_path, capsys):
  output = tmp_path / "nowhere" / "page.html"
  assert compare.main(["compare", *folders, f"--output={output}"]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert (
    line == f"error: --output={output} can't be written: No such file or directory."
  )


def test_unknown_flag_is_reported_in_one_line(capsys):
  assert compare.main(["compare", "--outptu=x"]) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("error: Unknown command line flag 'outptu'")


def test_help_does_not_load_tensorflow():
  code = "import sys; from trainer.cli import compare; compare.main(['', '--help']); "
  code += "sys.exit('tensorflow' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0
  assert "--output" in done.stdout
