"""Fuzz tests with thousands of hostile files.

  python -m tests.fuzz [--num_examples=2000] [--target=NAME]

Each example ends in one line for the user, or in the right answer; another exception,
a crash, or a gigabyte of memory ends the program with a failure. Prints how many were
refused and how many were read.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import pathlib
import resource
import struct
import sys
import tempfile
import time

import hypothesis
import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

from trainer.data import index_arrays, tfrecord
from trainer.data.images import ImageDecoder, VectorDecoder
from trainer.data.indexing import index_records
from trainer.data.records import RecordIndex, record_error
from trainer.data.samplers import PKSampler
from trainer.errors import UserError

_MAX_GROWTH_BYTES = 1 << 30
_NUM_RECORDS, _NUM_CLASSES = 12, 3
_HOSTILE_INTEGERS = (-(2**63), -1, 0, 1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1)
_DECODERS = (ImageDecoder(height=4, width=4, channels=1), VectorDecoder(size=2))

counts: collections.Counter = collections.Counter()


def _example(number):
  file = tf.io.encode_png(np.full((4, 4, 1), number, np.uint8)).numpy()
  features = {
    "label": tf.train.Feature(
      bytes_list=tf.train.BytesList(value=[b"class %d" % (number % _NUM_CLASSES)])
    ),
    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file])),
    "vector": tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 2.0])),
    "year": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
  }
  return tf.train.Example(features=tf.train.Features(feature=features))


_RECORDS = [_example(n).SerializeToString() for n in range(_NUM_RECORDS)]
_SHARD = b"".join(map(tfrecord.frame_record, _RECORDS))


@st.composite
def _damaged(draw, valid):
  """A valid file with bytes flipped, removed, overwritten or inserted."""
  content = bytearray(valid)
  for _ in range(draw(st.integers(1, 3))):
    place = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(("flip", "cut", "end", "over", "in", "count")))
    if how == "flip" and place < len(content):
      content[place] ^= 1 << draw(st.integers(0, 7))
    elif how == "cut":
      del content[place : place + draw(st.integers(1, 40))]
    elif how == "end":
      del content[place:]
    elif how == "over":
      some = draw(st.binary(max_size=12))
      content[place : place + len(some)] = some
    elif how == "in":
      content[place:place] = draw(st.binary(max_size=40))
    else:
      count = draw(st.sampled_from(_HOSTILE_INTEGERS)) % 2**64
      content[place : place + 8] = struct.pack("<Q", count)
  return bytes(content)


def _files(valid):
  return st.one_of(st.binary(max_size=300), _damaged(valid), st.just(valid))


def _walk(content):
  """Yields the records of a file with valid lengths."""
  records, position = [], 0
  while position < len(content):
    (length,) = struct.unpack_from("<Q", content, position)
    records.append(content[position + 12 : position + 12 + length])
    position += length + 16
  return records


def _shard(content):
  """Indexes a shard of arbitrary bytes in place."""
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "a.tfrecord").write_bytes(content)
    index = index_records(folder, label_feature="label")
    records = index.read(np.arange(index.num_records))
    assert records == _walk(content)
    names = [index.class_names[label] for label in index.labels]
    labels = [tfrecord.feature_values(record, "")["label"][0] for record in records]
    assert names == [label.decode() for label in labels]


def _record(content):
  """Reads a record of arbitrary bytes with valid checksums among valid records."""
  with tempfile.TemporaryDirectory() as folder:
    frames = [*map(tfrecord.frame_record, _RECORDS[:2]), tfrecord.frame_record(content)]
    pathlib.Path(folder, "a.tfrecord").write_bytes(b"".join(frames))
    index = index_records(folder, label_feature="label")
    assert index.read([2]) == [content]
    for decoder in _DECODERS:
      reason = record_error(index, decoder, 2)
      assert reason is None or "record 2 can't be decoded" in reason


def _values(content):
  """Parses arbitrary bytes as an example."""
  for name, values in tfrecord.feature_values(content, "a record").items():
    assert isinstance(name, str) and values


def _use(folder):
  """Calls all methods of an index; results must come from the shard."""
  index = RecordIndex.open(folder)
  names = list(index.class_names)
  assert len(names) == index.num_classes and all(isinstance(n, str) for n in names)
  for class_id in range(min(index.num_classes, 9)):
    assert set(index.read(index.members(class_id))) <= set(_RECORDS)
  assert set(index.read(np.arange(min(index.num_records, 99)))) <= set(_RECORDS)
  sampler = PKSampler(index, classes_per_batch=2, samples_per_class=2, seed=0)
  assert set(index.read(sampler.batch(0).ravel())) <= set(_RECORDS)


class _Index:
  """A valid index; one file at a time is replaced."""

  def __init__(self, folder):
    self.folder = folder
    pathlib.Path(folder, "a.tfrecord").write_bytes(_SHARD)
    index_records(folder, label_feature="label")
    found = pathlib.Path(folder, "index").iterdir()
    self.files = {path.name: path.read_bytes() for path in found}

  def use(self, changed):
    for name, content in {**self.files, **changed}.items():
      pathlib.Path(self.folder, "index", name).write_bytes(content)
    _use(self.folder)


def _json_values():
  odd = st.sampled_from(
    (
      None,
      True,
      -1,
      1.5,
      10**30,
      "",
      "..",
      "../a.tfrecord",
      "/etc/passwd",
      [],
      {},
      "\0",
    )
  )
  return st.one_of(odd, st.integers(), st.text(max_size=8))


@st.composite
def _manifests(draw, valid):
  """Manifests with one replaced value at any level, or deeply nested lists."""
  content = json.loads(valid)
  if draw(st.integers(0, 20)) == 0:
    return b'{"version": 1, "shards": ' + b"[" * 100_000
  place = draw(st.sampled_from((content, content["shards"][0])))
  place[draw(st.sampled_from(sorted(place)))] = draw(_json_values())
  return json.dumps(content).encode()


@st.composite
def _array_files(draw, files):
  """Index arrays with arbitrary values, or of another type or shape."""
  name = draw(st.sampled_from(index_arrays.IndexArrays._fields)) + ".npy"
  array = np.lib.format.read_array(io.BytesIO(files[name])).copy()
  if draw(st.booleans()):
    place = draw(st.integers(0, array.size - 1))
    value = draw(st.one_of(st.sampled_from(_HOSTILE_INTEGERS), st.integers(0, 30)))
    array[place] = np.array([value % 2**64], np.uint64).astype(array.dtype)[0]
  else:
    array = array.astype(draw(st.sampled_from((np.float32, np.int8, ">i8", object))))
    array = array[: draw(st.integers(0, array.size))]
  return {name: _saved(array)}


def _saved(array):
  file = io.BytesIO()
  np.save(file, array, allow_pickle=True)
  return file.getvalue()


@st.composite
def _damaged_arrays(draw, files):
  name = draw(st.sampled_from(index_arrays.IndexArrays._fields)) + ".npy"
  return {name: draw(_files(files[name]))}


def targets(index):
  """Returns the fuzz targets: a function and its inputs, by name."""
  manifest = index.files["manifest.json"]
  named = st.one_of(_files(manifest), _manifests(manifest))
  return {
    "shards": (_shard, _files(_SHARD)),
    "records in shards": (_record, _files(_RECORDS[3])),
    "examples": (_values, _files(_RECORDS[3])),
    "manifests": (lambda content: index.use({"manifest.json": content}), named),
    "arrays, damaged": (index.use, _damaged_arrays(index.files)),
    "arrays, of other values": (index.use, _array_files(index.files)),
  }


def run(name, function, strategy, num_examples):
  """Runs one target and counts its outcomes."""

  @hypothesis.settings(
    max_examples=num_examples,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(strategy)
  def one(content):
    try:
      function(content)
    except UserError as error:
      assert "\n" not in str(error)
      counts[name, "refused"] += 1
    else:
      counts[name, "read"] += 1

  one()


def _limit_memory():
  """Limits the growth of memory to one gigabyte."""
  status = pathlib.Path("/proc/self/status").read_text()
  held = int(status.split("VmData:")[1].split()[0]) * 1024
  limit = held + _MAX_GROWTH_BYTES
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main():
  """Runs all targets and prints their counts."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num_examples", type=int, default=2000)
  parser.add_argument("--target", help="one of those that are printed; all without")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    index = _Index(folder)
    _use(folder)
    _record(_RECORDS[3])  # One-time threads and memory of TensorFlow.
    _limit_memory()
    for name, (function, strategy) in targets(index).items():
      if arguments.target not in (None, name):
        continue
      start = time.monotonic()
      run(name, function, strategy, arguments.num_examples)
      refused, read = counts[name, "refused"], counts[name, "read"]
      print(
        f"{name}: {refused + read} examples, {refused} refused in one line, {read} "
        f"read, {time.monotonic() - start:.1f} s",
        flush=True,
      )
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(f"no other exception, no crash; {peak:,.0f} MB at the most")


if __name__ == "__main__":
  sys.exit(main())
