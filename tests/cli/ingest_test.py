"""Ingest: written files, unchanged files and the state after failures."""

from __future__ import annotations

import gzip
import io
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.cli.ingest import ingest
from trainer.data import ingestion
from trainer.data.images import ImageDecoder
from trainer.data.records import RecordIndex
from trainer.data.sources.arrays import IdxSource
from trainer.data.sources.image_folders import ImageFolderSource
from trainer.data.sources.source import DigitsSource, Item, encode_png
from trainer.errors import UserError


def _write_idx(path, array):
  magic = struct.pack(">BBBB", 0, 0, 8, array.ndim)
  content = magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _idx_source(folder, **options):
  return IdxSource(folder=str(folder), pairs=[("images", "labels")], **options)


@pytest.fixture
def idx_folder(tmp_path):
  """Twelve random images of three classes."""
  images = np.random.default_rng(1).integers(0, 256, (12, 5, 4)).astype(np.uint8)
  _write_idx(tmp_path / "images", images)
  _write_idx(tmp_path / "labels.gz", np.arange(12, dtype=np.uint8) % 3)
  return tmp_path


@pytest.fixture
def image_folder(tmp_path):
  """Two classes, one with a space and letters beyond ASCII, of three images each."""
  rng = np.random.default_rng(2)
  for name in ("Käse Brot", "b"):
    (tmp_path / "images" / name).mkdir(parents=True)
    for number in range(3):
      image = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
      path = tmp_path / "images" / name / f"{number}.png"
      path.write_bytes(tf.io.encode_png(image).numpy())
  return tmp_path / "images"


def test_idx_files_become_records_with_their_labels(idx_folder):
  target = str(idx_folder / "records")
  ingest(source=_idx_source(idx_folder), folder=target, records_per_shard=5)
  index = RecordIndex.open(target)
  assert (index.num_records, index.num_classes) == (12, 3)
  assert list(index.class_names) == ["0", "1", "2"]
  np.testing.assert_array_equal(index.labels, np.arange(12) % 3)
  np.testing.assert_array_equal(index.members(1), [1, 4, 7, 10])
  decoder = ImageDecoder(height=5, width=4, channels=1)
  images = decoder(tf.constant(index.read(np.arange(12))))
  expected = np.random.default_rng(1).integers(0, 256, (12, 5, 4))
  np.testing.assert_allclose(images[..., 0] * 255, expected, atol=1e-3)


def test_shards_are_plain_tfrecords(idx_folder):
  target = idx_folder / "records"
  ingest(source=_idx_source(idx_folder), folder=str(target), records_per_shard=5)
  shards = sorted(str(path) for path in target.glob("*.tfrecord"))
  examples = [
    tf.train.Example.FromString(record.numpy())
    for record in tf.data.TFRecordDataset(shards)
  ]
  keys = [example.features.feature["key"].bytes_list.value[0] for example in examples]
  assert len(shards) == 3
  assert keys == [f"images/{number}".encode() for number in range(12)]


def test_class_folders_become_classes(image_folder):
  target = str(image_folder.parent / "records")
  ingest(source=ImageFolderSource(folder=str(image_folder)), folder=target)
  index = RecordIndex.open(target)
  assert list(index.class_names) == ["Käse Brot", "b"]
  assert index.num_records == 6


def test_digits_need_no_files(tmp_path):
  ingest(source=DigitsSource(), folder=str(tmp_path))
  index = RecordIndex.open(str(tmp_path))
  assert (index.num_records, index.num_classes) == (1797, 10)


def test_finished_ingest_is_not_repeated(idx_folder):
  target = idx_folder / "records"
  for _ in range(2):
    ingest(source=_idx_source(idx_folder), folder=str(target))
    changed = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
  assert changed == {path: path.stat().st_mtime_ns for path in target.rglob("*")}


def test_records_of_another_source_are_not_overwritten(idx_folder):
  target = str(idx_folder / "records")
  ingest(source=_idx_source(idx_folder), folder=target)
  with pytest.raises(UserError, match="records of another source"):
    ingest(source=DigitsSource(), folder=target)


def test_interrupted_ingest_is_not_complete(idx_folder):
  target = str(idx_folder / "records")
  items = list(_idx_source(idx_folder).items())
  broken = [*items[:7], items[7]._replace(image=b"")]
  with pytest.raises(
    UserError, match=r"images/7 can't be decoded as an image \(0 bytes\)"
  ):
    ingestion.write_records(broken, target, records_per_shard=4, fingerprint={})
  with pytest.raises(UserError, match="has no index; run --mode=ingest"):
    RecordIndex.open(target)
  ingest(source=_idx_source(idx_folder), folder=target)
  assert RecordIndex.open(target).num_records == 12


def test_a_summary_is_logged(image_folder, caplog):
  (image_folder / "b" / "2.png").unlink()
  caplog.set_level("INFO", logger="absl")
  target = str(image_folder.parent / "records")
  ingest(source=ImageFolderSource(folder=str(image_folder)), folder=target)
  assert "5 records of 2 classes, 2 (b) to 3 (Käse Brot) per class" in caplog.text


def test_source_with_different_bytes_is_a_different_source(idx_folder):
  target = str(idx_folder / "records")
  ingest(source=_idx_source(idx_folder), folder=target)
  _write_idx(idx_folder / "images", np.zeros((12, 5, 4), np.uint8))
  with pytest.raises(UserError, match="records of another source"):
    ingest(source=_idx_source(idx_folder), folder=target)


@pytest.mark.parametrize("name", ["records-00001.tfrecord", "index/labels.npy"])
def test_missing_files_of_a_finished_ingest_are_restored(idx_folder, name):
  target = idx_folder / "records"
  ingest(source=_idx_source(idx_folder), folder=str(target), records_per_shard=5)
  before = (target / name).read_bytes()
  (target / name).unlink()
  ingest(source=_idx_source(idx_folder), folder=str(target), records_per_shard=5)
  assert (target / name).read_bytes() == before


