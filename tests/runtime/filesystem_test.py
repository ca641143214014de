"""Remote paths: equal data, ranged reads; in memory and by the S3 protocol."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data import indexing
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.data.sources.image_folders import ImageFolderSource
from trainer.data.sources.image_lists import ManifestSource
from trainer.data.sources.source import encode_png
from trainer.errors import UserError
from trainer.runtime import filesystem

_FOLDER_VARIABLE = "REMOTE_TEST_FOLDER"
_START_S = 60


def _image(number):
  return np.random.default_rng(number).integers(0, 256, (6, 6)).astype(np.uint8)


@pytest.fixture
def elsewhere(request):
  """A new remote folder."""
  name = re.sub("[^a-z0-9]+", "-", request.node.name)
  return os.environ.get(_FOLDER_VARIABLE, "ram://") + name


@contextlib.contextmanager
def _s3_server():
  """Returns the environment to connect to a local S3 server."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
  server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  try:
    _make_bucket(address)
    yield {
      "AWS_ACCESS_KEY_ID": "test",
      "AWS_SECRET_ACCESS_KEY": "test",
      "AWS_REGION": "us-east-1",
      "S3_ENDPOINT": address,
      "S3_USE_HTTPS": "0",
      "S3_VERIFY_SSL": "0",
    }
  finally:
    server.terminate()
    server.wait()


def _make_bucket(address):
  end_s = time.monotonic() + _START_S
  while True:
    request = urllib.request.Request(f"{address}/bucket", method="PUT")
    try:
      with urllib.request.urlopen(request, timeout=5):
        return
    except OSError:
      assert time.monotonic() < end_s, "the server takes no bucket"
      time.sleep(0.2)


# After S3 was used, tensorflow-io aborts when Python exits: see `leaving.leave`.
_ALL_BY_S3 = """
import os, sys, pytest
status = pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]])
sys.stdout.flush()
os._exit(status)
"""


@pytest.mark.skipif(
  not tf.__version__.startswith("2.15."),
  reason="tensorflow-io has no release for this TensorFlow",
)
@pytest.mark.skipif(_FOLDER_VARIABLE in os.environ, reason="this is it")
@pytest.mark.thorough
def test_all_tests_of_this_file_pass_with_s3():
  with _s3_server() as variables:
    done = subprocess.run(
      [sys.executable, "-c", _ALL_BY_S3, __file__],
      env={**os.environ, **variables, _FOLDER_VARIABLE: "s3://bucket/", "CI": ""},
      capture_output=True,
      text=True,
    )
  assert done.returncode == 0, done.stdout[-3000:]
  assert re.search(r"^10 passed, 1 skipped", done.stdout, re.MULTILINE), done.stdout


def _write_images(folder):
  for label in ("a", "b ü"):
    filesystem.make_folder(f"{folder}/{label}")
    for number in range(4):
      path = f"{folder}/{label}/{number}.png"
      filesystem.write_bytes(path, encode_png(_image(number + 4 * (label != "a"))))


def _ingested(folder):
  _write_images(f"{folder}/images")
  ingest(
    source=ImageFolderSource(folder=f"{folder}/images"),
    folder=f"{folder}/records",
    records_per_shard=3,
  )
  return RecordIndex.open(f"{folder}/records")


def test_files_are_read_as_they_were_written(elsewhere):
  path = f"{elsewhere}/deep/file"
  filesystem.make_folder(f"{elsewhere}/deep")
  filesystem.write_bytes(path, bytes(range(256)) * 40)
  assert filesystem.read_bytes(path) == bytes(range(256)) * 40
  assert filesystem.status(path).num_bytes == 256 * 40
  assert filesystem.read_range(path, 255, 4) == b"\xff\x00\x01\x02"
  assert filesystem.read_range(path, 256 * 40 - 2, 9) == b"\xfe\xff"
  digest = hashlib.sha256(bytes(range(256)) * 40).hexdigest()
  assert filesystem.sha256_of(path) == digest
  filesystem.move(path, path + "2")
  assert filesystem.list_folder(f"{elsewhere}/deep") == ["file2"]
  assert filesystem.matching(f"{elsewhere}/deep/f*") == [path + "2"]


