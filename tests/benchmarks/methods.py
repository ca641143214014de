"""Methods compared: equal time on this machine, classes never seen, several seeds.

  python -m tests.benchmarks.methods [--data=glyphs,fashion_mnist] [--seconds=30]
    [--num_seeds=3] [--folder=runs/methods] [--only=batch_all,...] [--picture=FILE]

The data must be there, as for the runs of the same names. `exchanged_glyphs` are glyphs
of which 10 % of the training labels are exchanged at random; they are made. Each run
trains for so many seconds, counted from its first logged row (so that compiling doesn't
count, and mining rounds do), is then told to stop, and evaluated. What is done already
is not done again.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from trainer.cli.ingest import ingest
from trainer.data.dataset import Dataset, HashSplit
from trainer.data.images import ImageDecoder
from trainer.data.sources.arrays import NumpySource

_DATA = flags.DEFINE_list("data", "glyphs,fashion_mnist", "Which data.")
_ONLY = flags.DEFINE_list("only", [], "Which ways; all where none is named.")
_SECONDS = flags.DEFINE_float("seconds", 30.0, "Training time of a run.")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Runs of each way.")
_FOLDER = flags.DEFINE_string("folder", "runs/methods", "Where the runs live.")
_PICTURE = flags.DEFINE_string("picture", None, "Where to draw the table, as PNG.")

_ROOT = pathlib.Path(__file__).parents[2]
_METRICS = {"eval/recall_at_1": "recall@1", "eval/map_at_r": "MAP@R"}
_POLL_S = 0.05

# A small network, so that a minute is long; batches of 128 and of 120 records.
_BASE = """
include '{root}/configs/data/{data}.gin'
include '{root}/configs/models/convnet.gin'
include '{root}/configs/optimizers/adam.gin'
include '{root}/configs/losses/{loss}.gin'

