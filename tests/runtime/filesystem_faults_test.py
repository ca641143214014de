"""Transient failures of remote storage, and local copies of indexes."""

from __future__ import annotations

import errno
import os
import re

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import index_arrays, ingestion
from trainer.data.images import VectorDecoder
from trainer.data.records import RecordIndex, Replacements, UnreadableError
from trainer.data.sources.source import Item
from trainer.errors import UserError
from trainer.runtime import filesystem


@pytest.fixture
def elsewhere(request, tmp_path, monkeypatch):
  """A remote folder, with local copies in a folder of the test."""
  monkeypatch.setattr(filesystem, "_WAITS_S", (0.001, 0.001))
  monkeypatch.setattr(index_arrays.tempfile, "tempdir", str(tmp_path))
  return "ram://faults-" + re.sub("[^a-z0-9]+", "-", request.node.name)


def _write(folder, num_records=8):
  items = [
    Item(str(n), f"class {n % 2}", features={"vector": [float(n)]})
    for n in range(num_records)
  ]
  ingestion.write_records(items, folder, records_per_shard=5, fingerprint={})
  return RecordIndex.open(folder)


def _failing(monkeypatch, num_failures, error_class):
  """Makes the first ranged reads fail; returns the list of all reads."""
  from tensorflow.python.lib.io import _pywrap_file_io

  stream = _pywrap_file_io.BufferedInputStream
  tried = []

  def sometimes(path, num_bytes):
    tried.append(path)
    if len(tried) <= num_failures:
      raise error_class(None, None, "the store is busy")
    return stream(path, num_bytes)

  monkeypatch.setattr(_pywrap_file_io, "BufferedInputStream", sometimes)
  return tried


def test_transient_read_failure_is_retried(elsewhere, monkeypatch, caplog):
  index = _write(elsewhere)
  expected = index.read([3])
  tried = _failing(monkeypatch, 2, tf.errors.UnavailableError)
  assert index.read([3]) == expected
  assert len(tried) == 3
  assert "the store is busy; retrying in" in caplog.text


def test_persistent_read_failure_is_an_error_not_a_bad_record(elsewhere, monkeypatch):
  index = _write(elsewhere)
  replacements = Replacements(index, VectorDecoder(size=1))
  _failing(monkeypatch, 10_000, tf.errors.UnavailableError)
  with pytest.raises(
    UnreadableError, match=r"records-0000\d\.tfrecord: record \d can't be read: the st"
  ):
    replacements.replace(np.arange(4))
  assert replacements.num_bad == 0


def test_permanent_failures_are_not_retried(elsewhere, monkeypatch):
  index = _write(elsewhere)
  tried = _failing(monkeypatch, 1, tf.errors.PermissionDeniedError)
  with pytest.raises(UnreadableError, match="can't be read: Permission denied"):
    index.read([3])
  assert len(tried) == 1


def test_missing_shard_is_an_error_not_a_bad_record(tmp_path):
  index = _write(str(tmp_path))
  (tmp_path / "records-00000.tfrecord").unlink()
  replacements = Replacements(index, VectorDecoder(size=1))
  with pytest.raises(UnreadableError, match="record 0 can't be read: No such file"):
    replacements.replace(np.arange(2))


def test_index_is_copied_to_the_machine_once(elsewhere, monkeypatch):
  labels = np.array(_write(elsewhere).labels)
  monkeypatch.setattr(index_arrays, "_copy", None)
  again = RecordIndex.open(elsewhere)
  np.testing.assert_array_equal(again.labels, labels)
  assert isinstance(again.labels, np.memmap)


def test_new_index_replaces_the_old_copy(elsewhere, tmp_path):
  path = f"{elsewhere}/file"
  filesystem.make_folder(elsewhere)
  contents = [b"a" * 100, b"b" * 100, b"c" * 7]
  for content in contents:
    filesystem.write_bytes(path, content)
    copy = index_arrays.local_copy(path)
    with open(copy, "rb") as file:
      assert file.read() == content
  [folder] = tmp_path.iterdir()
  kept = [name for name in os.listdir(folder) if not name.endswith(".lock")]
  assert kept == [os.path.basename(copy)]
  assert folder.stat().st_mode & 0o077 == 0


def test_copy_folder_writable_by_others_is_refused(elsewhere, tmp_path):
  _write(elsewhere)
  [folder] = tmp_path.iterdir()
  folder.chmod(0o777)
  with pytest.raises(UserError, match="other users can write to it; set TMPDIR"):
    RecordIndex.open(elsewhere)


def test_only_transient_failures_are_io_errors():
  def kind(error):
    with pytest.raises(OSError) as caught, filesystem.as_os_errors("ram://x"):
      raise error(None, None, "why")
    return caught.value.errno

  assert kind(tf.errors.UnavailableError) == errno.EIO
  assert kind(tf.errors.DeadlineExceededError) == errno.EIO
  assert kind(tf.errors.InvalidArgumentError) == errno.EINVAL
  assert kind(tf.errors.UnimplementedError) == errno.ENOSYS
