"""Devices by name: how many replicas they make, and how much memory one has."""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from trainer.errors import UserError

GIB = 2**30
_EXAMPLES = "v5e:2x4, v4:2x2x1 or gpu:4x16GB"
_TPU = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")
_GPU = re.compile(r"gpu:([1-9]\d*)x(\d+(?:\.\d+)?)GB")


class TpuVersion(NamedTuple):
  """A generation of TPUs.

  Attributes:
    num_axes: along which its chips stand.
    replicas_per_chip: devices that the compiler sees of one chip.
    chip_gib: HBM of a chip, GiB.
    replica_gib: HBM that the compiler gives a program on one device, GiB.
    chips_per_host: of a host that has whole chips to itself.
  """

  num_axes: int
  replicas_per_chip: int
  chip_gib: int
  replica_gib: float
  chips_per_host: int


# Chips, HBM and hosts: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and
# the page of each version. What a program may have of it is what libtpu 0.0.52 says
# when it refuses one that is too large: "exceeds available HBM (15.75G)".
VERSIONS = {
  "v2": TpuVersion(2, 2, 16, 7.48, 4),
  "v3": TpuVersion(2, 2, 32, 15.48, 4),
  "v4": TpuVersion(3, 2, 32, 15.25, 4),
  "v5e": TpuVersion(2, 1, 16, 15.75, 8),
  "v5p": TpuVersion(3, 1, 95, 95.73, 4),
  "v6e": TpuVersion(2, 1, 32, 31.24, 8),
}


class Topology(NamedTuple):
  """The devices of a run.

  Attributes:
    name: as given.
    tpu: the name that libtpu knows; None for GPUs, of which only memory is known.
    num_replicas: one on each device.
    memory_bytes: that a replica's program may take.
    num_hosts: machines that the devices are in.
  """

  name: str
  tpu: Optional[str]
  num_replicas: int
  memory_bytes: int
  num_hosts: int = 1


def parse(name: str) -> Topology:
  """The devices that a name means.

  Args:
    name: such as "v5e:2x4", a TPU by its chips, or "gpu:4x16GB", four GPUs of 16 GB.

  Raises:
    UserError: it is no such name.
  """
  gpu = _GPU.fullmatch(name)
  if gpu:
    return Topology(name, None, int(gpu[1]), int(float(gpu[2]) * 1e9))
  tpu = _TPU.fullmatch(name)
  version = VERSIONS.get(tpu[1]) if tpu else None
  if tpu is None or version is None:
    raise UserError(
      f"--topology={name!r} is not known; give {_EXAMPLES}. TPUs are "
      f"{', '.join(VERSIONS)}."
    )
  sizes = [int(size) for size in tpu[2].split("x")]
  num_chips = 1
  for size in sizes:
    num_chips *= size
  if len(sizes) != version.num_axes or not num_chips:
    example = "2x2" if version.num_axes == 2 else "2x2x1"
    raise UserError(
      f"--topology={name!r} does not say how many chips stand along each of the "
      f"{version.num_axes} axes of {tpu[1]}; give for example {tpu[1]}:{example}."
    )
  return Topology(
    name,
    name,
    num_chips * version.replicas_per_chip,
    int(version.replica_gib * GIB),
    -(-num_chips // version.chips_per_host),
  )
