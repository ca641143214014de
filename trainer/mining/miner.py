"""Miner of rounds: embeds the training classes and searches for near items.

Shapes: N items, D dimensions, A anchors, p positives, n negatives, L classes of the
data, m neighbours of a class.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, Optional

import gin
import numpy as np
import tensorflow as tf

from trainer.data import permutation
from trainer.data.dataset import Dataset
from trainer.distribute.workers import current_workers
from trainer.errors import UserError, check_at_least, check_choice
from trainer.mining import corpus
from trainer.mining.corpus import CorpusItems, NearestItems, check_kind
from trainer.mining.mined_examples import ExampleMining, MinedExamples
from trainer.retrieval.embedder import Embedder
from trainer.retrieval.ground_truth import RecordItems
from trainer.retrieval.ranking import check_finite
from trainer.training.step import TrainStep

_CLASS_VECTORS = ("means", "centres")
_ITEMS = 1  # Purpose of a hash.
_NUM_NAMES = 100
_RECORDS_PER_MEAN = 32


class RoundContent(NamedTuple):
  """Content of a round.

  Attributes:
    arrays: by name: "anchors" [A], "positives" [A, p] and "negatives" [A, n] int32
      record numbers, −1 where there are fewer; "class_neighbours" [L, m] int32.
    metadata: plain values that describe items, method and results.
  """

  arrays: Mapping[str, np.ndarray]
  metadata: Mapping[str, Any]

  def summary(self) -> str:
    """Returns the counts as text."""
    counts = self.metadata["counts"].items()
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts)


@gin.register
@dataclasses.dataclass(frozen=True)
class Miner:
  """Options of a round: what is mined, among which records, and how.

  Attributes:
    examples: how anchors get positives and negatives; None for no examples.
    num_class_neighbours: m, the number of nearest classes kept per class; 0 for none.
    records_per_class: the largest number of records of a class in a round, drawn again
      for each round; None for all.
    index_kind: "exact"; a kind of FAISS index: "flat", "ivf_flat", "ivf_pq", "hnsw"; or
      "auto": exact or flat up to 50,000 items, then IVF-PQ.
    global_batch_size: records embedded at once, over all replicas.
    seed: random seed for drawing records and positives.
    class_vectors: what represents a class in the search for near classes: "means" of
      embeddings, or "centres" of the loss. With centres alone nothing is embedded.

  Raises:
    UserError: there is nothing to mine, a number is too small, or a choice is unknown.
  """

  examples: Optional[ExampleMining] = None
  num_class_neighbours: int = 0
  records_per_class: Optional[int] = None
  index_kind: str = "auto"
  global_batch_size: int = 256
  seed: int = 0
  class_vectors: str = "means"

  def __post_init__(self):
    check_kind(self.index_kind)
    check_choice("Miner.class_vectors", self.class_vectors, _CLASS_VECTORS)
    if self.examples is None and self.num_class_neighbours < 1:
      raise UserError(
        "Miner has nothing to mine: set Miner.examples = @ExampleMining(), or "
        "Miner.num_class_neighbours."
      )
    check_at_least("Miner.num_class_neighbours", self.num_class_neighbours, 0)
    check_at_least("Miner.records_per_class", self.records_per_class, 1)
    check_at_least("Miner.global_batch_size", self.global_batch_size, 1)

  def check(self, dataset: Dataset) -> None:
    """Checks, before mining, that copies among the records can be detected.

    Raises:
      UserError: the decoder does not declare its features.
    """
    if self.examples is not None:
      corpus.dedup_features(dataset.decoder)

  def embedder(self, encoder: tf.keras.Model, dataset: Dataset) -> Embedder:
    """Returns the embedder for all rounds; it is traced once."""
    return Embedder(
      encoder,
      dataset.index,
      dataset.decoder,
      global_batch_size=self.global_batch_size,
      replacements=dataset.replacements,
    )

  def make_mine_fn(
    self, step: TrainStep, dataset: Dataset
  ) -> Callable[[int], RoundContent]:
    """Returns a function that mines with the encoder of a training step.

    The encoder's weights are averaged if averaged weights are evaluated.

    Args:
      step: its encoder and weight averages are used.
      dataset: its training classes are mined.

    Returns:
      A function from the number of completed steps to a round.
    """
    embedder = self.embedder(step.encoder, dataset)
    tables = step.loss.tables
    if self.class_vectors == "centres" and not tables:
      raise UserError(
        "Miner.class_vectors='centres' needs a loss with class centres, and "
        f"{type(step.loss).__name__} has none; set 'means'."
      )

    def mine(num_steps: int) -> RoundContent:
      centres = tables[0].gather_centres() if self.uses_centres else None
      with step.weights_for_evaluation():
        return self.mine(embedder, dataset, num_steps, centres)

    return mine

  @property
  def uses_centres(self) -> bool:
    """Whether neighbours of classes are found by the centres of the loss."""
    return self.class_vectors == "centres" and self.num_class_neighbours > 0

  def mine(
    self,
    embedder: Embedder,
    dataset: Dataset,
    step: int,
    centres: Optional[np.ndarray] = None,
  ) -> RoundContent:
    """Mines with the current encoder; must be called on all workers.

    Memory: the embeddings of all items, 4·D bytes each, and the needs documented in the
    modules used.

    Args:
      embedder: of the encoder.
      dataset: its training classes are mined.
      step: number of steps the encoder was trained.
      centres: [C, k, D], of the loss, of the training classes in ascending order; None
        if they are not used.

    Raises:
      UserError: an embedding is not finite, or nothing is found.
    """
    of_centres = {}
    if centres is not None:
      of_centres["class_neighbours"] = self._class_neighbours(
        _directions(centres), np.sort(dataset.train_classes), dataset
      )
    if self.examples is None and centres is not None:
      counts = {"items": 0, "classes": len(centres)}
      metadata = {"num_dimensions": centres.shape[2], "counts": counts}
      return RoundContent(of_centres, metadata)
    key = int(permutation.mix(self.seed, _ITEMS, step)[0])
    items = corpus.draw_items(
      dataset.index.member_table, dataset.train_classes, self.records_per_class, key
    )
    embeddings = _embedded(embedder, items.record_numbers)
    check_finite(embeddings)
    found = self._mine_embedded(embeddings, items, dataset)
    return found._replace(arrays={**found.arrays, **of_centres})

  def _class_neighbours(
    self, vectors: np.ndarray, class_ids: np.ndarray, dataset: Dataset
  ) -> np.ndarray:
    return corpus.find_class_neighbours(
      vectors,
      class_ids,
      num_classes=dataset.index.num_classes,
      num_neighbours=self.num_class_neighbours,
      kind=self.index_kind,
    )

  def _mine_embedded(
    self, embeddings: np.ndarray, items: CorpusItems, dataset: Dataset
  ) -> RoundContent:
    """Mines among items [N] with embeddings [N, D]."""
    index = dataset.index
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, Any] = {
      "num_dimensions": embeddings.shape[1],
      "counts": {"items": len(items.labels), "classes": len(items.class_ids)},
    }
    if self.examples is not None:
      # An error on one worker ends all. Workers may search together, outside of this.
      nearest, contents = current_workers().run_on_all(
        lambda: (
          NearestItems(embeddings, self.index_kind),
          _contents(dataset, items.record_numbers.tobytes()),
        )
      )
      mined = self.examples.mine(embeddings, items, contents, nearest)
      arrays.update(_as_records(mined, items.record_numbers))
      suspected = items.record_numbers[mined.suspected_mislabelled[:_NUM_NAMES]]
      metadata.update(
        index_kind=nearest.kind,
        counts={**metadata["counts"], **mined.counts},
        distances=mined.distances,
        suspected_mislabelled=list(RecordItems(index, suspected).names()),
      )
    if self.num_class_neighbours and not self.uses_centres:
      arrays["class_neighbours"] = self._class_neighbours(
        corpus.class_centroids(embeddings, items), items.class_ids, dataset
      )
    return RoundContent(arrays, metadata)


def _directions(centres: np.ndarray) -> np.ndarray:
  """Returns the mean direction of each class's centres, [C, D] of [C, k, D]."""
  norms = np.linalg.norm(centres, axis=2, keepdims=True)
  means = (centres / np.where(norms > 0, norms, 1)).mean(1, dtype=np.float64)
  norms = np.linalg.norm(means, axis=1, keepdims=True)
  return means / np.where(norms > 0, norms, 1)


