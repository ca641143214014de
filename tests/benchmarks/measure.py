"""Time and memory of calls, taken in turns, and tables and pictures of them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import time

import numpy as np
import tensorflow as tf


@dataclasses.dataclass
class Cost:
  """What one call takes.

  Attributes:
    seconds: the least seen.
    megabytes: at the most, above what the process had before.
  """

  seconds: float = np.inf
  megabytes: float = 0.0

  def over(self, other: Cost) -> tuple[float, float]:
    """How many times another's time and memory this takes."""
    return self.seconds / other.seconds, self.megabytes / max(other.megabytes, 1.0)


def compare(runs, num_rounds) -> dict[str, Cost]:
  """The costs of calls by name.

  Memory is that of the first call, compilation included, because what is freed then
  serves the later ones; time is the least of later ones, taken in turns.
  """
  costs = {name: Cost() for name in runs}
  for name, run in runs.items():
    if hasattr(run, "get_concrete_function"):
      run.get_concrete_function()
    before = base_megabytes()
    _finish(run())
    costs[name].megabytes = peak_megabytes() - before
  for _ in range(num_rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      _finish(run())
      costs[name].seconds = min(costs[name].seconds, time.perf_counter() - start)
  return costs


def repeated(run, num_calls):
  """So many calls as one."""

  def calls():
    for _ in range(num_calls - 1):
      _finish(run())
    return run()

  return calls


def show(title, costs, unit) -> None:
  """Prints costs, as multiples of the one that is the unit."""
  print(f"\n{title}")
  for name, cost in costs.items():
    ratio, _ = cost.over(costs[unit])
    print(
      f"  {name:24}{1e3 * cost.seconds:11.1f} ms{cost.megabytes:8.0f} MB"
      f"{ratio:9.2f} x {unit}"
    )


def draw(costs_by_size, path) -> None:
  """Time and memory against the batch size, both axes logarithmic."""
  try:
    import matplotlib
  except ImportError:
    print("  no picture: matplotlib is not installed")
    return
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
  names = {name: None for costs in costs_by_size.values() for name in costs}
  for name in names:
    of_name = {s: costs[name] for s, costs in costs_by_size.items() if name in costs}
    sizes = list(of_name)
    axes[0].loglog(sizes, [c.seconds for c in of_name.values()], "o-", label=name)
    memory = [max(c.megabytes, 1) for c in of_name.values()]
    axes[1].loglog(sizes, memory, "o-", label=name)
  for axis, label in zip(axes, ("seconds", "MB above the process's base")):
    axis.set(xlabel="batch size B", ylabel=label, xticks=list(costs_by_size))
    axis.set_xticklabels([f"{size:,}" for size in costs_by_size], rotation=30)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
  figure.suptitle(f"Loss and gradient, D = 128, K = 4, {os.cpu_count()} cores")
  os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  figure.savefig(path, dpi=150)
  print(f"  drawn in {path}")


def _finish(outputs) -> None:
  tf.nest.map_structure(
    lambda each: each.numpy() if hasattr(each, "numpy") else each, outputs
  )


def base_megabytes() -> float:
  """What the process holds, once it has given back what it had freed."""
  ctypes.CDLL(None).malloc_trim(0)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
  return peak_megabytes()


def peak_megabytes() -> float:
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) / 1024
