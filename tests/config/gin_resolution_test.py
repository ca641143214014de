""""""

from __future__ import annotations

import pytest

import trainer.gin_registrations  # noqa: F401  Registers parts with gin.
from tests.config import toy_parts
from trainer import errors
from trainer.config import gin_resolution, run_config

GOOD = "toy_train.loss = @ToyLoss()\nToyLoss.margin = 0.5\n"


@pytest.fixture
def lint(tmp_path):
  """Reads a text as `run.gin` and returns the refusal."""

  def read(text: str) -> str:
    (tmp_path / "run.gin").write_text(text)
    with pytest.raises(errors.UserError) as refusal:
      run_config.read([str(tmp_path / "run.gin")], roots=toy_parts.ROOTS)
    message = str(refusal.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")

  return read


REFUSALS = {
  "unknown part": (
    "ToyLos.margin = 1",
    "run.gin:3: no part is called 'ToyLos'",
    "'ToyLoss'?",
  ),
  "unknown parameter": ("ToyLoss.margn = 1", "run.gin:3: ToyLoss has no", "'margin'?"),
  "far parameter": ("ToyLoss.zzz = 1", "has no parameter 'zzz'.", "margin, squared"),
  "parameter the caller supplies": ("toy_encoder.shape = 1", "has no", "It has: size"),
  "unknown reference": (
    "toy_train.data = @ToyPipline()",
    "run.gin:3",
    "'ToyPipeline'?",
  ),
  "nested reference": ("toy_train.actions = [(1, {2: @Toi})]", "run.gin:3", "'Toi'"),
  "unset macro": ("MARGIN = 1\nToyLoss.squared = %MARGN", "run.gin:4", "'MARGIN'?"),
  "unset macro alone": ("ToyLoss.squared = %ABC", "nothing sets %ABC", "add ABC = ..."),
  "lower-case macro": (
    "steps = 5",
    "run.gin:3: 'steps' names no part",
    "toy_train.steps =",
  ),
  "mixed-case macro": ("Height = 5", "macros are UPPERCASE", "HEIGHT = ..."),
  "unused binding": ("OtherToyLoss.scale = 2", "nothing uses OtherToyLoss.scale", "3:"),
  "unused macro": ("MARGIN = 2", "run.gin:3: nothing uses MARGIN", "write %MARGIN"),
  "unused scope": ("far/ToyLoss.margin = 2", "nothing uses far/ToyLoss.margin", "3:"),
  "ambiguous": (
    "toy_train.data = @Twin()",
    "'Twin' is ambiguous",
    "toy.first.Twin, toy",
  ),
  "foreign import": (
    "import os",
    "run.gin:3: import of 'os'",
    "tensorflow_addons;",
  ),
  "failing import": ("import trainer.nowhere", "run.gin:3: cannot import", "nowhere"),
  "itself": ("A = %B\nB = [%A]\nToyLoss.squared = %A", "run.gin:4: %A contains", "A"),
  "required mark": (
    "ToyLoss.margin = %gin.REQUIRED",
    "ToyLoss.margin must be set",
    "3:",
  ),
  "required part": (
    "toy_train.data = @ToyPipeline()",
    "ToyPipeline.index must be",
    "3:",
  ),
  "required of a function": (
    "toy_train.encoder = @toy_encoder",
    "toy_encoder.size",
    "3:",
  ),
  "required root": (
    "toy_evaluate.ks = (1,)",
    "toy_evaluate.data must be set",
    "--gin_p",
  ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_user_error_is_refused_in_one_line_with_its_location(lint, name):
  text, *parts = REFUSALS[name]
  message = lint(GOOD + text)
  assert all(part in message for part in parts), message


def test_pre_release_name_is_refused_with_the_new_name(lint):
  message = lint(GOOD + "PKSchedule.samples_per_class = 4")
  assert "no part is called 'PKSchedule'; it was renamed to 'PKSampler'" in message
  message = lint(GOOD + "ToyLoss.memory_bank = 4")
  assert "no parameter 'memory_bank'; it was renamed to 'cross_batch_memory'" in message


def test_every_new_name_in_the_renaming_table_exists():
  names = gin_resolution.registered_names()
  parts = {name.rsplit(".", 1)[-1] for name in names}
  parameters = {p for n in names for p in gin_resolution.known_part(n, "").parameters}
  missing = set(gin_resolution._RENAMED.values()) - parts - parameters
  assert not missing
  assert not set(gin_resolution._RENAMED) & (parts | parameters)


def test_several_unused_bindings_are_counted(lint):
  message = lint(GOOD + "A = 1\nB = 2\nC = 3")
  assert "nothing uses A" in message
  assert "(and 2 more like it)" in message


def test_part_that_contains_itself_is_refused(lint):
  message = lint(
    "toy_train.loss = @OtherToyLoss()\nOtherToyLoss.scale = @OtherToyLoss()"
  )
  assert "run.gin:2: OtherToyLoss contains itself" in message


def test_missing_parameter_names_the_flag_that_sets_it(lint):
  message = lint("toy_train.loss = @ToyLoss()")
  assert "run.gin:1: ToyLoss.margin must be set" in message
  assert "--gin_param='ToyLoss.margin=...'" in message


def test_positional_arguments_of_an_uncalled_part_come_from_the_caller(tmp_path):
  (tmp_path / "run.gin").write_text(GOOD + "toy_train.data = @ToyPipeline")
  read = run_config.read([str(tmp_path / "run.gin")], roots=toy_parts.ROOTS)
  assert read.values["toy_train.data"] == "@ToyPipeline"


def test_import_of_the_package_is_followed(tmp_path):
  (tmp_path / "run.gin").write_text("import trainer.errors\n" + GOOD)
  read = run_config.read([str(tmp_path / "run.gin")], roots=toy_parts.ROOTS)
  assert read.text.startswith("import trainer.errors  #")


@pytest.fixture
def overrides(tmp_path, caplog):
  """Writes files, reads some; returns the margin, and level and text of each log."""

  def read(files, *names):
    for name, text in files.items():
      (tmp_path / name).write_text(text)
    caplog.set_level("DEBUG", logger="absl")
    paths = [str(tmp_path / name) for name in names or ["run.gin"]]
    values = run_config.read(paths, roots=toy_parts.ROOTS).values
    lines = [r.getMessage().replace(f"{tmp_path}/", "") for r in caplog.records]
    levels = [r.levelname for r in caplog.records]
    return values["toy_train.loss.margin"], list(zip(levels, lines))

  return read


_BASE = {"base.gin": GOOD}


def test_override_of_an_include_is_logged_for_debugging_with_both_locations(overrides):
  run = "include 'base.gin'\ntoy.ToyLoss.margin = 0.7\n"
  margin, [(level, line)] = overrides({**_BASE, "run.gin": run})
  assert margin == "0.7"
  assert level == "DEBUG"
  assert line == (
    "run.gin:2: toy.ToyLoss.margin = 0.7 replaces the value 0.5 of base.gin:2."
  )


def test_override_of_an_include_of_an_include_is_no_warning(overrides):
  files = {
    **_BASE,
    "middle.gin": "include 'base.gin'\nToyLoss.margin = 0.6\n",
    "run.gin": "include 'middle.gin'\nToyLoss.margin = 0.7\n",
  }
  margin, logged = overrides(files)
  assert margin == "0.7"
  assert [level for level, _ in logged] == ["DEBUG", "DEBUG"]


def test_a_second_file_of_the_command_line_may_override_the_first(overrides):
  files = {"run.gin": GOOD, "more.gin": "ToyLoss.margin = 0.7\n"}
  margin, [(level, _)] = overrides(files, "run.gin", "more.gin")
  assert (margin, level) == ("0.7", "DEBUG")


_CONFLICTS = {
  "two includes": (
    {
      "other.gin": "ToyLoss.margin = 0.9\n",
      "run.gin": "include 'base.gin'\ninclude 'other.gin'\n",
    },
    "0.9",
    "other.gin:1: ToyLoss.margin = 0.9 replaces the value 0.5 of base.gin:2.",
  ),
  "an include that comes twice and undoes another": (
    {
      "a.gin": "include 'base.gin'\nToyLoss.margin = 0.7\n",
      "run.gin": "include 'a.gin'\ninclude 'base.gin'\n",
    },
    "0.5",
    "base.gin:2: ToyLoss.margin = 0.5 replaces the value 0.7 of a.gin:2.",
  ),
  "an include after the line": (
    {"run.gin": "ToyLoss.margin = 0.7\ninclude 'base.gin'\n"},
    "0.5",
    "base.gin:2: ToyLoss.margin = 0.5 replaces the value 0.7 of run.gin:1.",
  ),
  "two lines of one file": (
    {"run.gin": GOOD + "ToyLoss.margin = 0.7\n"},
    "0.7",
    "run.gin:3: ToyLoss.margin = 0.7 replaces the value 0.5 of run.gin:2.",
  ),
}


@pytest.mark.parametrize("name", _CONFLICTS)
def test_conflicting_files_are_warned_of_with_both_locations(overrides, name):
  files, expected, message = _CONFLICTS[name]
  margin, logged = overrides({**_BASE, **files})
  assert margin == expected
  assert [line for level, line in logged if level == "WARNING"] == [message]


def test_two_includes_that_agree_are_not_mentioned(overrides):
  files = {
    **_BASE,
    "other.gin": "ToyLoss.margin = 0.5\n",
    "run.gin": "include 'base.gin'\ninclude 'other.gin'\ninclude 'base.gin'\n",
  }
  assert overrides(files) == ("0.5", [])


def test_override_by_flag_is_no_warning(tmp_path, caplog):
  (tmp_path / "run.gin").write_text(GOOD)
  params = ["ToyLoss.margin = 0.7", "ToyLoss.margin = 0.8"]
  read = run_config.read([str(tmp_path / "run.gin")], params, roots=toy_parts.ROOTS)
  assert read.values["toy_train.loss.margin"] == "0.8"
  assert caplog.messages == []


def test_import_of_another_package_is_followed_if_allowed(tmp_path):
  (tmp_path / "run.gin").write_text("import tests.config.toy_parts\n" + GOOD)
  run_file, roots = [str(tmp_path / "run.gin")], toy_parts.ROOTS
  assert run_config.read(run_file, roots=roots, allowed_imports=["tests.config"])
  with pytest.raises(errors.UserError, match=r"--allow_gin_import=tests\.config\.toy"):
    run_config.read(run_file, roots=roots, allowed_imports=["tests.conf"])


def _load(*params):
  return run_config.load([], params, roots=toy_parts.ROOTS)


def test_scoped_parts_have_separate_bindings():
  read = _load(
    "toy_train.loss = None",
    "toy_train.data = @train/ToyPipeline()",
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = 7",
    "train/ToyPipeline.seed = 1",
    "eval/ToyPipeline.seed = 2",
  )
  _, _, _, train_data, *_ = toy_parts.toy_train("run")
  evaluate_data, _ = toy_parts.toy_evaluate()
  assert (train_data.index, train_data.seed) == (7, 1)
  assert (evaluate_data.index, evaluate_data.seed) == (7, 2)
  assert read.values["toy_train.data.seed"] == "1"
  assert read.values["toy_evaluate.data.seed"] == "2"
  assert read.values["toy_train.data.index"] == "7"


def test_part_inside_a_scoped_part_keeps_the_scope():
  read = _load(
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = 7",
    "ToyPipeline.decoder = @toy_decoder()",
    "toy_decoder.height = 3",
    "eval/toy_decoder.height = 4",
  )
  data, _ = toy_parts.toy_evaluate()
  assert data.decoder == 4
  assert read.values["toy_evaluate.data.decoder.height"] == "4"


def test_macro_evaluates_its_value_in_a_scope_of_its_name():
  read = _load(
    "toy_evaluate.data = @eval/ToyPipeline()",
    "ToyPipeline.index = %INDEX",
    "INDEX = @toy_decoder()",
    "toy_decoder.height = 3",
    "INDEX/toy_decoder.height = 5",
  )
  data, _ = toy_parts.toy_evaluate()
  assert data.index == 5
  assert read.values["toy_evaluate.data.index.height"] == "5"


@pytest.mark.parametrize("container", ["[{}]", "({},)", "{{'a': {}}}"])
def test_references_inside_containers_are_followed(container):
  value = container.format("@OtherToyLoss()")
  read = _load(
    "toy_train.loss = None", f"toy_train.actions = {value}", "OtherToyLoss.scale = 2"
  )
  *_, actions = toy_parts.toy_train("run")
  (action,) = actions.values() if isinstance(actions, dict) else actions
  assert action.scale == 2
  assert "2" in read.values.values()


def test_tuple_list_and_single_element_are_distinguished():
  texts = ["(1,)", "[1]", "1", "(1, 2)", "{}", "()"]
  values = [
    _load("toy_train.loss = None", f"toy_train.actions = {text}").hash for text in texts
  ]
  assert len(set(values)) == len(texts)