def _embedded(embedder: Embedder, record_numbers: np.ndarray) -> np.ndarray:
  """Returns the embeddings of records [N] in their order, [N, D] float32."""
  embeddings = np.empty((0, 0), np.float32)
  for number, rows in enumerate(embedder.embed(record_numbers)):
    if not number:
      embeddings = np.empty((len(record_numbers), rows.shape[1]), np.float32)
    start = number * len(rows)
    embeddings[start : start + len(rows)] = rows[: len(embeddings) - start]
  return embeddings


class ClassMeans(NamedTuple):
  """Mean embeddings of some classes.

  Attributes:
    class_ids: [n] int32, ascending.
    vectors: [n, D] float32 of norm 1.
  """

  class_ids: np.ndarray
  vectors: np.ndarray


def class_means(
  embedder: Embedder, dataset: Dataset, classes: np.ndarray
) -> ClassMeans:
  """Embeds up to 32 records of each of some classes, and returns their means.

  Args:
    embedder: of the encoder; called on all workers.
    dataset: of the records.
    classes: int32 ids.

  Returns:
    The means, without classes that have no record or a mean of 0.

  Raises:
    UserError: an embedding is not finite.
  """
  items = corpus.draw_items(
    dataset.index.member_table, classes, _RECORDS_PER_MEAN, key=0
  )
  embeddings = _embedded(embedder, items.record_numbers)
  check_finite(embeddings)
  means = corpus.class_centroids(embeddings, items)
  norms = np.linalg.norm(means, axis=1)
  has_direction = norms > 0
  vectors = means[has_direction] / norms[has_direction, None]
  return ClassMeans(items.class_ids[has_direction], vectors.astype(np.float32))


def corpus_fingerprint(dataset: Dataset) -> dict[str, str]:
  """Returns the fingerprint of records and training classes, by name."""
  classes = np.ascontiguousarray(dataset.train_classes, np.int32)
  return {
    **dataset.index.fingerprint(),
    "the hash of the training classes": hashlib.sha256(classes.data).hexdigest()[:16],
  }


def _as_records(
  mined: MinedExamples, record_numbers: np.ndarray
) -> dict[str, np.ndarray]:
  """Converts item numbers to record numbers."""
  numbers = np.append(record_numbers, -1).astype(np.int32)
  return {
    name: numbers[getattr(mined, name)]
    for name in ("anchors", "positives", "negatives")
  }


@functools.lru_cache(maxsize=1)
def _contents(dataset: Dataset, record_numbers: bytes) -> np.ndarray:
  """Returns content hashes, cached between rounds over the same records."""
  return corpus.content_hashes(
    dataset.index,
    np.frombuffer(record_numbers, np.int64),
    features=corpus.dedup_features(dataset.decoder),
    replacements=dataset.replacements,
  )
