"""Short runs on digits for fault tests, and their results."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import tempfile

import numpy as np
import tensorflow as tf

from tests.faults import processes
from tests.faults.processes import ROOT, Running

NUM_STEPS = 40
_CENTRES = ROOT / "configs" / "runs" / "digits_class_centres.gin"
_DIGITS = ROOT / "configs" / "runs" / "digits.gin"
# Small, with every state that must be restored: moments, moving averages of batch
# normalisation, averaged weights. Mining statistics are slow to compile.
_SMALL = (
  f"NUM_STEPS = {NUM_STEPS}",
  "LoopOptions.steps_per_loop = 2",
  "LoopOptions.checkpoint_every_steps = 4",
  "TrainStep.mining_statistics = None",
  "ConvNet.filters = (4,)",
  "ConvNet.normalization = 'batch'",
  "StepOptions.averaging_decay = 0.9",
  "PKSampler.samples_per_class = 4",
)
# A smooth loss, because a rounding error can move a triplet across the margin. Batch
# normalisation uses the replica's batch, so it depends on the number of replicas.
_SMOOTH = {
  "batch_all.gin": "supervised_contrastive.gin",
  "'../": f"'{ROOT}/configs/",
}
_TIMED = ("time", "train/images_per_second", "train/seconds_per_step")


class Runs:
  """Starts runs below a folder, on records ingested once.

  Args:
    folder: an empty one.
  """

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self._gin_file, self._params = _DIGITS, _SMALL
    self._finished = {}
    done = self.start("ingest", mode="ingest")
    assert done.wait()[0] == 0, done.output.read_text()

  def smooth(self):
    """Starts runs whose results on any number of replicas are equal up to rounding."""
    content = _DIGITS.read_text(encoding="utf-8")
    for old, new in _SMOOTH.items():
      assert old in content
      content = content.replace(old, new)
    gin_file = self.folder / "smooth.gin"
    gin_file.write_text(content)
    return self._others(gin_file, "ConvNet.normalization = 'none'", "NUM_STEPS = 80")

  def with_centres(self):
    """Starts runs with sampled class centres."""
    params = ("CENTRE_SAMPLING_RATE = 0.7", "RowSGD.momentum = 0.9")
    return self._others(_CENTRES, *params)

  def _others(self, gin_file, *params):
    others = copy.copy(self)
    others._gin_file, others._finished = gin_file, {}
    others._params = (*_SMALL, *params)
    return others

  def start(
    self, name, *params, mode="train", flags=(), environment=None, is_fork=True
  ) -> Running:
    """Starts or resumes the run of that name."""
    params = [*self._params, f"DATA_DIR = '{self.folder / 'digits'}'", *params]
    arguments = [
      *(f"--mode={mode}", f"--gin_file={self._gin_file}"),
      f"--model_dir={self.folder / name}",
      "--allow_gin_import=tests.faults.parts",
      *(f"--gin_param={param}" for param in params),
      *flags,
    ]
    descriptor, output = tempfile.mkstemp(".txt", "output-", self.folder)
    os.close(descriptor)
    return Running(arguments, output, environment, is_fork=is_fork)

  def start_workers(self, name, *params, num_workers=2, **options):
    """Starts the workers of a run; takes the options of `start`."""
    return processes.workers(
      num_workers,
      lambda index, environment: self.start(
        name, *params, environment=environment, **options
      ),
    )

  def finished(self, num_replicas=1):
    """Returns the folder of an uninterrupted run, shared by all tests."""
    if num_replicas not in self._finished:
      name = f"whole-{num_replicas}-{self._gin_file.stem}"
      flag = f"--num_virtual_replicas={num_replicas}"
      running = self.start(name, flags=(flag,))
      assert running.wait()[0] == 0, running.output.read_text()
      self._finished[num_replicas] = self.folder / name
    return self._finished[num_replicas]


def newest_step(model_dir) -> int:
  """Returns the step of the newest checkpoint with a manifest, or 0."""
  manifests = pathlib.Path(model_dir, "checkpoints").glob("ckpt-*[0-9].json")
  return max((int(path.stem[len("ckpt-") :]) for path in manifests), default=0)


def claimed_by(model_dir) -> list[int]:
  """Returns the processes that claim a folder for training."""
  claims = pathlib.Path(model_dir).glob(".in-use-*.json")
  return [json.loads(path.read_text())["pid"] for path in claims]


def rows(model_dir) -> list[dict]:
  """Returns the rows of metrics.jsonl without measured times."""
  lines = pathlib.Path(model_dir, "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [{k: v for k, v in row.items() if k not in _TIMED} for row in found]


def values(model_dir, step=None) -> dict[str, np.ndarray]:
  """Returns all values of the newest checkpoint, by name."""
  step = newest_step(model_dir) if step is None else step
  reader = tf.train.load_checkpoint(f"{model_dir}/checkpoints/ckpt-{step}")
  names = reader.get_variable_to_shape_map()
  shards = pathlib.Path(model_dir, "checkpoints").glob(f"ckpt-{step}.*.npy")
  return {
    **{n: reader.get_tensor(n) for n in names if "OBJECT_GRAPH" not in n},
    **{path.name.split(".")[1]: np.load(path) for path in shards},
  }


def differences(model_dir, whole) -> list[str]:
  """Returns bitwise differences between a run and an uninterrupted one."""
  got, expected = values(model_dir), values(whole)
  if got.keys() != expected.keys():
    return ["names"]
  found = [n for n, value in expected.items() if got[n].tobytes() != value.tobytes()]
  if newest_step(model_dir) != newest_step(whole):
    found.append("step")
  if rows(model_dir) != rows(whole):
    found.append("metrics.jsonl")
  return found


def largest_error(model_dir, whole) -> float:
  """Returns the largest relative difference of weights, averages and moments.

  It is relative to the largest of all weights, averages, first or second moments.
  The gradient of a bias or a temperature is a sum in which most terms cancel, and
  rounding is in proportion to the terms.
  """
  got, expected = values(model_dir), values(whole)
  assert got.keys() == expected.keys()
  floats = {n: value for n, value in expected.items() if value.dtype.kind == "f"}
  sizes = {name: np.abs(value).max() for name, value in floats.items()}
  # The variables of Adam alternate between first and second moments.
  first, second = (rf"optimizer/_variables/\d*[{d}]/" for d in ("13579", "02468"))
  for kind in ("encoder", "averages", first, second):
    same = [name for name in floats if re.match(kind, name)]
    sizes.update(dict.fromkeys(same, max(sizes[name] for name in same)))
  errors = [
    np.abs(got[name] - value).max() / max(sizes[name], 1e-30)
    for name, value in floats.items()
  ]
  return float(max(errors))


def all_finite(model_dir) -> bool:
  """Returns whether every value of every checkpoint is finite."""
  manifests = list(pathlib.Path(model_dir, "checkpoints").glob("ckpt-*[0-9].json"))
  kept = [int(path.stem[len("ckpt-") :]) for path in manifests]
  numbers = [v for step in kept for v in values(model_dir, step).values()]
  return bool(kept) and all(np.isfinite(v).all() for v in numbers)
