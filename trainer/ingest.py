"""Mode `ingest`: turns raw data into TFRecord shards with a class index beside them."""

from __future__ import annotations

import gin
from absl import logging

from trainer.data import manifest
from trainer.data.records import RecordIndex, locate
from trainer.data.sources import Source
from trainer.errors import UserError
from trainer.run import Run


def main(run: Run) -> None:
  """Ingests what the run's configuration names."""
  del run  # The data's folder is the configuration's, for many runs to share.
  ingest()


@gin.configurable
def ingest(*, source: Source, folder: str, records_per_shard: int = 10_000) -> None:
  """Writes the records and the index of a source, unless that is done already.

  Args:
    source: raw data.
    folder: of the shards; the index is in its folder `index`.
    records_per_shard: records in a file.

  Raises:
    UserError: the source can't be read, or the folder holds another source's data.
  """
  if records_per_shard < 1:
    raise UserError(f"ingest.records_per_shard={records_per_shard} must be at least 1.")
  _, index_folder = locate(folder)
  fingerprint = {**source.fingerprint(), "records_per_shard": records_per_shard}
  done = manifest.read(index_folder)
  if done is not None and done.source != fingerprint:
    raise UserError(
      f"{folder} holds records of another source; choose another ingest.folder, or "
      "delete that one."
    )
  if done is not None and _is_whole(folder):
    logging.info("%s: %d records are there already.", folder, done.num_records)
    return
  from trainer.data import writer  # Late: TensorFlow isn't needed before.

  counts = writer.write_records(
    source.items(),
    folder,
    records_per_shard=records_per_shard,
    fingerprint=fingerprint,
  )
  largest, *_, smallest = counts.most_common()
  logging.info(
    "%s: %d records of %d classes, from %d (%s) to %d (%s) a class.",
    folder,
    sum(counts.values()),
    len(counts),
    smallest[1],
    smallest[0],
    largest[1],
    largest[0],
  )


def _is_whole(folder: str) -> bool:
  """Whether shards and index are as they were written; says what is not."""
  try:
    RecordIndex.open(folder)
  except UserError as error:
    logging.warning("%s Ingesting again.", error)
    return False
  return True
