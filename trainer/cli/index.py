"""Mode `index`: builds an index for fast search, and measures its recall."""

from __future__ import annotations

import dataclasses
import os
from typing import Optional

import gin
import numpy as np

from trainer.errors import check_choice
from trainer.retrieval import faiss_index
from trainer.retrieval.embedding_store import EmbeddingFolder
from trainer.retrieval.ranking import check_finite
from trainer.run import Run
from trainer.runtime.lease import locked_folder


def main(run: Run) -> None:
  """Builds an index of a run's embeddings."""
  options = IndexOptions()
  embeddings_folder = options.embeddings or os.path.join(run.model_dir, "embeddings")
  folder = options.folder or os.path.join(run.model_dir, "index")
  EmbeddingFolder(embeddings_folder)  # Fail before a folder is created.
  os.makedirs(folder, exist_ok=True)
  with locked_folder(folder, "indexing into"):
    _write(options, embeddings_folder, folder)


def _write(options: IndexOptions, embeddings_folder: str, folder: str) -> None:
  """Builds, measures and writes the index of a folder of embeddings."""
  stored = EmbeddingFolder(embeddings_folder)
  embeddings = np.asarray(stored.embeddings, np.float32)
  check_finite(embeddings)
  kind = options.kind
  if kind == "auto":
    kind = faiss_index.choose_kind(len(embeddings))
  index = faiss_index.build_index(embeddings, kind)
  measured = faiss_index.measure_index(index, embeddings)
  source = {"embeddings": os.path.abspath(embeddings_folder), **stored.source}
  manifest = {"kind": kind, **measured, "embeddings_sha256": stored.sha256}
  faiss_index.write_index(folder, index, {**manifest, "source": source})
  shape = f"{len(embeddings):,} x {embeddings.shape[1]}"
  figures = "  ".join(f"{name} {value:,.4g}" for name, value in measured.items())
  print(f"{kind}  {shape}  {figures}\n{folder}")


@gin.configurable("index")
@dataclasses.dataclass(frozen=True)
class IndexOptions:
  """Options of the index.

  Attributes:
    embeddings: folder written by `--mode=embed`; None for that of the run.
    folder: of the index; None for `index` in the run's folder.
    kind: "flat", "ivf_flat", "ivf_pq", "hnsw", or "auto": flat up to 20,000 items,
      ivf_pq from a million on, and ivf_flat between them.

  Raises:
    UserError: the kind is unknown.
  """

  embeddings: Optional[str] = None
  folder: Optional[str] = None
  kind: str = "auto"

  def __post_init__(self):
    check_choice("index.kind", self.kind, ("auto", *faiss_index.KINDS))
