"""The manifest of an index: which shards it describes, and whether they are the same.

It is written last, under another name and then renamed, so that a folder with a
manifest is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Optional

from trainer.errors import UserError

FILE_NAME = "manifest.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
  """One TFRecord file as it was when it was indexed.

  Attributes:
    name: path relative to the folder of the shards.
    num_bytes: its size.
    num_records: records in it.
    modified_ns: time of its last change, nanoseconds since 1970.
  """

  name: str
  num_bytes: int
  num_records: int
  modified_ns: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What an index describes.

  Attributes:
    shards: in the order of the record numbers.
    num_classes: classes, empty ones included.
    label_feature: name of the feature the labels were read from.
    source: fingerprint of what was ingested; None for shards of the user's own.
  """

  shards: tuple[Shard, ...]
  num_classes: int
  label_feature: str
  source: Optional[Mapping[str, Any]] = None

  @property
  def num_records(self) -> int:
    """Records in all shards."""
    return sum(shard.num_records for shard in self.shards)


def write(folder: str, manifest: Manifest) -> None:
  """Writes a manifest in one step: nobody sees half of it."""
  path = os.path.join(folder, FILE_NAME)
  content = {"version": _VERSION, **dataclasses.asdict(manifest)}
  with open(path + ".partial", "w", encoding="utf-8") as file:
    json.dump(content, file, indent=1, ensure_ascii=False)
    file.flush()
    os.fsync(file.fileno())
  os.replace(path + ".partial", path)


def read(folder: str) -> Optional[Manifest]:
  """The manifest of an index folder, or None if there is none."""
  path = os.path.join(folder, FILE_NAME)
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
    version = content.pop("version")
    if version != _VERSION:
      raise UserError(
        f"{path} has version {version}, this program reads {_VERSION}; "
        "delete the index and make it again with --mode=ingest."
      )
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    return Manifest(shards=shards, **content)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}.") from error
  except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} is damaged ({error}); delete the index and make it again with "
      "--mode=ingest."
    ) from error


def check_shards(folder: str, manifest: Manifest) -> None:
  """Makes sure that every shard is there and has the size that was indexed.

  Raises:
    UserError: naming the first shard that is missing or has changed.
  """
  for shard in manifest.shards:
    path = os.path.join(folder, shard.name)
    try:
      num_bytes = os.path.getsize(path)
    except OSError as error:
      raise UserError(
        f"{path} is in the index but cannot be read ({error.strerror}); restore it, "
        "or index the folder again with --mode=ingest."
      ) from error
    if num_bytes != shard.num_bytes:
      raise UserError(
        f"{path} has {num_bytes} bytes but had {shard.num_bytes} when it was indexed; "
        "restore it, or index the folder again with --mode=ingest."
      )
