"""Mode `search`: searches for images, vectors and keys; prints a table or JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Optional

import gin
import numpy as np
import tensorflow as tf

from trainer.cli.evaluate import Evaluation
from trainer.data import example_encoder
from trainer.data.records import RecordIndex
from trainer.errors import UserError, check_at_least
from trainer.retrieval import embedding_store, pictures
from trainer.retrieval.embedding_store import EmbeddingFolder
from trainer.retrieval.faiss_index import StoredIndex
from trainer.retrieval.knn import nearest
from trainer.retrieval.pictures import pictures_of
from trainer.retrieval.query import EmbedFn, NearestFn, QueryResult, search
from trainer.run import Run


def main(run: Run) -> None:
  """Searches for the queries of the command line."""
  options = SearchOptions()
  folder = options.embeddings or os.path.join(run.model_dir, "embeddings")
  stored = EmbeddingFolder(folder)
  trained = Evaluation()  # type: ignore[call-arg]  # Its parts are gin's.
  results = search(
    run.search_request.queries,
    stored,
    embed_fn=_embed_fn(run, trained, stored),
    nearest_fn=options.nearest_fn(stored),
    num_neighbours=options.num_neighbours,
  )
  print(_json(results) if run.search_request.is_json else _table(results))
  if run.search_request.picture is not None:
    _draw(results, stored, trained, run.search_request.picture)
  failed = [result for result in results if result.error is not None]
  if failed:
    raise UserError(
      f"{len(failed)} of {len(results)} queries failed. {failed[0].error}"
    )


@gin.configurable("search")
@dataclasses.dataclass(frozen=True)
class SearchOptions:
  """Options of the search.

  Attributes:
    num_neighbours: k.
    embeddings: folder written by `--mode=embed`; None for that of the run.
    index: folder written by `--mode=index`; None for exact search.

  Raises:
    UserError: k is below 1.
  """

  num_neighbours: int = 10
  embeddings: Optional[str] = None
  index: Optional[str] = None

  def __post_init__(self):
    check_at_least("search.num_neighbours", self.num_neighbours, 1)

  def nearest_fn(self, stored: EmbeddingFolder) -> NearestFn:
    """Returns the function that searches the embeddings.

    Raises:
      UserError: the index is of other embeddings.
    """
    if self.index is None:
      gallery = stored.embeddings
      return lambda queries, k: nearest(queries, gallery, num_neighbours=k)
    index = StoredIndex(self.index)
    if index.manifest.get("embeddings_sha256") != stored.sha256:
      raise UserError(
        f"{self.index} indexes other embeddings than those in the folder; run "
        "--mode=index again."
      )
    return lambda queries, k: index.nearest(
      queries, stored.embeddings, num_neighbours=k
    )


def _embed_fn(run: Run, trained: Evaluation, stored: EmbeddingFolder) -> EmbedFn:
  """Returns a function that embeds an image file; it restores the encoder once."""
  decode_files = getattr(trained.dataset.decoder, "decode_files", None)

  @functools.cache
  def restore():
    step = trained.restore(run.model_dir)
    now = embedding_store.encoder_provenance(trained.encoder, run.config.values, step)
    embedding_store.check_same_encoder(stored.source, now)

  def embed(content: bytes) -> np.ndarray:
    if decode_files is None:
      raise UserError("The encoder's inputs are not images; query by vectors or keys.")
    restore()
    inputs = _decoded(content, decode_files)
    return trained.encoder(inputs, training=False).numpy()[0]

  return embed


def _decoded(content: bytes, decode_files) -> tf.Tensor:
  """Decodes an image file of any ingestible format to [1, H, W, C] float32."""
  try:
    return decode_files(tf.constant([example_encoder.convert_for_training(content)]))
  except tf.errors.InvalidArgumentError as error:
    raise UserError("It can't be decoded as an image.") from error
  except UserError as error:
    raise UserError(f"It can't be decoded as an image: {error}") from error


def _table(results: Sequence[QueryResult]) -> str:
  lines = []
  for result in results:
    lines.append(
      result.query if result.error is None else f"{result.query}: {result.error}"
    )
    lines += [
      f"{rank:>4}{hit.distance:12.4g}  {hit.class_name:<24}{hit.key}"
      for rank, hit in enumerate(result.hits, 1)
    ]
  return "\n".join(lines)


def _json(results: Sequence[QueryResult]) -> str:
  return json.dumps(
    [
      {**result._asdict(), "hits": [h._asdict() for h in result.hits]}
      for result in results
    ],
    indent=2,
  )


def _draw(
  results: Sequence[QueryResult],
  stored: EmbeddingFolder,
  trained: Evaluation,
  path: str,
) -> None:
  """Writes a PNG with one row per query: the query first, then its neighbours.

  Raises:
    UserError: the embeddings are class centres, or the encoder's inputs are no images.
  """
  if stored.source.get("content") == "class_centres":
    raise UserError("Class centres have no pictures; remove --picture.")
  index = RecordIndex.open(str(stored.source.get("records")))
  embedding_store.check_same_records(stored.source, index)
  decoder = trained.dataset.decoder
  pictures_fn = pictures_of(index, decoder, np.arange(index.num_records))
  if pictures_fn is None:
    raise UserError(
      "The encoder's inputs are not images, so no picture can be drawn; remove "
      "--picture."
    )
  rows = []
  for result in results:
    if result.hits:
      found = [tf.io.decode_png(p) for p in pictures_fn(np.array(result.items()))]
      rows.append([_picture_of(result, stored, pictures_fn, decoder), *found])
  if rows:
    tf.io.write_file(path, pictures.grid_png(rows))
    print(path)


def _picture_of(result: QueryResult, stored: EmbeddingFolder, pictures_fn, decoder):
  """Returns the picture of a query, [H, W, C] uint8; None for a vector."""
  row = stored.position(result.query)
  if row is not None:
    return tf.io.decode_png(pictures_fn(np.array([row]))[0])
  if not os.path.exists(result.query):
    return None
  content = tf.io.read_file(result.query).numpy()
  [inputs] = _decoded(content, decoder.decode_files)
  return tf.cast(tf.round(inputs * 255.0), tf.uint8)
