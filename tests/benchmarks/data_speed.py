"""Sampler, random reads and decoding, as ratios measured in one run.

  python -m tests.benchmarks.data_speed [--part=sampler|reads|jpeg|memory]

Each part prints its goal. Files are in the page cache, on both sides of a ratio.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

from trainer.data import indexing, ingestion
from trainer.data.images import ImageDecoder
from trainer.data.index_arrays import MemberTable
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item

_NUM_ROUNDS = 5


def _megabytes(field):
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split(f"{field}:")[1].split()[0]) / 1024


def _mapped_table(folder, num_classes, num_records):
  """Members of classes of unequal size, mapped as those of an index are."""
  sizes = np.full(num_classes, num_records // num_classes, np.int64)
  sizes[::2] += sizes[::2] // 2
  sizes[1::2] -= sizes[1::2] // 2
  starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
  np.save(folder / "starts.npy", starts)
  records = np.lib.format.open_memmap(
    folder / "records.npy", mode="w+", dtype=np.int64, shape=(int(starts[-1]),)
  )
  for first in range(0, len(records), 1 << 22):
    last = min(first + (1 << 22), len(records))
    records[first:last] = np.arange(first, last)
  records.flush()
  names = ("records", "starts")
  return MemberTable(*(np.load(folder / f"{n}.npy", mmap_mode="r") for n in names))


def _sampler():
  for num_classes, goal_ms in ((1_000_000, 0.3), (10_000_000, 0.6)):
    with tempfile.TemporaryDirectory() as name:
      table = _mapped_table(pathlib.Path(name), num_classes, 37_000_000)
      # Mapped files count as shared memory, what is held above them does not.
      before = _megabytes("RssAnon")
      sampler = PKSampler(table, classes_per_batch=512, samples_per_class=4, seed=0)
      times_ms, cpu_ms = [], []
      # Late steps, which are epochs of members further: more is to be computed.
      for first in range(100_000, 100_000 + 60 * 8, 8):
        start, cpu_start = time.perf_counter(), time.thread_time()
        sampler.batches(np.arange(first, first + 8))
        times_ms.append((time.perf_counter() - start) / 8 * 1e3)
        cpu_ms.append((time.thread_time() - cpu_start) / 8 * 1e3)
      held = _megabytes("RssAnon") - before
      print(
        f"sampler, {num_classes:,} classes, {len(table.records):,} records, 512 x 4: "
        f"{statistics.median(times_ms):.3f} ms a batch, "
        f"{statistics.median(cpu_ms):.3f} ms of the processor "
        f"(goal: at most {goal_ms}); "
        f"{held:.0f} MB held above the mapped index (goal: under 64)"
      )


def _write_shard(folder, records):
  with tf.io.TFRecordWriter(str(folder / "records.tfrecord")) as file:
    for record in records:
      file.write(record)


def _index(folder, label_feature="label"):
  parts = [indexing.scan_shard(str(folder), "records.tfrecord", label_feature)]
  (folder / "index").mkdir()
  indexing.write_index(str(folder / "index"), parts, label_feature=label_feature)
  return RecordIndex.open(str(folder))


def _blobs(num_records, num_bytes):
  rng = np.random.default_rng(0)
  for number in range(num_records):
    features = {
      "label": tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[b"%d" % (number % 2000)])
      ),
      "blob": tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[rng.bytes(num_bytes - 60)])
      ),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    yield example.SerializeToString()


def _ratio(title, goal, first, second, num_records):
  """Prints the speed of the first over that of the second, taken in turns."""
  for run in (first, second):
    run()
  pairs = [(_seconds(first), _seconds(second)) for _ in range(_NUM_ROUNDS)]
  speeds = [num_records / statistics.median(column) for column in zip(*pairs)]
  ratio = statistics.median(b / a for a, b in pairs)
  print(
    f"{title}: {speeds[0]:,.0f} records/s at random, {speeds[1]:,.0f} in order; "
    f"ratio {ratio:.3f} (median of pairs; goal: at least {goal})"
  )


def _seconds(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def _drain(dataset):
  for _ in dataset:
    pass


def _reads():
  num_records = 60_000
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _write_shard(folder, _blobs(num_records, 2048))
    index = _index(folder)
    sampler = PKSampler(index, classes_per_batch=128, samples_per_class=4, seed=0)
    numbers = sampler.batches(np.arange(num_records // 512)).reshape(-1, 512)

    def at_random():
      for some in numbers:
        index.read(some)

    path = str(folder / "records.tfrecord")
    in_order = tf.data.TFRecordDataset(path)
    taken = numbers.size
    _ratio(
      "reads of 2 kB, order one by one from Python",
      0.8,
      at_random,
      lambda: _drain(in_order.take(taken)),
      taken,
    )
    batched = in_order.take(taken).batch(512)
    _ratio(
      "reads of 2 kB, order in batches of 512 inside the graph",
      0.8,
      at_random,
      lambda: _drain(batched),
      taken,
    )
    at_random_in_graph = Batches(index, sampler, _Length()).dataset(
      Shard(0, 1, 1), num_steps=len(numbers)
    )
    in_order_in_graph = batched.map(_Length(), tf.data.AUTOTUNE).prefetch(2)
    _ratio(
      "reads of 2 kB, both in batches of 512 inside the graph",
      0.8,
      lambda: _drain(at_random_in_graph),
      lambda: _drain(in_order_in_graph),
      taken,
    )


def _photo(number):
  rng = np.random.default_rng(number)
  coarse = rng.integers(0, 256, (14, 14, 3)).astype(np.float32)
  image = tf.image.resize(coarse, [224, 224], "bicubic")
  pixels = tf.saturate_cast(image + rng.normal(0, 8, (224, 224, 3)), tf.uint8)
  return tf.io.encode_jpeg(pixels, quality=90).numpy()


def _jpeg():
  num_records, batch = 1024, 64
  decoder = ImageDecoder(height=224, width=224, channels=3)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    files = [_photo(number) for number in range(64)]
    items = [Item(str(n), str(n % 128), files[n % 64]) for n in range(num_records)]
    ingestion.write_records(items, name, records_per_shard=num_records, fingerprint={})
    index = RecordIndex.open(name)
    sampler = PKSampler(index, classes_per_batch=16, samples_per_class=4, seed=0)
    batches = Batches(index, sampler, decoder)
    num_steps = num_records // batch
    at_random = batches.dataset(Shard(0, 1, 1), num_steps=num_steps)
    in_order = (
      tf.data.TFRecordDataset(str(folder / "records-00000.tfrecord"))
      .batch(batch, drop_remainder=True)
      .map(decoder, tf.data.AUTOTUNE)
      .prefetch(2)
    )
    _ratio(
      "JPEG of 224 x 224, decoded",
      0.95,
      lambda: _drain(at_random),
      lambda: _drain(in_order),
      num_records,
    )


def _memory():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _write_shard(folder, _blobs(20_000, 512))
    index = _index(folder)
    sampler = PKSampler(index, classes_per_batch=32, samples_per_class=4, seed=0)
    batches = Batches(index, sampler, _Length())
    sizes = []
    dataset = batches.dataset(Shard(0, 1, 1), num_steps=12_000)
    for step, _ in enumerate(dataset):
      if step >= 2000 and step % 500 == 0:  # The first ones fill caches.
        sizes.append((step, _megabytes("RssAnon")))
    slope = np.polyfit(*zip(*sizes), 1)[0]
    print(
      f"memory: {sizes[0][1]:.1f} MB after 2,000 batches, {sizes[-1][1]:.1f} MB after "
      f"{sizes[-1][0]:,}; slope {slope * 1e3:+.3f} MB in 1,000 batches (goal: none)"
    )


class _Length:
  """Decodes a record to its length, so that reading is most of the work."""

  shape = ()

  def __call__(self, serialized):
    return tf.cast(tf.strings.length(serialized), tf.float32)


_PARTS = {"sampler": _sampler, "reads": _reads, "jpeg": _jpeg, "memory": _memory}


def main():
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--part", choices=_PARTS, action="append")
  print(
    f"{platform.machine()}, TensorFlow {tf.__version__}, Python {sys.version[:6]}",
    flush=True,
  )
  for part in parser.parse_args().part or _PARTS:
    _PARTS[part]()


if __name__ == "__main__":
  main()
