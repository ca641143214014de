"""A run folder with all contents of a page."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.retrieval import report_collector
from trainer.retrieval.results import Measurement, Results
from trainer.training.callbacks import MetricsFile

CONFIG = """A.b = '<script>'

# Hashed values:
#   train.loss.margin = {margin}
#   train.seed = 1
"""
BEFORE = {"eval/recall_at_1": 0.25, "eval/map_at_r": 0.125, "eval/num_queries": 60}
AFTER = {"eval/recall_at_1": 0.75, "eval/map_at_r": 0.0625, "eval/num_queries": 60}
INTERVALS = {"eval/recall_at_1": (0.7, 0.8)}
# The longest names, and values and intervals before and after training.
MORE = {"eval/r_precision": 0.5, "eval/tpr_at_fpr_0.0001": 0.5, "eval/ndcg_at_10": 0.5}
MORE_INTERVALS = {"eval/r_precision": (0.25, 0.75)}
WORST = ({"class": "a<b", "num_queries": 20, "recall_at_1": 0.5, "map_at_r": 0.25},)


def make(folder, *, margin=0.2, has_report_data=True, num_classes=3, has_pictures=True):
  """Creates and fills the folder; returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.gin").write_text(CONFIG.format(margin=margin), encoding="utf-8")
  results = Results(str(folder))
  results.write_before_training(Measurement({**BEFORE, **MORE}, MORE_INTERVALS))
  after = Measurement({**AFTER, **MORE}, {**INTERVALS, **MORE_INTERVALS}, WORST)
  results.write_latest(30, after)
  file = MetricsFile(str(folder))
  for step in (10, 20, 30):
    file.append(step, {"train/loss": margin / step})
  if has_report_data:
    report_data(num_classes, has_pictures).write(str(folder))
  return str(folder)


def report_data(num_classes=3, has_pictures=True):
  """Returns report data of sixty items, some of them errors."""
  random = np.random.default_rng(3)
  labels = np.arange(60) % num_classes
  embeddings = random.normal(size=(60, 4)) + 2 * np.eye(num_classes, 4)[labels]
  distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
  np.fill_diagonal(distances, np.inf)
  return report_collector.collect_report_data(
    embeddings.astype(np.float32),
    labels,
    np.argsort(distances, axis=1)[:, :-1],
    np.arange(60),
    class_names=["a<b", "a class with quite a long name", *map(str, range(20))],
    pictures_fn=_pictures if has_pictures else None,
  )


def _pictures(items):
  random = np.random.default_rng(0)
  images = random.integers(256, size=(len(items), 16, 12, 3)).astype(np.uint8)
  return [tf.io.encode_png(image).numpy() for image in images]
