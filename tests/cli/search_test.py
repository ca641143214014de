"""Embed, index and search from the command line: digits and an untrained encoder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer import task
from trainer.data.records import RecordIndex
from trainer.errors import UserError
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.retrieval import embedding_store, faiss_index
from trainer.retrieval import query as query_lib
from trainer.retrieval.embedding_store import EmbeddingFolder
from trainer.retrieval.knn import nearest
from trainer.training.checkpoint import Checkpoints

_DIGITS = "configs/runs/digits.gin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with records, a checkpoint, and the embeddings of all digits."""
  folder = tmp_path_factory.mktemp("search")
  _save(folder, step=3)
  assert _task(folder, "ingest") == 0
  assert _task(folder, "embed") == 0
  return folder


def _save(folder, step, seed=1):
  """Saves an encoder with random weights of a seed."""
  tf.keras.utils.set_random_seed(seed)
  encoder = Encoder(
    backbone=ConvNet(filters=(32, 64)), embedding_size=64, pooling="generalized_mean"
  )
  encoder.create_variables((8, 8, 1))
  checkpoints = Checkpoints(model_dir=str(folder / "run"), encoder=encoder)
  checkpoints.save(step)
  checkpoints.wait()


def _task(folder, mode, *flags, params=()):
  params = [f"DATA_DIR = '{folder / 'data'}'", *params]
  return task.main(
    [
      *("trainer", f"--mode={mode}", f"--gin_file={_DIGITS}"),
      f"--model_dir={folder / 'run'}",
      *(f"--gin_param={param}" for param in params),
      *flags,
    ]
  )


def _results(folder, capsys, *flags, params=(), status=0):
  capsys.readouterr()
  assert _task(folder, "search", "--json", *flags, params=params) == status
  return json.loads(capsys.readouterr().out)


def _image(folder, item):
  """Writes the image of a record."""
  [record] = RecordIndex.open(str(folder / "data")).read([item])
  features = tf.train.Example.FromString(record).features.feature
  path = folder / f"{item}.png"
  path.write_bytes(features["image"].bytes_list.value[0])
  return str(path)


def test_class_centres_of_a_checkpoint_without_them_are_refused(folder, capsys):
  params = ["embed.content = 'class_centres'"]
  assert _task(folder, "embed", params=params) == 2
  assert "has no class centres" in capsys.readouterr().err


