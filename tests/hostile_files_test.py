"""No file is ever unpickled, whatever its content."""

from __future__ import annotations

import ast
import os
import pathlib

import numpy as np
import pytest

import trainer
from trainer.data import ingestion, triplet_sampler
from trainer.data.records import RecordIndex
from trainer.data.sources.arrays import NumpySource
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError
from trainer.retrieval import query
from trainer.retrieval.embedding_store import EmbeddingFolder, EmbeddingWriter

_PACKAGE = pathlib.Path(trainer.__file__).parent
_UNPICKLERS = {
  "pickle",
  "cPickle",
  "dill",
  "joblib",
  "marshal",
  "shelve",
  "torch",
  "yaml",
}


class _Bomb:
  """Creates a folder when it is unpickled."""

  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


@pytest.fixture
def plant(tmp_path):
  """Replaces a file by a pickled array; returns the folder that it would create."""
  crater = tmp_path / "crater"

  def call(path):
    np.save(path, np.array([_Bomb(crater)], object), allow_pickle=True)
    return crater

  return call


def test_planted_array_executes_if_unpickled(plant, tmp_path):
  crater = plant(tmp_path / "array.npy")
  assert not crater.exists()
  np.load(tmp_path / "array.npy", allow_pickle=True)
  assert crater.exists()


def _index(tmp_path):
  image = encode_png(np.zeros((4, 4), np.uint8))
  items = [Item(str(number), str(number % 2), image) for number in range(6)]
  folder = str(tmp_path / "data")
  ingestion.write_records(items, folder, records_per_shard=10, fingerprint={})
  return tmp_path / "data"


def test_an_index_is_not_unpickled(plant, tmp_path):
  folder = _index(tmp_path)
  arrays = sorted(folder.rglob("*.npy"))
  assert len(arrays) > 4
  for path in arrays:
    good = path.read_bytes()
    crater = plant(path)
    with pytest.raises(UserError, match="damaged"):
      RecordIndex.open(str(folder)).describe(0)
    assert not crater.exists()
    path.write_bytes(good)
  assert RecordIndex.open(str(folder)).num_records == 6


_HEADS = (b'"""', b"((((", b"{'x", b"\xff\xff")


@pytest.mark.parametrize("head", _HEADS)
def test_damaged_array_header_is_reported_in_one_line(tmp_path, head):
  path = tmp_path / "array.npy"
  np.save(path, np.zeros([3, 3], np.int64))
  content = path.read_bytes()
  path.write_bytes(content[:10] + head + content[10 + len(head) :])
  records = RecordIndex.open(str(_index(tmp_path)))
  with pytest.raises(UserError, match=r"array\.npy is not an array"):
    triplet_sampler.read_triplets(str(path), records, is_strict=True)
  with pytest.raises(UserError, match=r"array\.npy can't be read as a NumPy file"):
    list(NumpySource(inputs=str(path), labels=str(path)).loaders())
  with pytest.raises(UserError, match=r"array\.npy does not hold an array of numbers"):
    query._vectors(str(path))


def _embeddings(folder):
  embeddings = EmbeddingWriter(
    str(folder), shape=(3, 2), dtype="float32", source={}, rows_per_batch=3
  )
  embeddings.append(np.zeros([3, 2], np.float32))
  embeddings.finish(np.zeros(3, np.int32), ["a", "b", "c"], ["x"])
  return sorted(folder.glob("*.npy"))


@pytest.mark.parametrize("head", _HEADS)
def test_damaged_headers_of_embeddings_are_reported_in_one_line(tmp_path, head):
  for path in _embeddings(tmp_path / "embeddings"):
    good = path.read_bytes()
    path.write_bytes(good[:10] + head + good[10 + len(head) :])
    with pytest.raises(
      UserError, match=r"is missing or damaged; run --mode=embed again"
    ):
      EmbeddingFolder(str(tmp_path / "embeddings")).position("a")
    path.write_bytes(good)
  assert EmbeddingFolder(str(tmp_path / "embeddings")).position("a") == 0


def test_embeddings_are_not_unpickled(plant, tmp_path):
  folder = tmp_path / "embeddings"
  arrays = _embeddings(folder)
  assert len(arrays) > 4
  for path in arrays:
    good = path.read_bytes()
    crater = plant(path)
    with pytest.raises(ValueError):
      EmbeddingFolder(str(folder)).position("a")
    assert not crater.exists()
    path.write_bytes(good)
  assert EmbeddingFolder(str(folder)).position("a") == 0


def _calls(tree):
  return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _imported(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield node.module.split(".")[0]


def test_package_never_unpickles_or_evaluates():
  paths = sorted(_PACKAGE.rglob("*.py"))
  assert len(paths) > 100
  for path in paths:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not _UNPICKLERS & set(_imported(tree)), path
    for call in _calls(tree):
      name = ast.unparse(call.func)
      options = {each.arg: ast.unparse(each.value) for each in call.keywords}
      assert name not in ("eval", "exec"), path
      assert name != "np.load" or options.get("allow_pickle") == "False", path
      assert options.get("allow_pickle", "False") == "False", path