ConvNet.filters = (16, 32)
Encoder.pooling = 'flatten'
train.sampler_fn = @PKSampler
train.step = @TrainStep()
train.loop = @LoopOptions()
train.seed = {seed}
PKSampler.seed = {seed}
TrainStep.objective_fn = @global_negatives
TrainStep.mining_statistics = None
evaluate.verification = None
LoopOptions.num_steps = 10_000_000
LoopOptions.steps_per_loop = 25
LoopOptions.checkpoint_every_steps = 10_000_000
"""
_BATCHES = {
  "glyphs": "PKSampler.classes_per_batch = 32\nPKSampler.samples_per_class = 4\n",
  "fashion_mnist": (
    "PKSampler.classes_per_batch = 6\nPKSampler.samples_per_class = 20\n"
  ),
}
_BATCHES["exchanged_glyphs"] = _BATCHES["glyphs"]
_RECORDS_PER_CLASS = {"glyphs": 4, "exchanged_glyphs": 4, "fashion_mnist": 2_000}
_NUM_GROUPS = {"glyphs": 16, "exchanged_glyphs": 16, "fashion_mnist": 15}
_EVALUATION_FRACTION, _EXCHANGED_SHARE = 0.129, 0.1  # The first as in glyphs.gin.
_BANK = """
TrainStep.cross_batch_memory = @CrossBatchMemory()
CrossBatchMemory.size = 8_192
CrossBatchMemory.warm_up_steps = 300
"""
_HARD_CLASSES = """
include '{root}/configs/mining/neighbouring_classes.gin'
MINING_STEPS = 500
Miner.records_per_class = {records_per_class}
"""
_GROUPS = """
include '{root}/configs/mining/groups.gin'
MINING_STEPS = 500
MINING_SEED = {seed}
MinedTripletSampler.groups_per_batch = {num_groups}
MinedTripletSampler.negatives_per_group = 6
Miner.records_per_class = {records_per_class}
"""
# Small networks from random weights need a smaller scale and margin than the papers'.
_RANDOM_CENTRES = """
ARC_SCALE = 16.0
ARC_MARGIN = 0.2
"""
_MEANS = "ClassCentres.initial_centres = 'means'\n"
_CENTRES = _RANDOM_CENTRES + _MEANS
_SUB_CENTRES = _CENTRES + "ClassCentres.centres_per_class = 3\n"
_FILTER = """
ArcFaceLoss.class_filter = @ClassFilter()
ClassFilter.above = 0.5
"""
# The loss, and what is added to the base.
_WAYS = {
  "batch_all": ("batch_all", ""),
  "batch_hard": ("batch_hard", ""),
  "semi_hard": ("semi_hard", ""),
  "curriculum": ("curriculum", ""),
  "batch_all + memory bank": ("batch_all", _BANK),
  "contrastive": ("contrastive", ""),
  "contrastive + memory bank": ("contrastive", _BANK),
  "info_nce": ("info_nce", ""),
  "info_nce + memory bank": ("info_nce", _BANK),
  "batch_all + hard classes": ("batch_all", _HARD_CLASSES),
  "batch_all + offline": ("batch_all", _GROUPS),
  "arc_face": ("arc_face", _CENTRES),
  "arc_face from random": ("arc_face", _RANDOM_CENTRES),
  "arc_face 3 centres": ("arc_face", _SUB_CENTRES),
  "arc_face filter": ("arc_face", _CENTRES + _FILTER),
  "arc_face + batch_hard": ("arc_face_and_batch_hard", _CENTRES),
  "proxy_anchor": ("proxy_anchor", _MEANS),
}
# Batches of Fashion-MNIST have all its classes.
_NOT_POSSIBLE = {("fashion_mnist", "batch_all + hard classes")}


def main(_):
  ways = _ONLY.value or list(_WAYS)
  for data in _DATA.value:
    results = pathlib.Path(_FOLDER.value) / f"{data}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    if data == "exchanged_glyphs":
      _exchange_labels()
    done = {(row["way"], row["seed"]) for row in _rows(results)}
    for seed in range(1, _NUM_SEEDS.value + 1):
      for way in ways:
        if (way, seed) not in done and (data, way) not in _NOT_POSSIBLE:
          row = _run(data, way, seed)
          with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
          print(json.dumps(row), flush=True)
    _show(data, _rows(results))
  if _PICTURE.value:
    _draw(
      {
        data: _rows(pathlib.Path(_FOLDER.value) / f"{data}.jsonl")
        for data in _DATA.value
      }
    )


def _exchange_labels():
  """Ingests glyphs with some training labels exchanged, unless it is done."""
  folder, arrays = _ROOT / "data" / "exchanged_glyphs", _ROOT / "data" / "glyphs_arrays"
  if (folder / "index").exists():
    return
  dataset = Dataset(
    folder=str(_ROOT / "data" / "glyphs"),
    split=HashSplit(evaluation_fraction=_EVALUATION_FRACTION),
    decoder=ImageDecoder(height=32, width=32, channels=1),
  )
  labels = np.load(arrays / "labels.npy")
  training = {dataset.index.class_names[int(each)] for each in dataset.train_classes}
  rows = np.flatnonzero([str(label) in training for label in labels])
  exchanged = np.random.default_rng(0).permutation(rows)
  exchanged = exchanged[: int(_EXCHANGED_SHARE * len(rows))]
  labels[exchanged] = np.roll(labels[exchanged], 1)
  np.save(arrays / "exchanged_labels.npy", labels)
  source = NumpySource(
    inputs=str(arrays / "images.npy"), labels=str(arrays / "exchanged_labels.npy")
  )
  ingest(source=source, folder=str(folder))


def _rows(path):
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def _run(data, way, seed):
  """Trains and evaluates; a row of results."""
  name = f"{data}-{way.replace(' + ', '-').replace(' ', '_')}-{seed}"
  folder = pathlib.Path(_FOLDER.value, name).absolute()
  config = folder.with_suffix(".gin")
  loss, more = _WAYS[way]
  config.write_text(
    _BASE.format(root=_ROOT, data=data.removeprefix("exchanged_"), loss=loss, seed=seed)
    + f"DATA_DIR = 'data/{data}'\n"
    + _BATCHES[data]
    + more.format(
      root=_ROOT,
      seed=seed,
      num_groups=_NUM_GROUPS[data],
      records_per_class=_RECORDS_PER_CLASS[data],
    ),
    encoding="utf-8",
  )
  _train(folder, config)
  _task("evaluate", folder, config).check_returncode()
  measured = json.loads((folder / "eval" / "metrics.json").read_text())
  figures = measured["latest"]
  last = _rows(folder / "metrics.jsonl")[-1]
  return {
    "data": data,
    "way": way,
    "seed": seed,
    "seconds": _SECONDS.value,
    "steps": last["step"],
    "active": last.get("mining/active_fraction"),
    **{name: figures[name] for name in _METRICS},
  }


def _train(folder, config):
  """Trains for so many seconds from the first logged row on."""
  process = subprocess.Popen(
    _command("train", folder, config),
    stderr=subprocess.DEVNULL,
    cwd=_ROOT,
  )
  metrics = folder / "metrics.jsonl"
  while not (metrics.exists() and metrics.stat().st_size):
    if process.poll() is not None:
      raise RuntimeError(f"{config} ended with {process.returncode}")
    time.sleep(_POLL_S)
  time.sleep(_SECONDS.value)
  process.send_signal(signal.SIGTERM)
  if process.wait() != 3:
    raise RuntimeError(f"{config} ended with {process.returncode}")


def _task(mode, folder, config):
  return subprocess.run(
    _command(mode, folder, config), cwd=_ROOT, capture_output=True, text=True
  )


def _command(mode, folder, config):
  flags_of_run = [f"--mode={mode}", f"--model_dir={folder}", f"--gin_file={config}"]
  return [sys.executable, "-m", "trainer.task", *flags_of_run]


def _show(data, rows):
  """Mean and standard deviation over the seeds, the best way first."""
  print(f"\n{data}, {rows[0]['seconds']:g} s a run")
  print(
    f"{'':28}{'seeds':>6}{'steps':>8}"
    + "".join(f"{name:>18}" for name in _METRICS.values())
  )
  for way, of_way in _by_way(rows):
    cells = "".join(
      f"{np.mean(values):11.4f} ±{np.std(values, ddof=min(1, len(values) - 1)):.4f}"
      for values in ([row[name] for row in of_way] for name in _METRICS)
    )
    steps = np.mean([row["steps"] for row in of_way])
    print(f"{way:28}{len(of_way):6}{steps:8.0f}{cells}")


def _by_way(rows):
  by_way = {}
  for row in rows:
    by_way.setdefault(row["way"], []).append(row)
  first = next(iter(_METRICS))
  return sorted(
    by_way.items(), key=lambda item: -np.mean([row[first] for row in item[1]])
  )


def _draw(by_data):
  """A point a run, a line at the mean; needs matplotlib."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  numbers_of_ways = [len(_by_way(rows)) for rows in by_data.values()]
  figure, grid = pyplot.subplots(
    len(by_data),
    len(_METRICS),
    figsize=(10, 0.6 + 0.34 * sum(numbers_of_ways)),
    squeeze=False,
    sharey="row",
    height_ratios=numbers_of_ways,
  )
  for axes_of_data, (data, rows) in zip(grid, by_data.items()):
    ways = _by_way(rows)[::-1]
    for axes, (metric, title) in zip(axes_of_data, _METRICS.items()):
      for place, (_, of_way) in enumerate(ways):
        values = [row[metric] for row in of_way]
        axes.plot(values, [place] * len(values), "o", color="#204a87", markersize=4)
        axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color="#a40000")
      axes.set_yticks(range(len(ways)), [way for way, _ in ways])
      axes.set_ylim(-0.6, len(ways) - 0.4)
      axes.grid(axis="x", alpha=0.4)
      axes.set_title(f"{data}: {title}", fontsize=10)
  figure.tight_layout()
  os.makedirs(os.path.dirname(os.path.abspath(_PICTURE.value)), exist_ok=True)
  figure.savefig(_PICTURE.value, dpi=90)


if __name__ == "__main__":
  app.run(main)
