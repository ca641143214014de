"""Embeddings on disk: completeness, resuming and refused inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer.cli import embed
from trainer.cli.embed import Embedding
from trainer.cli.evaluate import Evaluation
from trainer.cli.ingest import ingest
from trainer.data.dataset import Dataset, ListSplit
from trainer.data.images import ImageDecoder
from trainer.data.records import RecordIndex
from trainer.data.sources.source import DigitsSource
from trainer.distribute.workers import Workers
from trainer.errors import UserError
from trainer.models.backbones import Perceptron
from trainer.models.encoder import Encoder
from trainer.retrieval import embedding_store
from trainer.retrieval.embedding_store import EmbeddingFolder, EmbeddingWriter
from trainer.retrieval.ground_truth import RecordItems

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


def test_raw_data_is_ingested_first(trained, tmp_path):
  records = str(tmp_path / "records")
  embedding = Embedding(records=records, source=DigitsSource())
  embedding.ingest()
  assert RecordIndex.open(records).num_records == _NUM_DIGITS
  assert embedding.open(trained).num_records == _NUM_DIGITS


def _writer(folder, **options):
  arguments = {
    "shape": (30_000, 2),
    "dtype": "float32",
    "source": {"step": 1},
    "rows_per_batch": 1_000,
  }
  return EmbeddingWriter(str(folder), **{**arguments, **options})


def test_saved_rows_are_not_embedded_again(tmp_path):
  rows = np.random.default_rng(1).normal(size=(30_000, 2)).astype(np.float32)
  writer = _writer(tmp_path)
  for start in range(0, 12_000, 1_000):
    writer.append(rows[start : start + 1_000])
  del writer  # A kill: `finish` was not called.
  writer = _writer(tmp_path)
  assert writer.num_done == 9_000
  for start in range(9_000, 30_000, 1_000):
    writer.append(rows[start : start + 1_000])
  writer.finish(np.zeros(30_000), map(str, range(30_000)), ["all"])
  np.testing.assert_array_equal(EmbeddingFolder(str(tmp_path)).embeddings, rows)


@pytest.mark.parametrize(
  "options",
  [
    {"shape": (30_000, 3)},
    {"dtype": "float16"},
    {"source": {"step": 2}},
    {"rows_per_batch": 999},
  ],
)
def test_rows_of_other_embeddings_are_not_resumed(tmp_path, options):
  _writer(tmp_path).append(np.zeros([10_000, 2]))
  assert _writer(tmp_path).num_done > 0
  assert _writer(tmp_path, **options).num_done == 0


def test_partial_embeddings_are_not_opened(tmp_path):
  _writer(tmp_path).append(np.zeros([10_000, 2]))
  with pytest.raises(UserError, match="no embeddings; run --mode=embed"):
    EmbeddingFolder(str(tmp_path))


class _Killed(BaseException):
  pass


def _dies_after(monkeypatch, name, num_calls):
  """Makes a method of the writer raise at its n-th call."""
  method = getattr(EmbeddingWriter, name)
  left = [num_calls]

  def dying(writer, *arguments):
    if not left[0]:
      raise _Killed
    left[0] -= 1
    method(writer, *arguments)

  monkeypatch.setattr(EmbeddingWriter, name, dying)


@pytest.fixture
def appended(monkeypatch):
  """A list that receives each written batch."""
  calls = []
  append = EmbeddingWriter.append
  monkeypatch.setattr(
    EmbeddingWriter, "append", lambda *given: calls.append(1) or append(*given)
  )
  return calls


# 1797 = 3 · 512 + 261. Killed before the last batch, before the manifest and after it.
@pytest.mark.parametrize(
  ("method", "num_calls", "num_left"),
  thorough_except(
    [("append", 3, 1)], [("append", 3, 1), ("finish", 0, 0), ("_publish", 0, 0)]
  ),
)
def test_rows_saved_before_a_kill_are_not_embedded_again(
  trained, tmp_path, monkeypatch, appended, method, num_calls, num_left
):
  monkeypatch.setattr(embedding_store, "_ROWS_PER_NOTE", 1)
  with monkeypatch.context() as patched, pytest.raises(_Killed):
    _dies_after(patched, method, num_calls)
    _embed(trained, tmp_path)
  appended.clear()
  found = _embed(trained, tmp_path)
  np.testing.assert_allclose(found.embeddings, _expected(trained), atol=1e-6)
  assert len(set(found.keys)) == _NUM_DIGITS
  assert len(appended) == num_left


def test_existing_embeddings_are_not_recomputed(trained, tmp_path, appended):
  _embed(trained, tmp_path)
  assert len(appended) == 4
  _embed(trained, tmp_path)
  assert len(appended) == 4
  rows = np.lib.format.open_memmap(tmp_path / "embeddings.npy", "r+")
  rows[5] += 1.0
  rows.flush()
  found = _embed(trained, tmp_path)
  assert len(appended) == 8
  np.testing.assert_allclose(found.embeddings, _expected(trained), atol=1e-6)


def test_open_embeddings_stay_readable_while_they_are_replaced(tmp_path):
  def write(value, **options):
    writer = _writer(tmp_path, shape=(3, 2), source={"value": value}, **options)
    writer.append(np.full([3, 2], value))
    return writer

  write(1.0).finish(np.zeros(3), "abc", ["all"])
  reader = EmbeddingFolder(str(tmp_path))
  writer = write(2.0)
  assert EmbeddingFolder(str(tmp_path)).source == {"value": 1.0}
  writer.finish(np.zeros(3), "abc", ["all"])
  np.testing.assert_array_equal(reader.embeddings, np.ones([3, 2]))
  np.testing.assert_array_equal(EmbeddingFolder(str(tmp_path)).embeddings, 2.0)
  assert not (tmp_path / "staging").exists()


def test_values_beyond_half_precision_are_counted_and_refused(trained, tmp_path):
  class Large(tf.keras.Model):
    embedding_size = 4

    def call(self, inputs, training=None):
      return trained.encoder(inputs) * 0.0 + 70_000.0

  large = Evaluation(encoder=Large(), dataset=trained.dataset)
  with pytest.raises(
    UserError, match=r"512 of 512 embeddings .* float16 can't represent"
  ):
    _embed(large, tmp_path, dtype="float16")


def test_unwritable_folder_is_reported(tmp_path):
  (tmp_path / "file").write_text("no folder")
  with pytest.raises(UserError, match="can't be written: Not a directory"):
    _writer(tmp_path / "file" / "embeddings")


@pytest.mark.parametrize("num_written", [None, 0])
def test_workers_stop_if_the_chief_cannot_write(
  trained, tmp_path, monkeypatch, num_written
):
  messages = ["null", "null", "[0, false]"] if num_written is not None else []
  messages.append('["UserError", "the disk is full"]')
  workers = Workers()
  workers.index, workers.num_workers = 1, 2
  workers.exchange = lambda own: [messages.pop(0), own]
  monkeypatch.setattr(embed, "current_workers", lambda: workers)
  with pytest.raises(UserError, match=r"^worker 0: the disk is full$"):
    _embed(trained, tmp_path)
  assert not messages


def test_integer_keys_are_read_as_text(tmp_path):
  feature = tf.train.Feature(int64_list=tf.train.Int64List(value=[17]))
  example = tf.train.Example(features=tf.train.Features(feature={"key": feature}))

  class Index:
    labels = np.zeros(1, np.int32)
    class_names = ("all",)

    def read(self, numbers):
      return [example.SerializeToString() for _ in numbers]

    def describe(self, number):
      return f"record {number}"

  assert list(RecordItems(Index(), np.arange(1)).names()) == ["17"]


@pytest.fixture
def written(tmp_path):
  """A folder with three embeddings of one class."""
  writer = _writer(tmp_path, shape=(3, 2))
  writer.append(np.ones([3, 2]))
  writer.finish(np.zeros(3), "abc", ["all"])
  return tmp_path


@pytest.mark.parametrize("label", [-1, 1])
def test_labels_without_a_class_are_refused(written, label):
  np.save(written / "labels.npy", np.full(3, label, np.int32))
  with pytest.raises(UserError, match=r"labels\.npy has labels outside 0 to 0"):
    EmbeddingFolder(str(written))


def test_key_offsets_outside_the_text_are_refused(written):
  starts = np.load(written / "keys_starts.npy")
  starts[-1] += 1_000
  np.save(written / "keys_starts.npy", starts)
  with pytest.raises(
    UserError, match=r"keys_starts\.npy has no ascending parts from 0"
  ):
    EmbeddingFolder(str(written))


def test_encoder_hash_is_the_same_on_any_number_of_replicas(mirrored):
  def provenance(num_replicas, kernel):
    with mirrored(num_replicas).scope():
      encoder = Encoder(backbone=Perceptron(hidden_units=(3,)), embedding_size=2)
      encoder.create_variables((5,))
      encoder.variables[0].assign(tf.fill(encoder.variables[0].shape, kernel))
      for variable in encoder.variables[1:]:
        variable.assign(tf.ones(variable.shape))
      return embedding_store.encoder_provenance(encoder, {"evaluate.encoder.a": "1"}, 3)

  assert provenance(1, 0.1) == provenance(3, 0.1)
  assert provenance(1, 0.1) != provenance(1, 0.2)


def test_arrays_that_contradict_their_manifest_are_refused(written):
  np.save(written / "labels.npy", np.zeros(5, np.int32))
  with pytest.raises(UserError, match=r"3 embeddings .* 5 labels"):
    EmbeddingFolder(str(written))


def test_pickled_array_is_not_opened(written):
  np.save(written / "labels.npy", np.array([{}], object), allow_pickle=True)
  with pytest.raises(UserError, match=r"labels\.npy is missing or damaged"):
    EmbeddingFolder(str(written))


def test_invalid_manifest_is_refused(tmp_path):
  (tmp_path / "manifest.json").write_text(json.dumps([1]))
  with pytest.raises(UserError, match="no embeddings"):
    EmbeddingFolder(str(tmp_path))


def test_nonfinite_embeddings_are_counted_and_refused(trained, tmp_path):
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
def test_invalid_options_are_refused(options, words):
  with pytest.raises(UserError, match=words):
    Embedding(**options)
