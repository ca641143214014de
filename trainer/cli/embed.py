"""Mode `embed`: writes embeddings of records or raw data as arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from typing import Optional

import gin
import numpy as np
from absl import logging

from trainer.cli.evaluate import Evaluation, make_evaluation
from trainer.cli.ingest import ingest
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Source
from trainer.distribute.strategy import make_strategy
from trainer.distribute.workers import current_workers
from trainer.errors import UserError, check_choice
from trainer.retrieval import embedding_store
from trainer.retrieval.embedder import Embedder
from trainer.retrieval.embedding_store import EmbeddingWriter, locked_embeddings
from trainer.retrieval.ground_truth import RecordItems
from trainer.retrieval.ranking import check_finite
from trainer.run import Run, watching
from trainer.runtime.progress import Progress
from trainer.training.checkpoint_files import SavedCentres, saved_centres

_DTYPES = ("float32", "float16")
_CONTENTS = ("records", "class_centres")
_CENTRES_AT_ONCE = 65_536


def main(run: Run) -> None:
  """Embeds with the selected checkpoint; resumes a run that was killed."""
  strategy = make_strategy(run.hardware, run.fingerprint())
  with strategy.scope(), watching(run, current_workers().index):
    workers = current_workers()
    embedding = workers.run_on_all(lambda: Embedding())
    trained = make_evaluation()
    workers.run_on_chief(embedding.ingest)
    index = workers.run_on_all(lambda: embedding.open(trained))
    workers.check_equal(index.fingerprint())
    step = trained.restore(run.model_dir)
    folder = embedding.folder or os.path.join(run.model_dir, embedding.default_folder)
    source = {
      "records": os.path.abspath(embedding.records or trained.dataset.folder),
      "model_dir": os.path.abspath(run.model_dir),
      "config": run.config.hash,
      **embedding_store.encoder_provenance(trained.encoder, run.config.values, step),
      **index.fingerprint(),
    }
    if embedding.content == "class_centres":
      _check_newest(trained)
      source["content"] = embedding.content
      workers.run_on_chief(
        lambda: embedding.write_centres(
          trained, saved_centres(run.model_dir, step), folder, source
        )
      )
    else:
      embedding.write(trained, index, folder, source)


@gin.configurable("embed")
@dataclasses.dataclass(frozen=True)
class Embedding:
  """Options of embedding with the encoder and the decoder of `evaluate`.

  Attributes:
    records: folder or pattern of indexed records; None for those of
      `evaluate.dataset`, training classes included.
    source: raw data, such as an image folder or a list, that is first ingested into
      `records`; None for existing records.
    folder: of the embeddings; None for `embeddings`, or `class_centres`, in the run's
      folder.
    global_batch_size: records embedded at once, over all replicas.
    dtype: "float32", or "float16", which takes half the space.
    content: "records"; or "class_centres" of the loss, at norm 1, of the classes of
      `evaluate.dataset` that are trained. A search in them finds classes.

  Raises:
    UserError: a choice is unknown, there is a source without a folder of records, or
      there are records with class centres.
  """

  records: Optional[str] = None
  source: Optional[Source] = None
  folder: Optional[str] = None
  global_batch_size: int = 256
  dtype: str = "float32"
  content: str = "records"

  def __post_init__(self):
    check_choice("embed.dtype", self.dtype, _DTYPES)
    check_choice("embed.content", self.content, _CONTENTS)
    if self.content == "class_centres" and self.records is not None:
      raise UserError(
        "embed.content='class_centres' embeds no records; remove embed.records."
      )
    if self.source is not None and self.records is None:
      raise UserError(
        "embed.source needs embed.records, the folder for the ingested records."
      )

  @property
  def default_folder(self) -> str:
    """Name of the folder in the run's folder."""
    return "embeddings" if self.content == "records" else "class_centres"

  def ingest(self) -> None:
    """Converts raw data to records, if there is a source."""
    if self.source is not None:
      ingest(source=self.source, folder=str(self.records))

  def open(self, trained: Evaluation) -> RecordIndex:
    """Opens the records to embed."""
    return RecordIndex.open(self.records) if self.records else trained.dataset.index

  def write(
    self, trained: Evaluation, index: RecordIndex, folder: str, source: dict
  ) -> None:
    """Embeds all records of an index and writes the embeddings, unless they exist.

    Args:
      trained: its encoder and decoder are used.
      index: of the records.
      folder: of the embeddings.
      source: provenance of the embeddings.

    Raises:
      UserError: a record cannot be read, an embedding is not finite, the folder cannot
        be written to, or another process embeds into it.
    """
    with contextlib.ExitStack() as stack:
      current_workers().run_on_chief(
        lambda: stack.enter_context(locked_embeddings(folder))
      )
      self._write(trained, index, folder, source)

  def write_centres(
    self, trained: Evaluation, centres: SavedCentres, folder: str, source: dict
  ) -> None:
    """Writes the class centres of a checkpoint, unless they exist; on the chief.

    Args:
      trained: its dataset has the classes.
      centres: of the checkpoint.
      folder: of the embeddings.
      source: provenance of the embeddings.

    Raises:
      UserError: a class has no centre, a value is not finite, the folder cannot be
        written to, or another process embeds into it.
    """
    names = trained.dataset.index.class_names
    classes = np.sort(trained.dataset.train_classes)
    size = trained.encoder.embedding_size
    k = centres.rows.shape[1] // size
    shape = (len(classes) * k, size)
    with locked_embeddings(folder):
      writer = EmbeddingWriter(
        folder, shape=shape, dtype=self.dtype, source=source, rows_per_batch=k
      )
      for first in range(writer.num_done // k, len(classes), _CENTRES_AT_ONCE):
        hashes = names.hashes[classes[first : first + _CENTRES_AT_ONCE]]
        rows = centres.read(hashes).reshape(-1, size)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        writer.append(_in_dtype(rows / np.where(norms > 0, norms, 1), self.dtype))
      if not writer.is_finished:
        suffixes = [""] if k == 1 else [f"/{number}" for number in range(k)]
        keys = (names[int(each)] + suffix for each in classes for suffix in suffixes)
        writer.finish(np.repeat(classes, k), keys, names)
    logging.info("%d class centres of %d dimensions: %s", *shape, folder)

  def _write(
    self, trained: Evaluation, index: RecordIndex, folder: str, source: dict
  ) -> None:
    """Writes missing embeddings to a locked folder."""
    workers = current_workers()
    embedder = Embedder(
      trained.encoder,
      index,
      trained.dataset.decoder,
      global_batch_size=self.global_batch_size,
    )
    batch_size = embedder.global_batch_size
    shape = (index.num_records, trained.encoder.embedding_size)

    def open_writer():
      return EmbeddingWriter(
        folder, shape=shape, dtype=self.dtype, source=source, rows_per_batch=batch_size
      )

    writer = workers.run_on_all(open_writer if workers.is_chief else lambda: None)
    own = [writer.num_done, writer.is_finished] if writer else None
    num_done, is_finished = json.loads(workers.exchange(json.dumps(own))[0])
    if is_finished:
      logging.info("%s already holds these embeddings.", folder)
      return
    numbers = np.arange(index.num_records)
    progress = Progress("Embedding", "records", index.num_records, done=num_done)
    # Rows are written in whole steps, except for the last.
    for rows in embedder.embed(numbers, first_step=-(-num_done // batch_size)):
      rows = _in_dtype(rows, self.dtype)
      workers.run_on_all(
        functools.partial(writer.append, rows) if writer else lambda: None
      )
      progress.advance(len(rows))
    progress.finish()
    items = RecordItems(index, numbers)

    def finish():
      writer.finish(items.labels, items.names(), items.class_names)

    workers.run_on_chief(finish)
    logging.info("%d embeddings of %d dimensions: %s", *shape, folder)


def _check_newest(trained: Evaluation) -> None:
  if trained.checkpoint != "newest":
    raise UserError(
      f"evaluate.checkpoint={trained.checkpoint!r} has no class centres, because only "
      "the encoder is kept; set 'newest'."
    )


def _in_dtype(rows: np.ndarray, dtype: str) -> np.ndarray:
  """Converts rows [B, D] to the dtype, on every worker.

  Raises:
    UserError: they are not finite, or exceed the range of the dtype.
  """
  check_finite(rows)
  with np.errstate(over="ignore"):
    cast = rows.astype(dtype)
  num_bad = int((~np.isfinite(cast).all(axis=1)).sum())
  if num_bad:
    raise UserError(
      f"{num_bad} of {len(rows)} embeddings have values that {dtype} can't represent; "
      "set embed.dtype='float32'."
    )
  return cast
