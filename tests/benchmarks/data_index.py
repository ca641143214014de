"""Making and opening large indexes.

  python -m tests.benchmarks.data_index [--part=scan|large] [--num_records=20000000]

Indexing TFRecords against reading them with TFRecordDataset; then the index of many
records: time and memory to write it, the first batch of it, and what that makes for a
hundred million. The large index is synthetic: its entries point into a small file,
again and again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

from tests.benchmarks.data_speed import _blobs
from trainer.data import indexing
from trainer.data.indexing import ShardIndex, index_records

_NUM_ROUNDS = 5
_NUM_REAL = 20_000
_RECORDS_A_CLASS = 20

_FIRST_BATCH = """
import sys, time
process_s = time.time()
import trainer, tensorflow as tf
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler

class Length:
  shape = ()
  def __call__(self, serialized):
    return tf.cast(tf.strings.length(serialized), tf.float32)

start_s = time.time()
index = RecordIndex.open(sys.argv[1])
sampler = PKSampler(index, classes_per_batch=128, samples_per_class=4, seed=0)
batches = Batches(index, sampler, Length()).dataset(Shard(0, 1, 1))
next(iter(batches))
print(time.time() - start_s, start_s - process_s)
"""


def _scan():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    num_shards, num_each = 4, 25_000
    for shard in range(num_shards):
      with tf.io.TFRecordWriter(str(folder / f"{shard}.tfrecord")) as file:
        for record in _blobs(num_each, 2048):
          file.write(record)
    files = sorted(map(str, folder.glob("*.tfrecord")))

    def index():
      shutil.rmtree(folder / "index", ignore_errors=True)
      index_records(name, label_feature="label")

    def read():
      for _ in tf.data.TFRecordDataset(files):
        pass

    def read_batched():
      for _ in tf.data.TFRecordDataset(files).batch(512):
        pass

    titles = ("one by one from Python", "in batches of 512 inside the graph")
    for title, run in zip(titles, (read, read_batched)):
      index(), run()
      pairs = [(_seconds(index), _seconds(run)) for _ in range(_NUM_ROUNDS)]
      speeds = [num_shards * num_each / statistics.median(each) for each in zip(*pairs)]
      ratio = statistics.median(b / a for a, b in pairs)
      print(
        f"indexing {speeds[0]:,.0f} records/s of 2 kB; TFRecordDataset {title} "
        f"{speeds[1]:,.0f}; ratio {ratio:.3f} (median of pairs; goal: at least 0.8)",
        flush=True,
      )


def _seconds(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def _large_part(folder, num_records):
  """The index of a shard of many records, which are those of a small one repeated."""
  small = indexing.scan_shard(folder, "records.tfrecord", "label")
  numbers = np.arange(num_records) % _NUM_REAL
  num_classes = num_records // _RECORDS_A_CLASS
  return ShardIndex(
    shard=dataclasses.replace(small.shard, num_records=num_records),
    offsets=small.offsets[numbers],
    lengths=small.lengths[numbers],
    labels=np.random.default_rng(0).permutation(num_records).astype(np.int32)
    % num_classes,
    label_names=[f"class {number}" for number in range(num_classes)],
  )


def _large(num_records):
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    with tf.io.TFRecordWriter(str(folder / "records.tfrecord")) as file:
      for record in _blobs(_NUM_REAL, 512):
        file.write(record)
    part = _large_part(name, num_records)
    (folder / "index").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    indexing.write_index(str(folder / "index"), [part], label_feature="label")
    seconds = time.perf_counter() - start
    above = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    num_bytes = sum(path.stat().st_size for path in (folder / "index").iterdir())
    del part
    factor = 1e8 / num_records
    print(
      f"index of {num_records:,} records and {num_records // _RECORDS_A_CLASS:,} "
      f"classes: written in {seconds:.1f} s, {num_bytes / 2**20:,.0f} MB on disk, peak "
      f"{above:,.0f} MB above its parts"
    )
    print(
      f"  in proportion, 100,000,000: {seconds * factor:.0f} s, "
      f"{num_bytes * factor / 2**20:,.0f} MB on disk, {above * factor:,.0f} MB above "
      "its parts",
      flush=True,
    )
    _first_batch(name)


def _first_batch(folder):
  command = [sys.executable, "-c", _FIRST_BATCH, folder]
  environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
  for _ in range(3):
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, check=True
    )
    pipeline_s, import_s = map(float, done.stdout.split())
    print(
      f"first batch of 128 x 4: {pipeline_s:.2f} s after the index is opened (goal: "
      f"under 2), and {import_s:.2f} s before that to import TensorFlow"
    )


def main():
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--part", choices=("scan", "large"), action="append")
  parser.add_argument("--num_records", type=int, default=20_000_000)
  arguments = parser.parse_args()
  print(
    f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}",
    flush=True,
  )
  parts = arguments.part or ("scan", "large")
  if "scan" in parts:
    _scan()
  if "large" in parts:
    _large(arguments.num_records)


if __name__ == "__main__":
  main()
