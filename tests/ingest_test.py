"""Ingest: what it writes, and what it says of damaged and missing sources."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import writer
from trainer.data.decode import ImageDecoder
from trainer.data.records import RecordIndex
from trainer.data.sources import DigitsSource, IdxSource, ImageFolderSource
from trainer.errors import UserError
from trainer.ingest import ingest


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


def test_labels_get_their_names(idx_folder):
  names = ("shirt", "bag", "shoe")
  target = str(idx_folder / "records")
  ingest(source=_idx_source(idx_folder, class_names=names), folder=target)
  index = RecordIndex.open(target)
  assert [index.class_names[label] for label in index.labels[:3]] == list(names)


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


def test_a_finished_ingest_is_left_as_it_is(idx_folder):
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


def test_an_interrupted_ingest_is_not_taken_for_whole(idx_folder):
  target = str(idx_folder / "records")
  items = list(_idx_source(idx_folder).items())
  broken = [*items[:7], items[7]._replace(image=b"")]
  with pytest.raises(UserError, match=r"images/7 is no image .* \(0 bytes\)"):
    writer.write_records(broken, target, records_per_shard=4, fingerprint={})
  with pytest.raises(UserError, match="has no index; run --mode=ingest"):
    RecordIndex.open(target)
  ingest(source=_idx_source(idx_folder), folder=target)
  assert RecordIndex.open(target).num_records == 12


def test_a_truncated_idx_file_is_named_with_its_last_whole_record(idx_folder):
  path = idx_folder / "images"
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(UserError, match=r"images is damaged.*12 records.*10 whole"):
    list(_idx_source(idx_folder).items())


def test_a_truncated_gzip_is_named(idx_folder):
  path = idx_folder / "labels.gz"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"labels\.gz can't be read"):
    list(_idx_source(idx_folder).items())


def test_a_file_that_is_no_idx_file_is_named(idx_folder):
  (idx_folder / "images").write_bytes(b"\x89PNG not idx at all")
  with pytest.raises(UserError, match="is no idx file"):
    list(_idx_source(idx_folder).items())


def test_a_missing_idx_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"images is not there"):
    list(_idx_source(tmp_path).items())


def test_images_and_labels_of_different_length_are_refused(idx_folder):
  _write_idx(idx_folder / "labels", np.zeros(11, np.uint8))
  with pytest.raises(UserError, match="12 images and labels 11"):
    list(_idx_source(idx_folder).items())


def test_a_label_without_a_name_is_refused(idx_folder):
  with pytest.raises(UserError, match="record 2 has label 2"):
    list(_idx_source(idx_folder, class_names=("a", "b")).items())


def test_a_corrupt_image_is_named(image_folder):
  path = image_folder / "b" / "1.png"
  path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(UserError, match=r"b/1\.png is no image"):
    ingest(
      source=ImageFolderSource(folder=str(image_folder)),
      folder=str(image_folder.parent / "records"),
    )


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no images"):
    list(ImageFolderSource(folder=str(tmp_path)).items())


def test_a_folder_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file can't be read: Not a directory"):
    list(ImageFolderSource(folder=str(tmp_path / "file")).items())


def test_one_class_is_refused(image_folder):
  for path in (image_folder / "b").iterdir():
    path.unlink()
  with pytest.raises(UserError, match="has 1 class"):
    ingest(
      source=ImageFolderSource(folder=str(image_folder)),
      folder=str(image_folder.parent / "records"),
    )


def test_a_flipped_byte_is_named_with_file_and_record(idx_folder):
  target = idx_folder / "records"
  ingest(source=_idx_source(idx_folder), folder=str(target), records_per_shard=5)
  path = target / "records-00001.tfrecord"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1  # In the third of five records.
  path.write_bytes(content)
  index = RecordIndex.open(str(target))
  with pytest.raises(UserError, match=r"records-00001\.tfrecord: record 2 has corrupt"):
    index.read(np.arange(12))


def test_a_truncated_shard_is_named_when_the_index_is_opened(idx_folder):
  target = idx_folder / "records"
  ingest(source=_idx_source(idx_folder), folder=str(target))
  path = target / "records-00000.tfrecord"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match=r"records-00000\.tfrecord has \d+ bytes but had"):
    RecordIndex.open(str(target))


def test_an_index_cut_short_is_named(idx_folder):
  target = idx_folder / "records"
  ingest(source=_idx_source(idx_folder), folder=str(target))
  path = target / "index" / "labels.npy"
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(UserError, match=r"labels\.npy of the index is damaged"):
    RecordIndex.open(str(target))


_FULL_DISK = """
import sys
import trainer
from trainer.data.sources import DigitsSource
from trainer.ingest import ingest
from trainer.errors import UserError
try:
  ingest(source=DigitsSource(), folder=sys.argv[1])
except UserError as error:
  print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(tmp_path):
  if os.geteuid() != 0:
    pytest.skip("needs root to mount a small disk; not a matter of GPU or TPU")
  disk = tmp_path / "disk"
  disk.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], check=True)
  try:
    command = [sys.executable, "-c", _FULL_DISK, str(disk / "records")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the disk is full" in done.stdout
    assert not (disk / "records" / "index" / "manifest.json").exists()
  finally:
    subprocess.run(["umount", disk], check=True)
