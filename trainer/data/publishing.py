"""Moves shards that are done, and then their index, to where they are read.

What is there already is replaced only where an earlier ingest made it: files of the
user's own stay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence

from trainer.data import index_builder, manifest, paths, shard_file, summary
from trainer.data.prepare import LABEL_FEATURE
from trainer.data.shard_file import Part
from trainer.errors import UserError


def take_back(aside: str) -> list[Part]:
  """Moves what a killed run had published back to where it was made.

  Args:
    aside: the folder where shards are made, in the folder where they belong.

  Returns:
    The shards that are finished, by the notes beside them.
  """
  parts = shard_file.read_parts(aside)
  for part in parts:
    made = os.path.join(aside, part.name)
    moved = os.path.join(os.path.dirname(aside), part.name)
    if not paths.exists(made) and paths.exists(moved):
      paths.move(moved, made)
  return parts


def withdraw(aside: str) -> None:
  """Removes what an ingest that failed made, published or not."""
  with contextlib.suppress(OSError):
    take_back(aside)
  paths.remove_folder(aside)


def check_free(folder: str, index_folder: str, names: Iterable[str]) -> None:
  """Makes sure that no file of the user's own would be written over.

  Args:
    folder: of the shards.
    index_folder: of their index.
    names: of the shards that are to be written.

  Raises:
    UserError: there is such a file, which no ingest is known to have made.
  """
  own = manifest.ingested_names(index_folder)
  for name in names:
    path = os.path.join(folder, name)
    if name not in own and paths.exists(path):
      raise UserError(
        f"{path} is there already, and not of an ingest that is known; choose another "
        "ingest.folder, or move the file away."
      )


def publish(
  parts: Sequence[Part],
  aside: str,
  folder: str,
  index_folder: str,
  fingerprint: Mapping[str, object],
) -> None:
  """Moves shards and then index and summary to their place.

  Args:
    parts: the shards.
    aside: where they were made.
    folder: where they belong.
    index_folder: where their index belongs.
    fingerprint: of the source.

  Raises:
    UserError: a file of the user's own is in the way.
    OSError: something can't be written.
  """
  check_free(folder, index_folder, [part.name for part in parts])
  index_aside = os.path.join(aside, "index")
  paths.remove_folder(index_aside)
  paths.make_folder(index_aside)
  summary.write(index_aside, summary.of_parts(parts))
  index_builder.write_index(
    index_aside,
    [part.index(aside) for part in parts],
    label_feature=LABEL_FEATURE,
    source=fingerprint,
  )
  manifest.retire(index_folder)
  for part in parts:
    paths.move(os.path.join(aside, part.name), os.path.join(folder, part.name))
  index_builder.publish_index(index_aside, index_folder)
