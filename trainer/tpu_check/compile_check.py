"""Checks whether a step compiles and fits, and suggests what to change if not.

Shapes: B examples of a replica, R replicas, P classes of the global batch.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional, Union

import tensorflow as tf

from trainer.models.layers import batch_norms, has_synchronized_batch_norm
from trainer.tpu_check import replica_program
from trainer.tpu_check.compiler import (
  Array,
  CompilationError,
  Compiled,
  Compiler,
  Topology,
)
from trainer.tpu_check.replica_program import RunStep
from trainer.training import checks

# Limit of the search, as a multiple of the initial P.
MAX_FACTOR = 64

_TPU_CLAIM = (
  "Checked: libtpu's compiler accepts the whole replica step (forward, gather, loss, "
  "statistics,\nbackward, optimizer) for this topology, and its memory. Not checked: "
  "speed, TPU arithmetic, the\ninput pipeline, and the operations that "
  "tf.distribute's TPUStrategy adds around the step."
)
_GPU_CLAIM = (
  "An estimate: XLA's analysis of the same step compiled for this CPU. TensorFlow on a "
  "GPU keeps other\ntemporaries, and its libraries reserve some of the memory."
)

_OPERATION = re.compile(r"(\w+) \(No registered '\w+' OpKernel.*?\{\{node ([^}]+)\}\}")
_LINE = re.compile(r'^File "([^"]+)", line (\d+), in ', re.MULTILINE)
_LIBRARIES = re.compile(r"[/\\](site|dist)-packages[/\\]|^<")
_TOO_LARGE = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
_MAX_LENGTH = 300

_PYTHON = "Python runs on the host only: use TensorFlow operations"
_HOST = "move it to the dataset's decoder or augmentation, which run on the host"
# By the prefix of an operation's name.
_ADVICE = {
  "EagerPyFunc": _PYTHON,
  "PyFunc": _PYTHON,
  "Print": "remove tf.print from the step",
  "String": "strings (as of tf.print) need the host: remove them from the step",
  "Decode": _HOST,
  "Encode": _HOST,
  "ImageProjective": _HOST,
  "Unique": "the shape of its result is unknown at compile time: use a mask instead",
  "Where": "the shape of its result is unknown at compile time: use a mask instead",
}
_OTHER_ADVICE = f"use other operations, or {_HOST}"

_ROWS_PER_TILE = 128


def largest_fitting_batch(
  fits: Callable[[int], bool], start: int, *, unit: int
) -> Optional[int]:
  """Returns the largest multiple of a unit that fits, if all smaller ones do.

  Args:
    fits: returns whether a number fits.
    start: first number to try, rounded down to a multiple, or up to the first.
    unit: only its multiples are possible.

  Returns:
    The number, at most `MAX_FACTOR` times the start; None if not even the unit fits.
  """
  first = max(1, start // unit)
  last = first * MAX_FACTOR
  below, above = 0, first
  while above <= last and fits(above * unit):
    below, above = above, 2 * above
  above = min(above, last + 1)
  while above - below > 1:
    middle = (below + above) // 2
    if fits(middle * unit):
      below = middle
    else:
      above = middle
  return below * unit or None


def global_batch_text(num_classes: int, num_samples: int) -> str:
  """Describes the global batch of P classes with K samples."""
  total = num_classes * num_samples
  return f"global batch {total} = {num_classes} classes x {num_samples} samples"


def claim_text(topology: Topology) -> str:
  """Describes what the result shows and what it does not."""
  return _GPU_CLAIM if topology.tpu is None else _TPU_CLAIM


def devices_text(topology: Topology) -> str:
  """Describes the devices in one line."""
  memory = memory_text(topology.memory_bytes)
  line = f"{topology.name}: {topology.num_replicas} replicas, {memory} each"
  if topology.num_hosts > 1:
    line += f"; that is {topology.num_hosts} hosts, but --strategy=tpu supports one"
  return line


def costs_text(compiled: Compiled, topology: Topology) -> str:
  """Returns a table of the needs of one replica, several lines."""
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


def fits_text(compiled: Compiled, topology: Topology) -> str:
  """Returns the verdict on a step that compiles and fits, one line."""
  needed = memory_text(compiled.memory_bytes)
  of = memory_text(topology.memory_bytes)
  if topology.tpu is None:
    return f"SHOULD FIT {topology.name}: a replica needs about {needed} of {of}."
  return f"COMPILES for {topology.name}: a replica needs {needed} of {of}."


def too_large_text(share: float, topology: Topology, largest: Sequence[Array]) -> str:
  """Returns the verdict on a step that does not fit, with one line per large array."""
  needed, of = share * topology.memory_bytes, topology.memory_bytes
  lines = [
    f"DOES NOT FIT {topology.name}: a replica needs {memory_text(needed)} of "
    f"{memory_text(of)}. Its largest arrays:"
  ]
  for array in largest:
    lines.append(f"  {memory_text(array.bytes)} [{array.shape}] of {array.name}")
  return "\n".join(lines)


def memory_text(num_bytes: float) -> str:
  """Formats bytes in the appropriate unit of 1024."""
  for unit in ("B", "KiB", "MiB"):
    if num_bytes < 1024:
      return f"{num_bytes:.4g} {unit}"
    num_bytes /= 1024
  return f"{num_bytes:.2f} GiB"


def _collectives(compiled: Compiled) -> str:
  if compiled.collectives is None:
    return "not available: JAX can't read this program"
  if not compiled.collectives:
    return "none"
  numbers = Counter(each.name for each in compiled.collectives)
  counted = ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))
  total = sum(each.bytes for each in compiled.collectives)
  return f"{counted}; each replica receives {memory_text(total)}"


class UnsupportedOperation(NamedTuple):
  """An operation that XLA does not compile.

  Attributes:
    operation: its type, such as "DecodeJpeg".
    node: its name, which starts with those of its layers.
    line: file and line that created it, the innermost outside libraries; None if
      unknown.
  """

  operation: str
  node: str
  line: Optional[str]

  def __str__(self):
    layer = self.node.rpartition("/")[0] or "no layer"
    place = f", {self.line}" if self.line else ""
    matching = [
      text for start, text in _ADVICE.items() if self.operation.startswith(start)
    ]
    advice = matching[0] if matching else _OTHER_ADVICE
    return f"XLA has no {self.operation} (in {layer}{place}); {advice}."


def find_unsupported_operation(error: Exception) -> Optional[UnsupportedOperation]:
  """Returns the operation that could not be lowered; None for other errors.

  Args:
    error: raised by `replica_program.export_program`.
  """
  message = str(error)
  operation = _OPERATION.search(message)
  if operation is None:
    return None
  # Each operation is followed by its own calls, innermost last.
  calls = message[operation.end() :].split("(No registered", 1)[0]
  own_calls = [call for call in _LINE.findall(calls) if not _LIBRARIES.search(call[0])]
  line = (
    f"{pathlib.Path(own_calls[-1][0]).name}, line {own_calls[-1][1]}"
    if own_calls
    else None
  )
  return UnsupportedOperation(operation[1], operation[2], line)


def needed_share(message: str) -> Optional[float]:
  """Returns the memory a program needs relative to the available memory.

  Args:
    message: error message of libtpu.

  Returns:
    More than 1; None if the message is about something else.
  """
  sizes = _TOO_LARGE.search(message)
  return None if sizes is None else float(sizes[1]) / float(sizes[2])


def shorten_message(message: str) -> str:
  """Returns the compiler's message, shortened to one line."""
  line = " ".join(message.split())
  return line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]} ..."


