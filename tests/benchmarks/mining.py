"""A mining round against FAISS's own search: python -m tests.benchmarks.mining.

20,000 × 128 and 50,000 classes, and with --full 200,000 × 128 and a million classes:
time as a ratio in one run, memory above the embeddings, and how much is found of what
there is; then what a batch of hard classes takes. --examples and --classes for one part
alone.
"""

from __future__ import annotations

import functools
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tests.benchmarks import measure
from trainer.data.index_arrays import MemberTable, members_from_labels
from trainer.data.samplers import PKSampler
from trainer.mining import corpus
from trainer.mining.corpus import NearestItems, empty_neighbours
from trainer.mining.mined_examples import ExampleMining, RankWindow
from trainer.mining.mined_samplers import neighbouring_class_sampler
from trainer.retrieval import faiss_index

_NUM_DIMENSIONS, _PER_CLASS, _DEPTH = 128, 20, 50
_NUM_CLASS_NEIGHBOURS = 32
# Of what is compared with an exact search.
_NUM_ASKING = 2_000
_GOAL = 1.3


def main() -> None:
  """Prints the costs."""
  import faiss

  is_full = "--full" in sys.argv
  print(f"TensorFlow {tf.__version__}, FAISS {faiss.__version__}")
  if "--classes" not in sys.argv:
    _examples(200_000 if is_full else 20_000)
  if "--examples" not in sys.argv:
    _classes(1_000_000 if is_full else 50_000)


def _examples(num_items: int) -> None:
  """A round of examples, and what FAISS alone takes to build and search an index."""
  embeddings, a_round = _corpus(num_items)
  num_neighbours = _DEPTH + _PER_CLASS
  found, cpu = {}, {}

  def counted(name, run):
    """Also counts all cores' time, which other processes change little."""

    def run_and_count():
      start = time.process_time()
      found[name] = run()
      cpu[name] = min(cpu.get(name, np.inf), time.process_time() - start)

    return run_and_count

  def search_by(kind):
    index = faiss_index.build_index(embeddings, kind)
    return index.search(embeddings, num_neighbours + 1)[1]

  kind, _ = a_round()
  kinds = dict.fromkeys((kind, "flat" if num_items <= 20_000 else "ivf_flat"))
  runs = {"a round": a_round}
  runs |= {f"FAISS, {kind}": functools.partial(search_by, kind) for kind in kinds}
  costs = measure.compare({n: counted(n, run) for n, run in runs.items()}, num_rounds=1)
  for name in list(runs)[1:]:
    measure.show(
      f"{num_items:,} x {_NUM_DIMENSIONS}, k = {num_neighbours} (goal: {_GOAL} x)",
      {each: costs[each] for each in ("a round", name)},
      name,
    )
    ratio = cpu["a round"] / cpu[name]
    print(f"  all cores' time: {ratio:.2f} x FAISS's {cpu[name]:.1f} s")
  _, mined = found.pop("a round")
  print(f"  {mined.counts}")
  _recalls(embeddings, found, num_neighbours)


