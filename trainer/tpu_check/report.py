"""What compiling came to, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trainer.tpu_check.compiler import Array, Compiled
from trainer.tpu_check.topologies import Topology

_TPU_CLAIM = (
  "This says: libtpu's compiler takes the whole replica step (forward, gather, loss, "
  "statistics,\nbackward, optimizer) for this topology, and what it needs. It does not "
  "say: how fast it is, what\nTPU arithmetic gives, that the host keeps up, or that "
  "tf.distribute's TPUStrategy, which wraps\nthe step on the TPU, adds nothing."
)
_GPU_CLAIM = (
  "An estimate: XLA's own analysis of the same step compiled for this CPU. TensorFlow "
  "on a GPU keeps\nother temporaries, and its libraries take some of the memory for "
  "themselves."
)


def global_batch(num_classes: int, num_samples: int) -> str:
  """The global batch of P classes with K samples."""
  total = num_classes * num_samples
  return f"global batch {total} = {num_classes} classes x {num_samples} samples"


def claim(topology: Topology) -> str:
  """What the result says, and what it doesn't."""
  return _GPU_CLAIM if topology.tpu is None else _TPU_CLAIM


def devices(topology: Topology) -> str:
  """One line that says what is compiled for."""
  memory = memory_text(topology.memory_bytes)
  line = f"{topology.name}: {topology.num_replicas} replicas, {memory} each"
  if topology.num_hosts > 1:
    line += f"; that is {topology.num_hosts} hosts, and --strategy=tpu takes one"
  return line


def costs(compiled: Compiled, topology: Topology) -> str:
  """The table of what a replica takes, several lines."""
  share = 100 * compiled.memory_bytes / topology.memory_bytes
  rows = [
    ("memory", f"{memory_text(compiled.memory_bytes)} ({share:.1f} % of the device's)"),
    ("  arguments", memory_text(compiled.arguments_bytes)),
    ("  outputs", memory_text(compiled.outputs_bytes)),
    ("  temporaries", memory_text(compiled.temporaries_bytes)),
    ("  code", memory_text(compiled.code_bytes)),
    ("operations", f"{compiled.flops:.3g} FLOP a step"),
    ("traffic", f"{memory_text(compiled.bytes_accessed)} read and written a step"),
    ("collectives", _collectives(compiled)),
    ("compile time", f"{compiled.compile_s:.1f} s here"),
  ]
  return "\n".join(f"  {name:<15}{value}" for name, value in rows)


def fits(compiled: Compiled, topology: Topology) -> str:
  """The verdict on what compiles and fits, one line."""
  needed = memory_text(compiled.memory_bytes)
  of = memory_text(topology.memory_bytes)
  if topology.tpu is None:
    return f"SHOULD FIT {topology.name}: a replica needs about {needed} of {of}."
  return f"COMPILES for {topology.name}: a replica needs {needed} of {of}."


def too_large(share: float, topology: Topology, largest: Sequence[Array]) -> str:
  """The verdict on what does not fit, with the largest arrays, a line each."""
  needed, of = share * topology.memory_bytes, topology.memory_bytes
  lines = [
    f"DOES NOT FIT {topology.name}: a replica needs {memory_text(needed)} of "
    f"{memory_text(of)}. Its largest arrays:"
  ]
  for array in largest:
    lines.append(f"  {memory_text(array.bytes)} [{array.shape}] of {array.name}")
  return "\n".join(lines)


def memory_text(num_bytes: float) -> str:
  """Bytes in the unit that suits, of 1024."""
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.4g} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.2f} GiB"


def _collectives(compiled: Compiled) -> str:
  if compiled.collectives is None:
    return "not told: JAX can't read this program"
  if not compiled.collectives:
    return "none"
  numbers = Counter(each.name for each in compiled.collectives)
  counted = ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))
  total = sum(each.bytes for each in compiled.collectives)
  return f"{counted}; {memory_text(total)} come to each replica"
