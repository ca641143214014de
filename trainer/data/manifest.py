"""The manifest of an index: the indexed shards, and checks that they are unchanged.

The manifest is written last, under another name, and then renamed. A folder with a
manifest is therefore complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Optional

from absl import logging

from trainer.errors import UserError
from trainer.runtime import filesystem

MANIFEST_FILE = "manifest.json"
_RETIRED_NAME = MANIFEST_FILE + ".retired"
_VERSION = 1
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclasses.dataclass(frozen=True)
class IndexedShard:
  """A TFRecord file at the time of indexing.

  Attributes:
    name: path relative to the folder of the shards.
    num_bytes: its size.
    num_records: number of records.
    modified_ns: time of its last change, nanoseconds since 1970.
    sample: digest of some of its bytes; empty if none was computed.
  """

  name: str
  num_bytes: int
  num_records: int
  modified_ns: int
  sample: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The content of a manifest.

  Attributes:
    shards: in the order of the record numbers.
    num_classes: number of classes, including empty ones.
    label_feature: name of the feature that the labels were read from.
    source: fingerprint of the ingested source; None for a user's own shards.
  """

  shards: tuple[IndexedShard, ...]
  num_classes: int
  label_feature: str
  source: Optional[Mapping[str, Any]] = None

  @property
  def num_records(self) -> int:
    """Number of records in all shards."""
    return sum(shard.num_records for shard in self.shards)


def describe_shard(folder: str, name: str, num_records: int) -> IndexedShard:
  """Describes a shard as it is now.

  Args:
    folder: folder of the shards.
    name: path relative to it.
    num_records: number of records in it.

  Returns:
    The entry for the manifest.
  """
  path = os.path.join(folder, name)
  status = filesystem.status(path)
  digest = hash_sample(path, status.num_bytes)
  return IndexedShard(name, status.num_bytes, num_records, status.modified_ns, digest)


def write(folder: str, manifest: Manifest) -> None:
  """Writes a manifest atomically."""
  path = os.path.join(folder, MANIFEST_FILE)
  content = {"version": _VERSION, **dataclasses.asdict(manifest)}
  text = json.dumps(content, indent=1, ensure_ascii=False)
  filesystem.replace_file(path, text.encode(errors="backslashreplace"))


def retire(folder: str) -> None:
  """Invalidates an index whose shards are about to be replaced."""
  path = os.path.join(folder, MANIFEST_FILE)
  if filesystem.exists(path):
    filesystem.move(path, os.path.join(folder, _RETIRED_NAME))


def ingested_names(folder: str) -> set[str]:
  """Returns the shards that an ingest wrote, by its current or retired manifest."""
  found = (read(folder), _read(os.path.join(folder, _RETIRED_NAME)))
  ingested = (each for each in found if each is not None and each.source is not None)
  return {shard.name for each in ingested for shard in each.shards}


def read(folder: str) -> Optional[Manifest]:
  """Reads the manifest of an index folder; returns None if there is none.

  Raises:
    UserError: it can't be read, is damaged, or has another version.
  """
  return _read(os.path.join(folder, MANIFEST_FILE))


def _read(path: str) -> Optional[Manifest]:
  try:
    content = json.loads(filesystem.read_bytes(path).decode())
    version = content.pop("version")
    if version != _VERSION:
      raise UserError(
        f"{path} has version {version}, this program reads version {_VERSION}; delete "
        "the index and rebuild it with --mode=ingest."
      )
    shards = tuple(IndexedShard(**shard) for shard in content.pop("shards"))
    manifest = Manifest(shards=shards, **content)
    _check(manifest)
    return manifest
  except UserError:
    raise
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
  # AttributeError: JSON, but not an object. RecursionError: deeply nested lists.
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(
      f"{path} is damaged ({error}); delete the index and rebuild it with "
      "--mode=ingest."
    ) from error


def _check(manifest: Manifest) -> None:
  """Validates all entries that determine where and how much is read.

  Raises:
    ValueError: a path leaves the folder, or a value has the wrong type or size.
  """
  texts = [manifest.label_feature]
  counts = [manifest.num_classes]
  for shard in manifest.shards:
    texts += [shard.name, shard.sample]
    counts += [shard.num_bytes, shard.num_records, shard.modified_ns]
  if not all(isinstance(text, str) for text in texts):
    raise ValueError("a name is not a string")
  for count in counts:
    if type(count) is not int or not 0 <= count < 1 << 63:
      raise ValueError(f"{count!r:.40} is not a count")
  if manifest.source is not None and not isinstance(manifest.source, dict):
    raise ValueError("the source is not an object")
  for shard in manifest.shards:
    if not _is_inside(shard.name):
      raise ValueError(f"the shard {shard.name!r} is not inside the folder")


def _is_inside(name: str) -> bool:
  parts = name.split("/")
  has_odd = any(part in ("", ".", "..") or "\0" in part for part in parts)
  return not has_odd and not filesystem.is_remote(name)


def check_shards(folder: str, manifest: Manifest) -> None:
  """Checks that every shard exists and is unchanged since it was indexed.

  Size and modification time must be equal. If only the time differs (for example in a
  copy), a sample of the bytes is compared.

  Raises:
    UserError: a shard is missing or has changed; the message names the first.
  """
  for shard in manifest.shards:
    reason = describe_change(folder, shard)
    if reason:
      raise UserError(
        f"{os.path.join(folder, shard.name)} {reason}; restore it, or index the folder "
        "again with --mode=ingest."
      )


def describe_change(folder: str, shard: IndexedShard) -> str:
  """Returns how a shard differs from its indexed state; empty if it does not."""
  path = os.path.join(folder, shard.name)
  try:
    status = filesystem.status(path)
    if status.num_bytes != shard.num_bytes:
      return (
        f"has {status.num_bytes} bytes but had {shard.num_bytes} when it was indexed"
      )
    if status.modified_ns == shard.modified_ns or not shard.sample:
      return ""
    if hash_sample(path, status.num_bytes) != shard.sample:
      return "has other bytes than when it was indexed"
  except OSError as error:
    return f"is in the index but can't be read ({error.strerror})"
  logging.info(
    "%s: the modification time changed, but the sampled bytes are equal.", path
  )
  return ""


def has_same_time(folder: str, shard: IndexedShard) -> bool:
  """Returns whether a file's modification time is that of the indexed shard."""
  status = filesystem.status(os.path.join(folder, shard.name))
  return status.modified_ns == shard.modified_ns


def hash_sample(path: str, num_bytes: int) -> str:
  """Returns a digest of bytes sampled from the whole length of a file."""
  digest = hashlib.blake2b(digest_size=8)
  last = max(0, num_bytes - _SAMPLE_BYTES)
  with filesystem.as_os_errors(path), filesystem.open_file(path, "rb") as file:
    for number in range(_NUM_SAMPLES):
      file.seek(last * number // (_NUM_SAMPLES - 1))
      digest.update(file.read(_SAMPLE_BYTES))
  return digest.hexdigest()
