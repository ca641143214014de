"""One run of the command line: its folder, hardware and configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Optional

from trainer import __version__
from trainer.config import run_config
from trainer.runtime.watchdog import STALL_FILE, Watchdog

# Distributions whose versions affect the results.
_DISTRIBUTIONS = ("tensorflow", "tf-keras", "tensorflow-addons", "numpy")


@dataclasses.dataclass(frozen=True)
class Hardware:
  """The hardware of a run; the results do not depend on it.

  Attributes:
    strategy: "auto", "cpu", "mirrored", "multi_worker" or "tpu".
    num_virtual_replicas: number of replicas on one CPU, >= 1.
    tpu: "local", the attached TPU; None means the same if `strategy` is "tpu".
    worker_timeout_s: time to wait for the other workers at the start, seconds.
    step_deadline_s: longest time of a step before the run counts as stalled, seconds;
      None for 20 times the measured median step, at least a minute.
    start_deadline_s: the same deadline before the first steps are done, and outside of
      training.
  """

  strategy: str = "auto"
  num_virtual_replicas: int = 1
  tpu: Optional[str] = None
  worker_timeout_s: float = 300.0
  step_deadline_s: Optional[float] = None
  start_deadline_s: float = 1800.0


@dataclasses.dataclass(frozen=True)
class SearchRequest:
  """A request of mode `search`.

  Attributes:
    queries: image files, `.npy` files of vectors, or keys.
    is_json: whether results are printed as JSON rather than as a table.
    picture: path of a picture of the results; None for no picture.
  """

  queries: Sequence[str] = ()
  is_json: bool = False
  picture: Optional[str] = None


_NO_REQUEST = SearchRequest()


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as passed to the `main` of every mode.

  Attributes:
    model_dir: folder of all files that the run writes.
    config: the configuration, already applied to gin.
    hardware: the hardware to compute on.
    allow_config_change: whether to continue if `model_dir` holds another config.
    search_request: the request of mode `search`.
  """

  model_dir: str
  config: run_config.Config
  hardware: Hardware
  allow_config_change: bool = False
  search_request: SearchRequest = _NO_REQUEST

  def fingerprint(self) -> dict[str, str]:
    """Returns the versions and config values that must be equal on all workers."""
    return {
      "trainer": __version__,
      "Python": platform.python_version(),
      **{name: _version(name) for name in _DISTRIBUTIONS},
      **self.config.values,
    }


def _version(distribution: str) -> str:
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


@contextlib.contextmanager
def watching(run: Run, worker_index: int) -> Iterator[Watchdog]:
  """Runs a watchdog during a block of a run.

  Args:
    run: the stack of every thread is written to its folder if the block makes no
      progress.
    worker_index: index of this worker.

  Yields:
    The watchdog.
  """
  watchdog = Watchdog(
    os.path.join(run.model_dir, STALL_FILE.format(worker_index)),
    start_deadline_s=run.hardware.start_deadline_s,
    step_deadline_s=run.hardware.step_deadline_s,
  )
  with watchdog.watching():
    yield watchdog
