"""What one call of the command line asks for: where a run lives, on what, of what."""

from __future__ import annotations

import dataclasses
from typing import Optional

from trainer import config as config_lib


@dataclasses.dataclass(frozen=True)
class Hardware:
  """On what a run computes; the results do not depend on it.

  Attributes:
    strategy: "auto", "cpu", "mirrored", "multi_worker" or "tpu".
    num_virtual_replicas: >= 1; into how many replicas one CPU is divided.
    tpu: name or address of the TPU; None for the one that is attached.
  """

  strategy: str = "auto"
  num_virtual_replicas: int = 1
  tpu: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as every mode's `main` receives it.

  Attributes:
    model_dir: the folder that holds everything the run leaves.
    config: what is computed, already applied to gin.
    hardware: on what it is computed.
    allow_config_change: go on although `model_dir` holds another config.
  """

  model_dir: str
  config: config_lib.Config
  hardware: Hardware
  allow_config_change: bool = False