def suggest_changes(
  run: RunStep, num_replicas: int, share: float, largest: Sequence[Array]
) -> list[str]:
  """Returns bindings that need less memory, each with its effect, best first.

  Args:
    run: a step that does not fit.
    num_replicas: R.
    share: memory needed relative to the available memory.
    largest: the largest arrays of its program.
  """
  changes = []
  is_of_encoder = [f"{run.step.encoder.name}/" in array.name for array in largest]
  if any(is_of_encoder):
    changes += [*_micro_batches(run, num_replicas, share), *_precision(run)]
  if not all(is_of_encoder):
    changes.append(
      f"{type(run.step.loss).__name__}.rows_per_tile = {_ROWS_PER_TILE}: compares that "
      "many anchors at a time with all candidates; the same result"
    )
  return [*changes, *_smaller_batch(run, num_replicas, share)]


def _micro_batches(run: RunStep, num_replicas: int, share: float) -> list[str]:
  size = run.num_classes * run.num_samples // num_replicas
  current = run.step.options.num_micro_batches
  # Leave a margin for memory that does not shrink with the micro-batch.
  smallest = current * max(2, math.ceil(share * 1.25))
  divisors = [n for n in range(smallest, size + 1) if size % n == 0]
  if not divisors or has_synchronized_batch_norm(run.step.encoder):
    return []
  result = (
    "batch normalisation then uses micro-batches"
    if batch_norms(run.step.encoder)
    else "the same result"
  )
  return [
    f"StepOptions.num_micro_batches = {divisors[0]}: gradient caching, one more "
    f"forward pass; {result}"
  ]


def _precision(run: RunStep) -> list[str]:
  if getattr(run.step.encoder, "precision", None) != "float32":
    return []
  return [
    "Encoder.precision = 'mixed_bfloat16': half the memory for the backbone's "
    "activations, with 8 bits of precision"
  ]


