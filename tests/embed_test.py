"""Embeddings on disk: complete, resumable, refused where they don't fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.dataset import Dataset
from trainer.data.decode import ImageDecoder
from trainer.data.records import RecordIndex
from trainer.data.sources import DigitsSource
from trainer.data.split import ListSplit
from trainer.embed import Embedding
from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.ingest import ingest
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.retrieval.embedding_folder import EmbeddingFolder, EmbeddingWriter

_NUM_DIGITS = 1797


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """An encoder with random weights, and digits."""
  folder = str(tmp_path_factory.mktemp("digits"))
  ingest(source=DigitsSource(), folder=folder)
  dataset = Dataset(
    folder=folder,
    split=ListSplit(evaluation_classes=("8", "9")),
    decoder=ImageDecoder(height=8, width=8, channels=1),
  )
  encoder = Encoder(backbone=Perceptron(hidden_units=(8,)), embedding_size=4)
  encoder.create_variables((8, 8, 1))
  return Evaluation(encoder=encoder, dataset=dataset)


def _embed(trained, folder, **options):
  embedding = Embedding(**{"global_batch_size": 512, **options})
  embedding.write(trained, embedding.open(trained), str(folder), {"step": 7})
  return EmbeddingFolder(str(folder))


def _expected(trained):
  records = trained.dataset.index.read(np.arange(_NUM_DIGITS))
  return trained.encoder(trained.dataset.decoder(tf.constant(records))).numpy()


def test_every_record_has_its_embedding_label_and_key(trained, mirrored, tmp_path):
  with mirrored(2).scope():
    found = _embed(trained, tmp_path)
  np.testing.assert_allclose(found.embeddings, _expected(trained), atol=1e-6)
  np.testing.assert_array_equal(found.labels, trained.dataset.index.labels)
  assert list(found.class_names) == [str(digit) for digit in range(10)]
  assert len(set(found.keys)) == _NUM_DIGITS
  assert found.position(found.keys[1234]) == 1234
  assert found.position("no such key") is None
  assert found.source["step"] == 7


def test_half_precision_takes_half_the_space(trained, tmp_path):
  found = _embed(trained, tmp_path, dtype="float16")
  assert found.embeddings.dtype == np.float16
  np.testing.assert_allclose(found.embeddings, _expected(trained), atol=1e-3)


def test_a_folder_of_raw_data_is_ingested_first(trained, tmp_path):
  records = str(tmp_path / "records")
  embedding = Embedding(records=records, source=DigitsSource())
  embedding.ingest()
  assert RecordIndex.open(records).num_records == _NUM_DIGITS
  assert embedding.open(trained).num_records == _NUM_DIGITS


def _writer(folder, **options):
  arguments = {"shape": (30_000, 2), "dtype": "float32", "source": {"step": 1}}
  return EmbeddingWriter(str(folder), **{**arguments, **options})


def test_rows_that_were_noted_are_not_embedded_again(tmp_path):
  rows = np.random.default_rng(1).normal(size=(30_000, 2)).astype(np.float32)
  writer = _writer(tmp_path)
  for start in range(0, 12_000, 1_000):
    writer.append(rows[start : start + 1_000])
  del writer  # Killed: nothing was finished.
  writer = _writer(tmp_path)
  assert writer.num_done == 9_000
  for start in range(9_000, 30_000, 1_000):
    writer.append(rows[start : start + 1_000])
  writer.finish(np.zeros(30_000), map(str, range(30_000)), ["all"])
  np.testing.assert_array_equal(EmbeddingFolder(str(tmp_path)).embeddings, rows)


@pytest.mark.parametrize(
  "options", [{"shape": (30_000, 3)}, {"dtype": "float16"}, {"source": {"step": 2}}]
)
def test_rows_of_something_else_are_not_gone_on_with(tmp_path, options):
  _writer(tmp_path).append(np.zeros([10_000, 2]))
  assert _writer(tmp_path).num_done > 0
  assert _writer(tmp_path, **options).num_done == 0


def test_half_written_embeddings_are_none(tmp_path):
  _writer(tmp_path).append(np.zeros([10_000, 2]))
  with pytest.raises(UserError, match="no embeddings; run --mode=embed"):
    EmbeddingFolder(str(tmp_path))


def test_arrays_that_do_not_fit_their_manifest_are_refused(trained, tmp_path):
  _embed(trained, tmp_path)
  np.save(tmp_path / "labels.npy", np.zeros(5, np.int32))
  with pytest.raises(UserError, match=r"1797 embeddings .* 5 labels"):
    EmbeddingFolder(str(tmp_path))


def test_a_pickle_among_the_arrays_is_not_opened(trained, tmp_path):
  _embed(trained, tmp_path)
  np.save(tmp_path / "labels.npy", np.array([{}], object), allow_pickle=True)
  with pytest.raises(UserError, match=r"labels\.npy is missing or damaged"):
    EmbeddingFolder(str(tmp_path))


def test_a_manifest_that_is_no_manifest_is_refused(tmp_path):
  (tmp_path / "manifest.json").write_text(json.dumps([1]))
  with pytest.raises(UserError, match="no embeddings"):
    EmbeddingFolder(str(tmp_path))


def test_embeddings_that_are_not_finite_are_counted_and_refused(trained, tmp_path):
  class Broken(tf.keras.Model):
    embedding_size = 4

    def call(self, inputs, training=None):
      return trained.encoder(inputs) / 0.0

  broken = Evaluation(encoder=Broken(), dataset=trained.dataset)
  with pytest.raises(UserError, match="512 of 512 embeddings"):
    _embed(broken, tmp_path)


@pytest.mark.parametrize(
  ("options", "words"),
  [({"dtype": "int8"}, "int8"), ({"source": DigitsSource()}, r"embed\.records")],
)
def test_options_that_do_not_fit_are_refused(options, words):
  with pytest.raises(UserError, match=words):
    Embedding(**options)