def test_a_shard_without_records_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"records_per_shard=0 must be at least 1"):
    ingest(source=DigitsSource(), folder=str(tmp_path), records_per_shard=0)


def test_one_class_is_refused_and_leaves_nothing(tmp_path):
  items = [Item(str(n), "only", encode_png(np.zeros((2, 2), np.uint8))) for n in (0, 1)]
  with pytest.raises(UserError, match=r"has 1 class \(only\); retrieval needs"):
    ingestion.write_records(items, str(tmp_path), records_per_shard=9, fingerprint={})
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match=r"file.* can't be written: Not a directory"):
    ingest(source=DigitsSource(), folder=str(tmp_path / "file"))
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("option", [{"unreadable": "leave_out"}, {"max_pixels": 99}])
def test_different_exclusion_rules_are_a_different_ingest(idx_folder, option):
  target = str(idx_folder / "records")
  ingest(source=_idx_source(idx_folder), folder=target)
  with pytest.raises(UserError, match="records of another source"):
    ingest(source=_idx_source(idx_folder), folder=target, **option)


# One red pixel, by hand: TensorFlow can write neither format.
def _bmp(image):
  height, width, _ = image.shape
  rows = image[::-1, :, ::-1].reshape(height, -1)
  rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
  head = struct.pack("<2sIII", b"BM", 54 + rows.size, 0, 54)
  return (
    head
    + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    + rows.tobytes()
  )


def _gif(image):
  file = io.BytesIO()
  Image.fromarray(image).quantize().save(file, "GIF")
  return file.getvalue()


_ENCODE = {
  "bmp": _bmp,
  "gif": _gif,
  "jpg": lambda image: tf.io.encode_jpeg(image).numpy(),
  "png": lambda image: tf.io.encode_png(image).numpy(),
}


@pytest.mark.parametrize("ending", _ENCODE)
def test_png_and_jpeg_are_kept_and_other_formats_become_png(image_folder, ending):
  content = _ENCODE[ending](np.full((6, 7, 3), 200, np.uint8))
  (image_folder / "b" / f"9.{ending}").write_bytes(content)
  target = str(image_folder.parent / "records")
  ingest(source=ImageFolderSource(folder=str(image_folder)), folder=target)
  (record,) = RecordIndex.open(target).read([6])
  example = tf.train.Example.FromString(record)
  kept = example.features.feature["image"].bytes_list.value[0]
  if ending in ("png", "jpg"):
    assert kept == content
  else:
    np.testing.assert_array_equal(tf.io.decode_png(kept, channels=3), 200)


@pytest.mark.parametrize("ending", _ENCODE)
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_truncated_image_is_named(image_folder, ending, share):
  rng = np.random.default_rng(5)
  content = _ENCODE[ending](rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))
  path = image_folder / "b" / f"9.{ending}"
  path.write_bytes(content[: int(share * len(content))])
  target = image_folder.parent / "records"
  with pytest.raises(
    UserError, match=rf"^b/9\.{ending} can't be decoded as an image .*bytes\): [^{{]+$"
  ):
    ingest(source=ImageFolderSource(folder=str(image_folder)), folder=str(target))
  assert list(target.iterdir()) == []


_INGEST_DIGITS = """
import resource, sys
import trainer
from trainer.data.sources.source import DigitsSource
from trainer.cli.ingest import ingest
from trainer.errors import UserError
limit = int(sys.argv[2])
if limit:
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
  ingest(source=DigitsSource(), folder=sys.argv[1])
except UserError as error:
  print(str(error).splitlines()[0])  # Gin appends a second line.
"""

_KILLED = """
import os, signal, sys
from trainer.data import ingestion
from trainer.data.sources.source import DigitsSource
def items():
  for number, item in enumerate(DigitsSource().items()):
    if number == 1000:  # Some items are read ahead of the writes.
      os.kill(os.getpid(), signal.SIGKILL)
    yield item
ingestion.write_records(items(), sys.argv[1], records_per_shard=8, fingerprint={})
"""


# The shards of the digits have 360 kB: the first size is too small for them, the second
# only for the index.
@pytest.fixture(params=[100, 368])
def small_disk(request, tmp_path):
  """A folder with too little space; without a mount, a file size limit."""
  mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "none", tmp_path]
  if subprocess.run(mount, capture_output=True).returncode != 0:
    yield tmp_path, "20000"
    return
  try:
    yield tmp_path, "0"
  finally:
    subprocess.run(["umount", tmp_path], check=True)


def test_a_killed_ingest_leaves_no_index_and_the_next_one_succeeds(idx_folder):
  target = idx_folder / "records"
  command = [sys.executable, "-c", _KILLED, str(target)]
  done = subprocess.run(command, stderr=subprocess.DEVNULL)
  assert done.returncode == -signal.SIGKILL
  assert list(target.rglob("*.tfrecord"))
  assert not list(target.glob("*.tfrecord"))
  with pytest.raises(UserError, match="has no index"):
    RecordIndex.open(str(target))
  ingest(source=_idx_source(idx_folder), folder=str(target))
  assert sorted(path.name for path in target.iterdir()) == [
    "index",
    "records-00000.tfrecord",
  ]


def test_full_disk_is_reported_in_one_line_and_leaves_no_files(small_disk):
  folder, limit = small_disk
  command = [sys.executable, "-c", _INGEST_DIGITS, str(folder / "records"), limit]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  message = "the disk is full; free some disk space and run the ingest again.\n"
  assert done.stdout == f"{folder / 'records'}: {message}"
  assert list((folder / "records").iterdir()) == []
