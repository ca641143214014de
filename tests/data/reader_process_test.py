"""Damaged files crash the child process that reads them, never the run."""

from __future__ import annotations

import os
import signal
import sys

import h5py
import lmdb
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from trainer.data.sources import reader_process
from trainer.data.sources.arrays import Hdf5Source
from trainer.data.sources.source import encode_png
from trainer.data.sources.tables import LmdbSource, ParquetSource
from trainer.errors import UserError
from trainer.runtime import filesystem

_NUM_ITEMS = 60


def abort_after_one(path, name):
  """Reads one message and aborts, like an uncaught C++ exception."""
  yield {"first": name}, [b"\0" * 100_000]
  os.kill(os.getpid(), signal.SIGABRT)


def run_out_of_memory(path, name):
  """Dies like a process killed by the OOM killer of Linux."""
  os.kill(os.getpid(), signal.SIGKILL)
  yield {}, []


def take_too_much(path, name):
  """Allocates more memory than the limit of a reader, without touching it."""
  bytearray(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 6 // 10)
  yield {}, []


def loop_forever(path, name):
  """Loops forever, as C libraries do on some damaged files."""
  yield {}, []
  while True:
    pass


def fail(path, name):
  """Raises an error that no file causes."""
  print("this must not get between the messages")
  yield {"pid": os.getpid()}, []
  raise ZeroDivisionError("a fault of the program")


def many(path, name):
  """Yields more messages than a pipe can buffer."""
  while True:
    yield {"pid": os.getpid()}, [b"\0" * 100_000]


@pytest.fixture
def file(tmp_path):
  (tmp_path / "a file").write_bytes(b"")
  return str(tmp_path / "a file")


def test_aborted_reader_is_reported_in_one_line_after_its_messages(file):
  messages = reader_process.read(abort_after_one, file)
  assert next(messages) == ({"first": file}, [b"\0" * 100_000])
  with pytest.raises(UserError, match=r"a file can't be read: .*ended with SIGABRT"):
    next(messages)


def test_killed_reader_is_not_reported_as_damage(file):
  with pytest.raises(UserError, match="its reader was killed, perhaps for lack of mem"):
    list(reader_process.read(run_out_of_memory, file))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_file_that_needs_too_much_memory_is_named(file):
  with pytest.raises(UserError, match="a file can't be read: it takes more than half"):
    list(reader_process.read(take_too_much, file))


def test_endless_reader_is_terminated(file, monkeypatch):
  monkeypatch.setattr(reader_process, "_TIMEOUT_S", 2.0)
  messages = reader_process.read(loop_forever, file)
  assert next(messages) == ({}, [])
  with pytest.raises(UserError, match=r"a file can't .* no progress for 2 s"):
    next(messages)


def test_internal_error_is_not_attributed_to_the_file(file):
  messages = reader_process.read(fail, file)
  next(messages)
  with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of the program"):
    next(messages)


def test_reader_exits_if_its_messages_are_not_consumed(file):
  messages = reader_process.read(many, file)
  header, _ = next(messages)
  messages.close()
  with pytest.raises(ProcessLookupError):
    os.kill(header["pid"], 0)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match="gone can't be read: No such file"):
    list(reader_process.read(many, str(tmp_path / "gone")))


def _image(number):
  return encode_png(np.full((9, 9), number, np.uint8))


def _parquet(folder):
  table = {
    "label": [f"c{n % 3}" for n in range(_NUM_ITEMS)],
    "image": [_image(n) for n in range(_NUM_ITEMS)],
  }
  path = folder / "a.parquet"
  written = pa.table(table)
  options = {"use_dictionary": False, "compression": "none"}
  parquet.write_table(written, path, write_page_checksum=True, **options)
  return path, ParquetSource(pattern=str(path))


def _lmdb(folder):
  environment = lmdb.open(str(folder / "db"), map_size=1 << 20)
  with environment.begin(write=True) as transaction:
    for number in range(_NUM_ITEMS):
      transaction.put(f"c{number % 3}/{number}".encode(), _image(number))
  environment.close()
  return folder / "db" / "data.mdb", LmdbSource(path=str(folder / "db"))


def _hdf5(folder):
  path = folder / "a.h5"
  with h5py.File(path, "w") as file:
    vectors = np.arange(4.0 * _NUM_ITEMS).reshape(-1, 4)
    file.create_dataset("x", data=vectors, chunks=(7, 4), fletcher32=True)
    file["y"] = np.arange(_NUM_ITEMS)
  return path, Hdf5Source(path=str(path), inputs="x", labels="y")


def _without_end(content):
  return content[: len(content) // 2]


def _zeros_inside(content):
  third = len(content) // 3
  return content[:third] + bytes(third) + content[2 * third :]


def _other_bytes(content):
  """Writes the same random bytes into every page of 512 at each call."""
  damaged = bytearray(content)
  rng = np.random.default_rng(0)
  for start in range(0, len(damaged), 512):
    damaged[start + 40 : start + 48] = rng.bytes(8)
  return bytes(damaged)


@pytest.mark.parametrize("make", [_parquet, _lmdb, _hdf5])
@pytest.mark.parametrize("damage", [_without_end, _zeros_inside, _other_bytes])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, make, damage):
  path, source = make(tmp_path)
  assert len(list(source.items())) == _NUM_ITEMS
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=f"{path.name} can't be read") as refusal:
    list(source.items())
  assert "\n" not in str(refusal.value)


def test_damaged_parquet_page_is_detected_by_its_checksum(tmp_path):
  path, source = _parquet(tmp_path)
  content = path.read_bytes()
  [place] = [n for n in range(len(content)) if content.startswith(_image(33), n)]
  damaged = bytearray(content)
  damaged[place + 60] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(UserError, match=r"can't be read as Parquet: .*checksum"):
    list(source.items())


def test_remote_file_is_read_through_a_temporary_copy(tmp_path):
  local, _ = _parquet(tmp_path)
  remote = "ram://reader_process/a.parquet"
  filesystem.make_folder("ram://reader_process")
  filesystem.write_bytes(remote, local.read_bytes())
  items = list(ParquetSource(pattern=remote).items())
  assert [item.image for item in items] == [_image(n) for n in range(_NUM_ITEMS)]
  with reader_process.local_file(remote) as copy:
    assert os.path.exists(copy)
  assert not os.path.exists(copy)
