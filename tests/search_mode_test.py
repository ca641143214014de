"""Embed, index and search from the command line, on digits and an untrained encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from trainer import task
from trainer.data.records import RecordIndex
from trainer.loop.checkpoint import Checkpoints
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.retrieval.embedding_folder import EmbeddingFolder

_DIGITS = "configs/runs/digits.gin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with records, a checkpoint, and the embeddings of all digits."""
  folder = tmp_path_factory.mktemp("search")
  encoder = Encoder(
    backbone=ConvNet(filters=(32, 64)), embedding_size=64, pooling="generalized_mean"
  )
  encoder.create_variables((8, 8, 1))
  Checkpoints(model_dir=str(folder / "run"), encoder=encoder).save(3)
  assert _task(folder, "ingest") == 0
  assert _task(folder, "embed") == 0
  return folder


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


def _answers(folder, capsys, *flags, params=(), status=0):
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


def test_an_image_finds_its_own_record_first(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  [answer] = _answers(folder, capsys, f"--query={_image(folder, 7)}")
  first, *others = answer["hits"]
  assert first["key"] == kept.keys[7]
  assert first["distance"] == pytest.approx(0, abs=2e-3)
  assert len(others) == 9
  distances = [hit["distance"] for hit in others]
  assert distances == sorted(distances)


def test_a_key_finds_others_than_itself(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  [answer] = _answers(folder, capsys, f"--query={kept.keys[7]}")
  squares = np.sum((kept.embeddings - kept.embeddings[7]) ** 2, axis=1)
  squares[7] = np.inf
  assert [hit["item"] for hit in answer["hits"]] == np.argsort(squares)[:10].tolist()
  assert (
    answer["hits"][0]["class_name"]
    == kept.class_names[int(kept.labels[answer["hits"][0]["item"]])]
  )


def test_vectors_are_answered_one_by_one_and_bad_ones_told(folder, capsys):
  kept = EmbeddingFolder(str(folder / "run" / "embeddings"))
  vectors = np.array(kept.embeddings[:3])
  vectors[1, 5] = np.nan
  np.save(folder / "vectors.npy", vectors)
  answers = _answers(folder, capsys, f"--query={folder / 'vectors.npy'}", status=2)
  assert [len(answer["hits"]) for answer in answers] == [10, 0, 10]
  assert "not finite" in answers[1]["error"]


def test_what_can_not_be_answered_holds_up_nothing_else(folder, capsys):
  (folder / "text.png").write_bytes(b"no image")
  np.save(folder / "short.npy", np.zeros([1, 5], np.float32))
  asked = [_image(folder, 3), "no such key"]
  asked += [str(folder / "text.png"), str(folder / "short.npy")]
  answers = _answers(folder, capsys, *(f"--query={q}" for q in asked), status=2)
  assert len(answers[0]["hits"]) == 10
  words = ["neither a file nor a key", "can't be decoded", "5 dimensions"]
  for answer, word in zip(answers[1:], words):
    assert word in answer["error"]


def test_an_index_answers_as_exact_search_does(folder, capsys):
  assert _task(folder, "index", params=["index.kind = 'flat'"]) == 0
  query = f"--query={_image(folder, 11)}"
  index = [f"search.index = '{folder / 'run' / 'index'}'"]
  [exact] = _answers(folder, capsys, query)
  [indexed] = _answers(folder, capsys, query, params=index)
  assert [h["item"] for h in indexed["hits"]] == [h["item"] for h in exact["hits"]]
  manifest = json.loads((folder / "run" / "index" / "manifest.json").read_text())
  assert manifest["recall_at_10"] == pytest.approx(1.0, abs=0.01)
  assert manifest["source"]["step"] == 3


def test_the_table_and_the_picture_show_what_was_found(folder, capsys):
  picture = folder / "found.png"
  asked = (f"--query={_image(folder, 2)}", f"--picture={picture}")
  assert _task(folder, "search", *asked, params=["search.num_neighbours = 4"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].endswith("2.png")
  assert [line.split()[0] for line in lines[1:5]] == ["1", "2", "3", "4"]
  pixels = tf.io.decode_png(picture.read_bytes())
  # The query and four found, each 48 pixels high and wide, with gaps.
  assert pixels.shape == (2 + 50, 2 + 5 * 50 + 10, 1)


@pytest.mark.parametrize(
  ("flags", "params", "words"),
  [
    ((), (), "Nothing is asked"),
    (("--query=x",), ("search.num_neighbours = 0",), "num_neighbours=0"),
    (("--query=x",), ("search.index = '/nowhere'",), "run --mode=index first"),
    (("--query=x",), ("search.embeddings = '/nowhere'",), "run --mode=embed first"),
  ],
)
def test_mistakes_are_told_in_one_line(folder, capsys, flags, params, words):
  assert _task(folder, "search", *flags, params=params) == 2
  [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
  assert words in line


def test_more_neighbours_than_there_are_items_have_no_answer(folder, capsys):
  params = ["search.num_neighbours = 2000"]
  [answer] = _answers(
    folder, capsys, f"--query={_image(folder, 3)}", params=params, status=2
  )
  assert "2000 neighbours can't be had" in answer["error"]
