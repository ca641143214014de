"""Mode `ingest`: converts raw data to TFRecord shards with a class index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

import gin
from absl import logging

from trainer.data import ingestion, manifest, shards
from trainer.data.example_encoder import ExampleEncoder, Resize
from trainer.data.indexing import ExistingTFRecords, index_records
from trainer.data.records import RecordIndex, locate_folder
from trainer.data.sources.source import Source
from trainer.errors import UserError, check_at_least, check_choice
from trainer.run import Run


def main(run: Run) -> None:
  """Ingests the configured source."""
  del run  # The data folder comes from gin, so that runs can share it.
  ingest()


@gin.configurable
def ingest(
  *,
  source: Source | ExistingTFRecords,
  folder: str,
  records_per_shard: int = 10_000,
  resize: Optional[Resize] = None,
  unreadable: str = "refuse",
  max_pixels: int = 100_000_000,
  num_threads: Optional[int] = None,
) -> None:
  """Writes the records and the index of a source, unless they exist already.

  Args:
    source: raw data; `ExistingTFRecords` for shards that only need an index.
    folder: of the shards; the index is in its subfolder `index`.
    records_per_shard: items per file.
    resize: shrinks images once; None to keep their files byte for byte.
    unreadable: "refuse" an unreadable item, or "leave_out" and name it.
    max_pixels: an image that declares more pixels is refused before it is decoded.
    num_threads: items processed at once; None for the number of cores.

  Raises:
    UserError: the source cannot be read, or the folder holds another source's data.
  """
  check_at_least("ingest.records_per_shard", records_per_shard, 1)
  check_choice("ingest.unreadable", unreadable, ("refuse", "leave_out"))
  if isinstance(source, ExistingTFRecords):
    index = index_records(folder, label_feature=source.label_feature)
    logging.info("%s: %s", folder, shards.summary_of_index(index).line())
    return
  fingerprint = {
    **source.fingerprint(),
    "records_per_shard": records_per_shard,
    "max_pixels": max_pixels,
    "unreadable": unreadable,
  }
  if resize is not None:
    fingerprint["resize"] = resize.describe()
  if _is_done(folder, fingerprint):
    return
  if unreadable == "refuse":
    source.check()
  writer = ingestion.RecordWriter(
    ExampleEncoder(max_pixels=max_pixels, resize=resize),
    records_per_shard=records_per_shard,
    leave_out_unreadable=unreadable == "leave_out",
    num_threads=num_threads,
  )
  _write(writer, source, folder, fingerprint)


def _write(
  writer: ingestion.RecordWriter,
  source: Source,
  folder: str,
  fingerprint: Mapping[str, object],
) -> None:
  """Writes all items of the source, and logs a summary and warnings."""
  parts = writer.write(
    source.loaders(), folder, fingerprint, num_items=source.num_items()
  )
  written = shards.summary_of_parts(parts)
  logging.info("%s: %s", folder, written.line())
  for line in written.warnings():
    logging.warning("%s: %s", folder, line)


def _is_done(folder: str, fingerprint: Mapping[str, object]) -> bool:
  """Returns whether the folder holds all records of this source."""
  _, index_folder = locate_folder(folder)
  done = manifest.read(index_folder)
  if done is not None and done.source != fingerprint:
    raise UserError(
      f"{folder} holds records of another source; choose another ingest.folder, or "
      "delete this one."
    )
  if done is None or not _is_complete(folder):
    return False
  logging.info("%s: already has the %d records.", folder, done.num_records)
  return True


def _is_complete(folder: str) -> bool:
  """Returns whether shards and index are unchanged; logs differences."""
  try:
    RecordIndex.open(folder)
  except UserError as error:
    logging.warning("%s Ingesting again.", error)
    return False
  return True
