"""The structure of the package: import layers, and unique names."""

from __future__ import annotations

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

# Each layer may import the layers before it.
_LAYERS = (
  *("errors", "runtime", "config", "run", "data", "distribute", "models", "losses"),
  *("training", "retrieval", "mining", "report", "serving", "cli"),
  *("gin_registrations", "task", "sweep", "tpu_check"),
)


def _modules():
  """Returns the syntax tree of each module, by name."""
  modules = {}
  for path in sorted((ROOT / "trainer").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    modules[name.removesuffix(".__init__")] = ast.parse(path.read_text("utf-8"))
  return modules


def _imported(tree, modules):
  """Returns modules of the package imported anywhere in a module."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer"):
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        yield name if name in modules else node.module


def _layer(module):
  return _LAYERS.index(module.split(".")[1])


def test_imports_point_down():
  modules = _modules()
  upward = [
    f"{module} imports {imported}"
    for module, tree in modules.items()
    if module != "trainer"
    for imported in _imported(tree, modules)
    if imported != "trainer" and _layer(imported) > _layer(module)
  ]
  assert not upward


def test_no_import_cycle_exists():
  modules = _modules()
  waiting = {
    name: {each for each in _imported(tree, modules) if each != name}
    for name, tree in modules.items()
  }
  while True:
    free = {name for name, needed in waiting.items() if not needed & set(waiting)}
    if not free:
      break
    waiting = {name: needed for name, needed in waiting.items() if name not in free}
  assert not waiting


def test_no_two_modules_share_a_name():
  names = collections.Counter(
    path.name
    for path in (ROOT / "trainer").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
  )
  assert not [name for name, count in names.items() if count > 1]


def test_no_two_public_classes_share_a_name():
  names = collections.Counter(
    node.name
    for tree in _modules().values()
    for node in tree.body
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
  )
  assert not [name for name, count in names.items() if count > 1]
