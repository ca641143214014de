"""What one call of the command line asks for: where a run lives, on what, of what."""

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

# The distributions whose versions change what is computed.
_DISTRIBUTIONS = ("tensorflow", "tf-keras", "tensorflow-addons", "numpy")


@dataclasses.dataclass(frozen=True)
class Hardware:
  """On what a run computes; the results do not depend on it.

  Attributes:
    strategy: "auto", "cpu", "mirrored", "multi_worker" or "tpu".
    num_virtual_replicas: >= 1; into how many replicas one CPU is divided.
    tpu: "local", the TPU that is attached; None for the same where `strategy` is
      "tpu".
    worker_timeout_s: how long to wait at the start for the other workers, seconds.
    step_deadline_s: how long a step may take before the run counts as stalled, seconds;
      None for 20 times the median step that was measured, and at least a minute.
    start_deadline_s: the same until the first steps are done, and outside of training.
  """

  strategy: str = "auto"
  num_virtual_replicas: int = 1
  tpu: Optional[str] = None
  worker_timeout_s: float = 300.0
  step_deadline_s: Optional[float] = None
  start_deadline_s: float = 1800.0


@dataclasses.dataclass(frozen=True)
class SearchRequest:
  """What mode `search` is asked, and how it answers.

  Attributes:
    queries: image files, `.npy` files of vectors, or keys.
    is_json: whether the answer is JSON rather than a table.
    picture: where a picture of the answers goes; None for none.
  """

  queries: Sequence[str] = ()
  is_json: bool = False
  picture: Optional[str] = None


_NO_REQUEST = SearchRequest()


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as every mode's `main` receives it.

  Attributes:
    model_dir: the folder that holds everything the run leaves.
    config: what is computed, already applied to gin.
    hardware: on what it is computed.
    allow_config_change: go on although `model_dir` holds another config.
    asked: what mode `search` is asked.
  """

  model_dir: str
  config: run_config.Config
  hardware: Hardware
  allow_config_change: bool = False
  search_request: SearchRequest = _NO_REQUEST

  def fingerprint(self) -> dict[str, str]:
    """What all workers of the run must have alike, by name."""
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
  """Watches a block of a run.

  Args:
    run: its folder gets the stack of every thread if the block makes no progress.
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