def test_a_missing_file_is_an_os_error(elsewhere):
  with pytest.raises(OSError, match="No such file"):
    filesystem.read_bytes(f"{elsewhere}/gone")
  with pytest.raises(OSError, match="No such file"):
    filesystem.read_range(f"{elsewhere}/gone", 0, 9)
  assert not filesystem.exists(f"{elsewhere}/gone")


def test_images_are_ingested_and_read_remotely(elsewhere):
  index = _ingested(elsewhere)
  assert list(index.class_names) == ["a", "b ü"]
  decoder = ImageDecoder(height=6, width=6, channels=1)
  images = decoder(tf.constant(index.read(np.arange(8)[::-1]))).numpy()[..., 0] * 255
  np.testing.assert_allclose(images, [_image(n) for n in reversed(range(8))], atol=1e-3)


def test_remote_subfolders_of_class_folders_are_counted_or_read(elsewhere, caplog):
  folder = f"{elsewhere}/nested"
  for name in ("a/0.png", "b/1.png", "b/x/2.png", "b/x/notes.txt"):
    filesystem.make_folder(os.path.dirname(f"{folder}/{name}"))
    filesystem.write_bytes(f"{folder}/{name}", name.encode())
  assert ImageFolderSource(folder=folder).num_items() == 2
  assert "1 images in folders below the class folders (b/x/2.png)" in caplog.text
  items = ImageFolderSource(folder=folder, subfolders="classes").items()
  assert [item.label for item in items] == ["a", "b", "b/x"]


def test_batches_follow_the_sampler(elsewhere):
  index = _ingested(elsewhere)
  sampler = PKSampler(index, classes_per_batch=2, samples_per_class=2, seed=0)
  decoder = ImageDecoder(height=6, width=6, channels=1)
  dataset = Batches(index, sampler, decoder).dataset(Shard(0, 1, 1), num_steps=3)
  for step, batch in enumerate(dataset):
    expected = [_image(number) / 255 for number in sampler.batch(step).ravel()]
    np.testing.assert_allclose(batch.inputs[..., 0], expected, atol=1e-6)


def test_finished_ingest_is_not_repeated(elsewhere):
  before = _ingested(elsewhere).manifest
  assert _ingested(elsewhere).manifest == before


def test_remote_shards_are_indexed_in_place(elsewhere):
  _ingested(elsewhere)
  filesystem.remove_folder(f"{elsewhere}/records/index")
  index = indexing.index_records(f"{elsewhere}/records", label_feature="label")
  assert index.num_records == len(index.read(np.arange(8))) == 8


def test_truncated_remote_shard_is_named(elsewhere):
  index = _ingested(elsewhere)
  path = f"{elsewhere}/records/records-00001.tfrecord"
  filesystem.write_bytes(path, filesystem.read_bytes(path)[:-7])
  with pytest.raises(
    UserError, match=r"records-00001\.tfrecord: record 2 is truncated"
  ):
    index.read([5])
  with pytest.raises(UserError, match=r"records-00001\.tfrecord has \d+ bytes but had"):
    RecordIndex.open(f"{elsewhere}/records")


def test_remote_list_is_read_with_its_images(elsewhere):
  _write_images(f"{elsewhere}/images")
  text = "path,label\na/1.png,x\nb ü/0.png,y\n"
  filesystem.write_bytes(f"{elsewhere}/images/list.csv", text.encode())
  items = list(ManifestSource(path=f"{elsewhere}/images/list.csv").items())
  assert [item.label for item in items] == ["x", "y"]
  assert items[1].image == encode_png(_image(4))


def test_ranged_reads_request_only_the_record(elsewhere, monkeypatch):
  from tensorflow.python.lib.io import _pywrap_file_io

  index = _ingested(elsewhere)
  asked = []
  stream = _pywrap_file_io.BufferedInputStream

  def counted(path, num_bytes):
    asked.append(num_bytes)
    return stream(path, num_bytes)

  monkeypatch.setattr(_pywrap_file_io, "BufferedInputStream", counted)
  records = index.read([1, 5])
  assert sorted(asked) == sorted(len(record) + 16 for record in records)