def _corpus(num_items: int) -> tuple[np.ndarray, Callable[[], tuple[str, Any]]]:
  """Embeddings in classes, and a round of them: kind of search, and what it found."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(num_items // _PER_CLASS), _PER_CLASS).astype(np.int32)
  centres = rng.standard_normal((num_items // _PER_CLASS, _NUM_DIMENSIONS), np.float32)
  noise = rng.standard_normal((num_items, _NUM_DIMENSIONS), np.float32)
  embeddings = centres[labels] + noise
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  table = members_from_labels(labels, len(centres))
  classes = np.arange(len(centres), dtype=np.int32)
  contents = np.arange(num_items, dtype=np.uint64)
  mining = ExampleMining(window=RankWindow(first=5, last=_DEPTH))

  def a_round():
    items = corpus.draw_items(table, classes, None, 0)
    nearest = NearestItems(embeddings, "auto")
    return nearest.kind, mining.mine(embeddings, items, contents, nearest)

  return embeddings, a_round


def _recalls(
  embeddings: np.ndarray, found: dict[str, np.ndarray], num_neighbours: int
) -> None:
  """How much of what is nearest was found, of a sample."""
  asking = np.random.default_rng(2).permutation(len(embeddings))[:_NUM_ASKING]
  room = empty_neighbours(len(asking), num_neighbours)
  nearest = NearestItems(embeddings, "flat")
  exact = nearest.search(asking, num_neighbours, room).indices.copy()
  room = NearestItems(embeddings, "auto").search(asking, num_neighbours, room)
  shares = {"a round": _share(room.indices, exact)}
  for name, indices in found.items():
    shares[name] = _share(indices[asking], exact)
  for name, share in shares.items():
    print(f"  {name:24}{share:8.4f} of the {num_neighbours} nearest")


def _share(found: np.ndarray, exact: np.ndarray) -> float:
  hits = [len(np.intersect1d(*rows)) for rows in zip(found, exact)]
  return float(np.mean(hits)) / exact.shape[1]


def _classes(num_classes: int) -> None:
  """Neighbours of classes, and batches of them."""
  rng = np.random.default_rng(1)
  # Near each other in tens, as classes of one kind are.
  kinds = rng.standard_normal((num_classes // 10, _NUM_DIMENSIONS), np.float32)
  means = np.repeat(kinds, 10, axis=0)
  means += 0.7 * rng.standard_normal(means.shape, np.float32)
  ids = np.arange(num_classes, dtype=np.int32)
  found = {}

  def find():
    found["neighbours"] = corpus.find_class_neighbours(
      means,
      ids,
      num_classes=num_classes,
      num_neighbours=_NUM_CLASS_NEIGHBOURS,
      kind="auto",
    )

  before = measure.base_megabytes()
  start, start_cpu = time.perf_counter(), time.process_time()
  find()
  seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  megabytes = measure.peak_megabytes() - before
  neighbours = found["neighbours"]
  share = np.mean(neighbours[:, :9] // 10 == ids[:, None] // 10)
  print(
    f"\n{num_classes:,} classes x {_NUM_DIMENSIONS}, {_NUM_CLASS_NEIGHBOURS} nearest"
  )
  print(f"  {seconds:.1f} s, {cpu:.1f} s of all cores together")
  print(f"  {megabytes:.0f} MB above the means' {means.nbytes / 1e6:.0f}")
  print(f"  of the 9 nearest {share:.4f} are of the same ten")
  asking = rng.permutation(num_classes)[:_NUM_ASKING]
  exact = NearestItems(means, "flat").search(
    asking, _NUM_CLASS_NEIGHBOURS, empty_neighbours(len(asking), _NUM_CLASS_NEIGHBOURS)
  )
  share = _share(neighbours[asking], exact.indices)
  print(f"  {share:.4f} of the {_NUM_CLASS_NEIGHBOURS} nearest are found")
  _batches(num_classes, neighbours)


def _batches(num_classes: int, neighbours: np.ndarray) -> None:
  """Batches of 512 × 4, half of the classes hard, against plain ones."""
  records = np.arange(num_classes * _PER_CLASS)
  starts = np.arange(num_classes + 1, dtype=np.int64) * _PER_CLASS
  mining_round = types.SimpleNamespace(step=1, arrays={"class_neighbours": neighbours})

  def sampler_fn(index, **options):
    return PKSampler(
      index, classes_per_batch=512, samples_per_class=4, seed=0, **options
    )

  table = MemberTable(records, starts)
  hard = neighbouring_class_sampler(
    table,
    mining_round,
    sampler_fn=sampler_fn,
    hard_fraction=0.5,
    neighbours_per_seed=3,
  )
  plain, steps = sampler_fn(table), np.arange(64)
  costs = measure.compare(
    {
      "hard classes": lambda: hard.batches(steps),
      "plain": lambda: plain.batches(steps),
    },
    num_rounds=5,
  )
  measure.show("64 batches of 512 x 4, drawn at once", costs, "plain")


if __name__ == "__main__":
  main()