def test_an_image_finds_its_own_record_first(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  [result] = _results(folder, capsys, f"--query={_image(folder, 7)}")
  first, *others = result["hits"]
  assert first["key"] == kept.keys[7]
  assert first["distance"] == pytest.approx(0, abs=2e-3)
  assert len(others) == 9
  distances = [hit["distance"] for hit in others]
  assert distances == sorted(distances)


def test_key_is_not_its_own_neighbour(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  [result] = _results(folder, capsys, f"--query={kept.keys[7]}")
  squares = np.sum((kept.embeddings - kept.embeddings[7]) ** 2, axis=1)
  squares[7] = np.inf
  assert [hit["item"] for hit in result["hits"]] == np.argsort(squares)[:10].tolist()
  assert (
    result["hits"][0]["class_name"]
    == kept.class_names[int(kept.labels[result["hits"][0]["item"]])]
  )


def test_an_image_of_another_format_is_converted_as_at_ingest(folder, capsys):
  png, webp = _image(folder, 7), str(folder / "7.webp")
  with Image.open(png) as image:
    image.save(webp, lossless=True)
  wanted, got = _results(folder, capsys, f"--query={png}", f"--query={webp}")
  assert got["hits"] == wanted["hits"]
  pictures = [str(folder / "of_png.png"), str(folder / "of_webp.png")]
  for query, picture in zip((png, webp), pictures):
    assert _task(folder, "search", f"--query={query}", f"--picture={picture}") == 0
  assert tf.io.read_file(pictures[0]) == tf.io.read_file(pictures[1])


def test_vectors_are_searched_one_by_one_and_bad_ones_reported(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  vectors = np.array(kept.embeddings[:3])
  vectors[1, 5] = np.nan
  with open(folder / "vectors.NPY", "wb") as file:
    np.save(file, vectors)
  results = _results(folder, capsys, f"--query={folder / 'vectors.NPY'}", status=2)
  assert [len(result["hits"]) for result in results] == [10, 0, 10]
  assert "not finite" in results[1]["error"]


def test_failed_queries_do_not_affect_other_queries(folder, capsys):
  (folder / "text.png").write_bytes(b"no image")
  np.save(folder / "short.npy", np.zeros([1, 5], np.float32))
  queries = [_image(folder, 3), "no such key"]
  queries += [str(folder / "text.png"), str(folder / "short.npy")]
  results = _results(folder, capsys, *(f"--query={q}" for q in queries), status=2)
  assert len(results[0]["hits"]) == 10
  words = ["neither a file nor a key", "can't be decoded", "5 dimensions"]
  for result, word in zip(results[1:], words):
    assert word in result["error"]


def test_index_returns_the_results_of_exact_search(folder, capsys):
  assert _task(folder, "index", params=["index.kind = 'flat'"]) == 0
  query = f"--query={_image(folder, 11)}"
  index = [f"search.index = '{folder / 'run' / 'index'}'"]
  [exact] = _results(folder, capsys, query)
  [indexed] = _results(folder, capsys, query, params=index)
  assert [h["item"] for h in indexed["hits"]] == [h["item"] for h in exact["hits"]]
  manifest = json.loads((folder / "run" / "index" / "manifest.json").read_text())
  assert manifest["recall_at_10"] == pytest.approx(1.0, abs=0.01)
  assert manifest["source"]["step"] == 3


def test_table_and_picture_show_the_results(folder, capsys):
  picture = folder / "found.png"
  queries = (f"--query={_image(folder, 2)}", f"--picture={picture}")
  assert _task(folder, "search", *queries, params=["search.num_neighbours = 4"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("2.png")
  assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "3", "4"]
  pixels = tf.io.decode_png(picture.read_bytes())
  # The query and four neighbours, each 48 by 48 pixels, with gaps.
  assert pixels.shape == (2 + 50, 2 + 5 * 50 + 10, 1)


def test_query_files_without_a_vector_are_reported(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  (folder / "folder.png").mkdir()
  (folder / "nothing.npy").write_bytes(b"")
  np.save(folder / "none.npy", np.zeros([0, 64], np.float32))
  np.save(folder / "long.npy", np.full([1, 64], 1e19, np.float32))
  np.save(folder / "longer.npy", np.full([1, 64], 1e300))
  np.save(folder / "complex.npy", np.ones([1, 64], np.complex64))
  names = ("folder.png", "nothing.npy", "none.npy", "long.npy", "longer.npy")
  queries = [*(str(folder / name) for name in (*names, "complex.npy")), kept.keys[5]]
  *bad, good = _results(folder, capsys, *(f"--query={q}" for q in queries), status=2)
  words = ["can't be read", "not hold an array", "(0, 64)", "too long", "not finite"]
  for result, word in zip(bad, [*words, "not hold an array"]):
    assert word in result["error"]
    assert not result["hits"]
  assert len(good["hits"]) == 10


def test_query_file_without_rows_fails(folder, capsys):
  np.save(folder / "none.npy", np.zeros([0, 64], np.float32))
  [result] = _results(folder, capsys, f"--query={folder / 'none.npy'}", status=2)
  assert "(0, 64)" in result["error"]


def test_queries_are_searched_in_one_batch_and_keys_are_excluded(folder):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  vectors = str(folder / "two.npy")
  np.save(vectors, np.array(kept.embeddings[:2]))
  calls = []

  def search(queries, k):
    calls.append((len(queries), k))
    return nearest(queries, kept.embeddings, num_neighbours=k)

  found = query_lib.search(
    [vectors, kept.keys[1], "no such key"],
    kept,
    embed_fn=lambda _: np.zeros(64),
    nearest_fn=search,
    num_neighbours=4,
  )
  assert calls == [(3, 5)]
  assert [len(each.hits) for each in found] == [4, 4, 4, 0]
  assert found[1].items()[1:] == found[2].items()[:3]


def test_k_of_a_key_query_is_limited_to_the_other_items(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  params = ["search.num_neighbours = 1797"]
  queries = f"--query={kept.keys[7]}"
  [found] = _results(folder, capsys, queries, params=params, status=2)
  assert "num_neighbours=1797 exceeds the gallery size 1796" in found["error"]


def test_an_image_is_not_compared_with_embeddings_of_another_step(folder, capsys):
  image, key = f"--query={_image(folder, 7)}", "--query=no such key"
  _save(folder, step=4)
  try:
    found = _results(folder, capsys, image, key, status=2)
  finally:
    shutil.rmtree(folder / "run" / "checkpoints")
    _save(folder, step=3)
  assert "step was 3 and is 4; run --mode=embed again" in found[0]["error"]


def test_an_image_is_not_compared_with_embeddings_of_other_weights(folder, capsys):
  shutil.copytree(folder / "run" / "checkpoints", folder / "kept")
  shutil.rmtree(folder / "run" / "checkpoints")
  _save(folder, step=3, seed=2)
  try:
    [found] = _results(folder, capsys, f"--query={_image(folder, 7)}", status=2)
  finally:
    shutil.rmtree(folder / "run" / "checkpoints")
    shutil.move(folder / "kept", folder / "run" / "checkpoints")
  assert "weights was" in found["error"]


def test_an_index_of_other_embeddings_is_refused(folder, tmp_path, capsys):
  shutil.copytree(folder / "run" / "embeddings", tmp_path / "embeddings")
  embeddings = np.load(tmp_path / "embeddings" / "embeddings.npy")
  index = faiss_index.build_index(embeddings[::-1].copy(), "flat")
  faiss_index.write_index(
    str(tmp_path / "index"), index, {"embeddings_sha256": "0" * 64}
  )
  params = [f"search.index = '{tmp_path / 'index'}'"]
  assert _task(folder, "search", "--query=x", params=params) == 2
  assert "indexes other embeddings" in capsys.readouterr().err


def test_pictures_of_changed_records_are_refused(folder):
  index = RecordIndex.open(str(folder / "data"))
  embedding_store.check_same_records(index.fingerprint(), index)
  with pytest.raises(
    UserError, match=r"from other records: the number of records was 3"
  ):
    embedding_store.check_same_records({"the number of records": "3"}, index)


@pytest.mark.parametrize(
  ("flags", "params", "words"),
  [
    ((), (), "No query is given"),
    (("--query=x",), ("search.num_neighbours = 0",), "num_neighbours=0"),
    (("--query=x",), ("search.index = '/nowhere'",), "run --mode=index first"),
    (("--query=x",), ("search.embeddings = '/nowhere'",), "run --mode=embed first"),
  ],
)
def test_user_errors_are_reported_in_one_line(folder, capsys, flags, params, words):
  assert _task(folder, "search", *flags, params=params) == 2
  [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
  assert words in line


def test_k_above_the_gallery_size_is_refused(folder, capsys):
  params = ["search.num_neighbours = 2000"]
  [result] = _results(
    folder, capsys, f"--query={_image(folder, 3)}", params=params, status=2
  )
  assert "num_neighbours=2000 exceeds the gallery size" in result["error"]


_HOLD = """
import sys
from trainer.runtime.lease import locked_folder
with locked_folder(sys.argv[1], "writing into"):
  print("in", flush=True)
  sys.stdin.read()
"""


@pytest.mark.parametrize(
  ("mode", "name"), [("embed", "embeddings"), ("index", "index"), ("export", "export")]
)
def test_second_writer_of_a_folder_is_refused(folder, mode, name, tmp_path, capsys):
  """It is refused before it touches staged files of the first writer."""
  target = tmp_path / name
  staged = target / "staging" / "half done"
  staged.parent.mkdir(parents=True)
  staged.write_text("of the first")
  params = [f"{mode}.folder = '{target}'"]
  with subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(target)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as first:
    assert first.stdout.readline() == "in\n"
    assert _task(folder, mode, params=params) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"process {first.pid} of " in line
    assert f"is writing into {target} since" in line
    assert staged.read_text() == "of the first"
    first.communicate("")
  assert _task(folder, mode, params=params) == 0
  assert not list(target.glob(".in-use-*"))
