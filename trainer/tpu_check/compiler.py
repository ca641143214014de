"""The compiler for TPUs, and device topologies by name."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from trainer.errors import UserError

GIB = 2**30
_EXAMPLES = "v5e:2x4, v4:2x2x1 or gpu:4x16GB"
_TPU = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")
_GPU = re.compile(r"gpu:([1-9]\d*)x(\d+(?:\.\d+)?)GB")

_SCRIPT = pathlib.Path(__file__).with_name("xla_in_jax.py")
_NUM_LINES_SHOWN = 5


class TpuVersion(NamedTuple):
  """A generation of TPUs.

  Attributes:
    num_axes: number of axes of the chip grid.
    replicas_per_chip: number of devices per chip that the compiler sees.
    chip_gib: HBM of a chip, GiB.
    replica_gib: HBM available to a program on one device, GiB.
    chips_per_host: number of chips of a host whose chips are all used.
  """

  num_axes: int
  replicas_per_chip: int
  chip_gib: int
  replica_gib: float
  chips_per_host: int


# Chips, HBM and hosts: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and
# the page of each version. The limit of a program is from the error of libtpu 0.0.52
# for one that is too large: "exceeds available HBM (15.75G)".
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
    tpu: name known to libtpu; None for GPUs, of which only the memory is known.
    num_replicas: one on each device.
    memory_bytes: available to a replica's program.
    num_hosts: number of machines with the devices.
  """

  name: str
  tpu: Optional[str]
  num_replicas: int
  memory_bytes: int
  num_hosts: int = 1


def parse_topology(name: str) -> Topology:
  """Parses the name of a topology.

  Args:
    name: such as "v5e:2x4", a TPU by its chips, or "gpu:4x16GB", four GPUs of 16 GB.

  Raises:
    UserError: the name is invalid.
  """
  gpu = _GPU.fullmatch(name)
  if gpu:
    return Topology(name, None, int(gpu[1]), int(float(gpu[2]) * 1e9))
  tpu = _TPU.fullmatch(name)
  version = VERSIONS.get(tpu[1]) if tpu else None
  if tpu is None or version is None:
    raise UserError(
      f"--topology={name!r} is not known; use a form such as {_EXAMPLES}. TPUs are "
      f"{', '.join(VERSIONS)}."
    )
  sizes = [int(size) for size in tpu[2].split("x")]
  num_chips = 1
  for size in sizes:
    num_chips *= size
  if len(sizes) != version.num_axes or not num_chips:
    example = "2x2" if version.num_axes == 2 else "2x2x1"
    raise UserError(
      f"--topology={name!r} needs the number of chips along each of the "
      f"{version.num_axes} axes of {tpu[1]}, for example {tpu[1]}:{example}."
    )
  return Topology(
    name,
    name,
    num_chips * version.replicas_per_chip,
    int(version.replica_gib * GIB),
    -(-num_chips // version.chips_per_host),
  )


class Collective(NamedTuple):
  """One collective operation among replicas.

  Attributes:
    name: XLA's, such as "all-reduce".
    bytes: received by one replica.
  """

  name: str
  bytes: int


class Array(NamedTuple):
  """Result of an operation in the program before compilation.

  Attributes:
    name: of the operation, including those of its layers.
    bytes: of the whole array.
    shape: as text, such as "64,128".
  """

  name: str
  bytes: int
  shape: str


class Compiled(NamedTuple):
  """Needs of a compiled program on one replica's device.

  Attributes:
    compile_s: compilation time, seconds.
    arguments_bytes: batch, weights and the optimizer's variables.
    outputs_bytes: outputs that do not replace an argument.
    temporaries_bytes: the maximum over time.
    code_bytes: of the program itself.
    flops: floating point operations of one step.
    bytes_accessed: bytes read and written by one step.
    collectives: after the compiler has combined them; None if JAX cannot read the
      result of libtpu, as for some programs for v5p and v6e.
    largest: the largest of the program's arrays; the compiler may never allocate them.
  """

  compile_s: float
  arguments_bytes: int
  outputs_bytes: int
  temporaries_bytes: int
  code_bytes: int
  flops: float
  bytes_accessed: float
  collectives: Optional[Sequence[Collective]]
  largest: Sequence[Array]

  @property
  def memory_bytes(self) -> int:
    """Memory that must be free on a device."""
    parts = self.arguments_bytes, self.outputs_bytes, self.temporaries_bytes
    return sum(parts) + self.code_bytes


class CompilationError(RuntimeError):
  """The compiler refuses the program; the message is the compiler's.

  Attributes:
    largest: the largest of the program's arrays.
  """

  def __init__(self, message: str, largest: Sequence[Array]):
    super().__init__(message)
    self.largest = largest


class Compiler:
  """Compiles and runs programs, each in a separate process.

  Args:
    python: path of a Python with JAX and libtpu.

  Raises:
    UserError: it does not exist.
  """

  def __init__(self, python: str):
    if not os.access(python, os.X_OK):
      raise UserError(
        f"--compiler_python={python} does not exist; run ./launch/tpu_check.sh, which "
        "creates it."
      )
    self._python = python

  def compile(self, hlo: bytes, topology: Topology) -> Compiled:
    """Compiles for a TPU, or for the CPU in place of GPUs.

    Args:
      hlo: serialized.
      topology: with as many replicas as the program.

    Raises:
      CompilationError: the compiler refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
      reply = self._run_process(
        folder,
        hlo,
        action="compile",
        topology=topology.tpu,
        num_replicas=topology.num_replicas,
      )
    reply["largest"] = [Array(**each) for each in reply["largest"]]
    if "error" in reply:
      raise CompilationError(reply["error"], reply["largest"])
    aliased = reply.pop("aliased_bytes")
    reply["outputs_bytes"] -= aliased
    if reply["collectives"] is not None:
      reply["collectives"] = [Collective(**each) for each in reply["collectives"]]
    return Compiled(**reply)

  def run(
    self,
    hlo: bytes,
    *,
    num_replicas: int,
    batch: Sequence[np.ndarray],
    variables: Sequence[np.ndarray],
  ) -> dict[int, np.ndarray]:
    """Runs a program once on virtual CPU devices.

    Args:
      hlo: serialized.
      num_replicas: R, for which it was lowered.
      batch: of all replicas; each gets a part of the rows.
      variables: equal on all replicas.

    Returns:
      New values of the variables that the program assigns, [R, ...] each, by their
      position in `variables`.
    """
    with tempfile.TemporaryDirectory() as folder:
      inputs = os.path.join(folder, "inputs.npz")
      outputs = os.path.join(folder, "outputs.npz")
      np.savez(inputs, *batch, *variables)
      self._run_process(
        folder,
        hlo,
        action="run",
        num_replicas=num_replicas,
        num_batch_inputs=len(batch),
        inputs=inputs,
        outputs=outputs,
      )
      with np.load(outputs, allow_pickle=False) as file:
        return {int(name) - len(batch): file[name] for name in file.files}

  def _run_process(self, folder: str, hlo: bytes, **request: Any) -> dict[str, Any]:
    paths = [pathlib.Path(folder, name) for name in ("hlo", "request", "reply")]
    paths[0].write_bytes(hlo)
    paths[1].write_text(json.dumps({**request, "hlo": str(paths[0])}))
    done = subprocess.run(
      [self._python, str(_SCRIPT), str(paths[1]), str(paths[2])],
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode != 0:
      last = done.stderr.strip().splitlines()[-_NUM_LINES_SHOWN:]
      raise RuntimeError(
        f"{self._python} ended with {done.returncode}: " + "\n".join(last)
      )
    return json.loads(paths[2].read_text())