def _smaller_batch(run: RunStep, num_replicas: int, share: float) -> list[str]:
  unit = run.class_unit(num_replicas)
  fewer = int(run.num_classes / share) // unit * unit
  if not 0 < fewer < run.num_classes:
    return []
  return [
    f"PKSampler.classes_per_batch = {fewer}: a smaller P, with fewer negatives; --fit "
    "searches the largest"
  ]


class TooLarge(NamedTuple):
  """A program that does not fit.

  Attributes:
    share: memory needed relative to the available memory.
    largest: the largest of its arrays.
    compiled: its needs; None if the compiler stopped earlier.
  """

  share: float
  largest: Sequence[Array]
  compiled: Optional[Compiled]


class DoesNotCompile(NamedTuple):
  """A program that does not compile.

  Attributes:
    reason: as text.
  """

  reason: str


Result = Union[Compiled, TooLarge, DoesNotCompile]


def check(topology: Topology, *, compiler_python: str, is_fitting: bool) -> bool:
  """Checks the step of the current gin config, and prints the result.

  Args:
    topology: the devices.
    compiler_python: path of a Python with JAX and libtpu.
    is_fitting: whether to search for the largest P that fits.

  Returns:
    Whether it compiles and fits; with `is_fitting`, whether any P does.

  Raises:
    UserError: the run's parts do not fit each other or the replicas.
  """
  compiler = Compiler(compiler_python)
  run = replica_program.build_run_step(topology.num_replicas)
  if topology.tpu is not None:
    checks.check_tpu_limits(run.step)
  print(devices_text(topology))
  if is_fitting:
    return _find_largest_fit(run, topology, compiler)
  print(global_batch_text(run.num_classes, run.num_samples))
  result = compile_step(run, run.num_classes, topology, compiler)
  _print_result(result, run, topology)
  return isinstance(result, Compiled)


def compile_step(
  run: RunStep, num_classes: int, topology: Topology, compiler: Compiler
) -> Result:
  """Compiles the step with a batch of some number of classes.

  Args:
    run: the step.
    num_classes: P.
    topology: the devices.
    compiler: compiles programs for the devices.

  Raises:
    UserError: replicas, micro-batches or the loss do not support this number of
      classes.
  """
  batch = run.replica_batch(num_classes, topology.num_replicas)
  try:
    program = replica_program.export_program(run.step, batch, topology.num_replicas)
  except (ValueError, tf.errors.OpError) as error:
    unsupported = find_unsupported_operation(error)
    if unsupported is None:
      raise
    return DoesNotCompile(str(unsupported))
  try:
    compiled = compiler.compile(program.hlo, topology)
  except CompilationError as error:
    share = needed_share(str(error))
    if share is None:
      return DoesNotCompile(shorten_message(str(error)))
    return TooLarge(share, error.largest, None)
  share = compiled.memory_bytes / topology.memory_bytes
  return TooLarge(share, compiled.largest, compiled) if share > 1 else compiled


def _print_result(result: Result, run: RunStep, topology: Topology) -> None:
  if isinstance(result, DoesNotCompile):
    print(f"DOES NOT COMPILE for {topology.name}: {result.reason}")
    return
  compiled = result.compiled if isinstance(result, TooLarge) else result
  if compiled is not None:
    print(costs_text(compiled, topology))
  if isinstance(result, Compiled):
    print(fits_text(result, topology))
    print(claim_text(topology))
    return
  print(too_large_text(result.share, topology, result.largest))
  print("Settings that need less memory, each as --gin_param='...':")
  num_replicas = topology.num_replicas
  for line in suggest_changes(run, num_replicas, result.share, result.largest):
    print(f"  {line}")


def _find_largest_fit(run: RunStep, topology: Topology, compiler: Compiler) -> bool:
  """Searches for the largest P that fits, and reports each attempt."""

  def fits(num_classes: int) -> bool:
    result = compile_step(run, num_classes, topology, compiler)
    batch = global_batch_text(num_classes, run.num_samples)
    if isinstance(result, DoesNotCompile):
      raise CompilationError(result.reason, [])
    if isinstance(result, TooLarge):
      print(f"{batch}: too large, {result.share:.2f} times the memory", flush=True)
      return False
    print(f"{batch}: {memory_text(result.memory_bytes)}", flush=True)
    return True

  unit = run.class_unit(topology.num_replicas)
  try:
    largest = largest_fitting_batch(fits, run.num_classes, unit=unit)
  except CompilationError as error:
    print(f"DOES NOT COMPILE for {topology.name}: {error}")
    return False
  if largest is None:
    print(f"NOTHING FITS {topology.name}: not even {unit} classes.")
  else:
    is_end = largest >= MAX_FACTOR * max(1, run.num_classes // unit) * unit
    more = "; the search ended there" if is_end else ""
    print(f"LARGEST for {topology.name}: PKSampler.classes_per_batch = {largest}{more}")
  print(claim_text(topology))
  return largest is not None
