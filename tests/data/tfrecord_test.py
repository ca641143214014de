"""Sequential reads of TFRecord files: every record once, damage by record number."""

from __future__ import annotations

import os
import struct

import pytest

from trainer.data import tfrecord


def _forged(num_bytes):
  length = struct.pack("<Q", num_bytes)
  return length + struct.pack("<I", tfrecord.masked_crc(length)) + b"1234"


def test_forged_length_is_named_in_a_sequential_read(tmp_path):
  (tmp_path / "a").write_bytes(tfrecord.frame_record(b"x") + _forged(2**45))
  caught = pytest.raises(tfrecord.FramingError, match="is truncated")
  with (tmp_path / "a").open("rb") as file, caught as damage:
    list(tfrecord.iterate_records(file))
  assert damage.value.number == 1


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16, 100, 5000])
def test_sequential_read_does_not_depend_on_the_chunk_size(
  tmp_path, monkeypatch, chunk_bytes
):
  expected = [os.urandom(n) for n in (0, 1, 3000, 0, 16, 40)]
  (tmp_path / "a").write_bytes(b"".join(map(tfrecord.frame_record, expected)))
  monkeypatch.setattr(tfrecord, "_CHUNK_BYTES", chunk_bytes)
  with (tmp_path / "a").open("rb") as file:
    assert list(tfrecord.iterate_records(file)) == expected


def test_sequential_read_yields_the_records_before_a_damaged_one(tmp_path):
  frames = [tfrecord.frame_record(bytes([n])) for n in range(5)]
  frames[3] = frames[3][:-1] + bytes([frames[3][-1] ^ 1])
  (tmp_path / "a").write_bytes(b"".join(frames))
  given = []
  expected = pytest.raises(tfrecord.FramingError, match="corrupt data")
  with (tmp_path / "a").open("rb") as file, expected as damage:
    for record in tfrecord.iterate_records(file):
      given.append(record)
  assert given == [b"\0", b"\1", b"\2"]
  assert damage.value.number == 3
