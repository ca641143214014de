"""`MODEL_CARD.md`: description and measured results of an exported encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from trainer import __version__
from trainer.config import run_config
from trainer.retrieval.results import Results, result_titles
from trainer.runtime import filesystem

MODEL_CARD_FILE = "MODEL_CARD.md"


class ModelCardInfo(NamedTuple):
  """Content of the card in addition to the evaluation results.

  Attributes:
    name: of the run.
    step: number of steps the encoder was trained.
    checkpoint: which of the run's, "newest" or "best".
    config_hash: of the run's configuration.
    input_shape: of one input.
    is_image: whether inputs are images, with values in [0, 1].
    embedding_size: D.
    data: facts about records and classes, by title.
  """

  name: str
  step: int
  checkpoint: str
  config_hash: str
  input_shape: tuple[int, ...]
  is_image: bool
  embedding_size: int
  data: Mapping[str, Any]


def write_model_card(folder: str, info: ModelCardInfo, *, model_dir: str) -> str:
  """Writes the card to the export folder.

  Args:
    folder: of the export.
    info: about the encoder.
    model_dir: folder of the run, for its results.

  Returns:
    Path of the card.
  """
  inputs = f"float32 inputs of shape {list(info.input_shape)}"
  if info.is_image:
    inputs = f"{inputs}, images with values in [0, 1],"
  training = {
    "steps": info.step,
    "checkpoint": info.checkpoint,
    "configuration": f"{info.config_hash} ({run_config.CONFIG_FILE} in this folder)",
  }
  lines = [
    f"# {info.name}",
    "",
    f"Maps {inputs} to embeddings of {info.embedding_size} dimensions. Compare them "
    "by Euclidean distance.",
    *_section("Training", training),
    *_section("Data", info.data),
    *_section(
      "Retrieval on classes outside the training split", _measured(model_dir, info.step)
    ),
    *_section("Software", {"trainer": __version__, "TensorFlow": tf.__version__}),
    *_section("Files (SHA-256)", _hashes(folder)),
  ]
  path = os.path.join(folder, MODEL_CARD_FILE)
  filesystem.replace_file(path, "\n".join(lines) + "\n")
  return path


def _section(title: str, rows: Mapping[str, Any]) -> list[str]:
  cells = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
  return ["", f"## {title}", "", "| | |", "|---|---|", *cells]


def _cell(value: Any) -> str:
  return " ".join(str(value).replace("|", "\\|").split())


def _measured(model_dir: str, step: int) -> dict[str, str]:
  """Returns the main metrics, if they belong to the exported weights."""
  latest = Results(model_dir).by_moment.get("latest", {})
  if latest.get("step") != step:
    return {"not measured": f"run --mode=evaluate after step {step}"}
  intervals = latest.get("intervals", {})
  found = {}
  for name, title in result_titles(latest).items():
    found[title] = f"{latest[name]:.4f}"
    if name in intervals:
      low, high = intervals[name]
      found[title] += f" (95 %: {low:.4f} to {high:.4f})"
  return {**found, "queries": latest.get("eval/num_queries", "unknown")}


def _hashes(folder: str) -> dict[str, str]:
  """Returns the hash of every exported file, by its path in the folder."""
  found = {}
  for parent, _, names in sorted(os.walk(folder)):
    for name in sorted(names):
      path = os.path.join(parent, name)
      if name != MODEL_CARD_FILE:
        found[os.path.relpath(path, folder)] = filesystem.sha256_of(path)
  return found
