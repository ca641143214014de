"""One check: lower, compile, tell; and what to change where it doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import tensorflow as tf

from trainer.loop import tpu_limits
from trainer.tpu_check import fit, proposals, refusals, replica_step, report, run_step
from trainer.tpu_check.compiler import Array, CompilationError, Compiled, Compiler
from trainer.tpu_check.run_step import RunStep
from trainer.tpu_check.topologies import Topology


class TooLarge(NamedTuple):
  """A program that does not fit.

  Attributes:
    share: how many times the memory that there is it needs.
    largest: of its arrays.
    compiled: what it needs; None where the compiler did not go on so far.
  """

  share: float
  largest: Sequence[Array]
  compiled: Optional[Compiled]


class Refused(NamedTuple):
  """A program that does not compile.

  Attributes:
    reason: in words.
  """

  reason: str


Result = Union[Compiled, TooLarge, Refused]


def check(topology: Topology, *, compiler_python: str, is_fitting: bool) -> bool:
  """Checks the step of the config that gin has, and prints what it finds.

  Args:
    topology: the devices.
    compiler_python: path of a Python with JAX and libtpu.
    is_fitting: whether the largest P that fits is searched.

  Returns:
    Whether it compiles and fits; with `is_fitting`, whether any P does.

  Raises:
    UserError: the run's parts don't fit each other or the replicas.
  """
  compiler = Compiler(compiler_python)
  run = run_step.of_run()
  if topology.tpu is not None:
    tpu_limits.check(run.step)
  print(report.devices(topology))
  if is_fitting:
    return _fit(run, topology, compiler)
  print(report.global_batch(run.num_classes, run.num_samples))
  result = compile_step(run, run.num_classes, topology, compiler)
  _tell(result, run, topology)
  return isinstance(result, Compiled)


def compile_step(
  run: RunStep, num_classes: int, topology: Topology, compiler: Compiler
) -> Result:
  """What becomes of the step with a batch of so many classes.

  Args:
    run: the step.
    num_classes: P.
    topology: the devices.
    compiler: of their programs.

  Raises:
    UserError: replicas, micro-batches or the loss don't go with so many classes.
  """
  batch = run.replica_batch(num_classes, topology.num_replicas)
  try:
    program = replica_step.export(run.step, batch, topology.num_replicas)
  except (ValueError, tf.errors.OpError) as error:
    refusal = refusals.of_lowering(error)
    if refusal is None:
      raise
    return Refused(str(refusal))
  try:
    compiled = compiler.compile(program.hlo, topology)
  except CompilationError as error:
    share = refusals.needed_share(str(error))
    if share is None:
      return Refused(refusals.of_compiler(str(error)))
    return TooLarge(share, error.largest, None)
  share = compiled.memory_bytes / topology.memory_bytes
  return TooLarge(share, compiled.largest, compiled) if share > 1 else compiled


def _tell(result: Result, run: RunStep, topology: Topology) -> None:
  if isinstance(result, Refused):
    print(f"DOES NOT COMPILE for {topology.name}: {result.reason}")
    return
  compiled = result.compiled if isinstance(result, TooLarge) else result
  if compiled is not None:
    print(report.costs(compiled, topology))
  if isinstance(result, Compiled):
    print(report.fits(result, topology))
    print(report.claim(topology))
    return
  print(report.too_large(result.share, topology, result.largest))
  print("What takes less, each as --gin_param='...':")
  num_replicas = topology.num_replicas
  for line in proposals.proposals(run, num_replicas, result.share, result.largest):
    print(f"  {line}")


def _fit(run: RunStep, topology: Topology, compiler: Compiler) -> bool:
  """Searches the largest P, and tells of each that is tried."""

  def fits(num_classes: int) -> bool:
    result = compile_step(run, num_classes, topology, compiler)
    batch = report.global_batch(num_classes, run.num_samples)
    if isinstance(result, Refused):
      raise CompilationError(result.reason, [])
    if isinstance(result, TooLarge):
      print(f"{batch}: too large, {result.share:.2f} times the memory", flush=True)
      return False
    print(f"{batch}: {report.memory_text(result.memory_bytes)}", flush=True)
    return True

  unit = run.class_unit(topology.num_replicas)
  try:
    found = fit.largest(fits, run.num_classes, unit=unit)
  except CompilationError as error:
    print(f"DOES NOT COMPILE for {topology.name}: {error}")
    return False
  if found is None:
    print(f"NOTHING FITS {topology.name}: not even {unit} classes.")
  else:
    is_end = found >= fit.MAX_FACTOR * max(1, run.num_classes // unit) * unit
    more = "; the search ended there" if is_end else ""
    print(f"LARGEST for {topology.name}: PKSchedule.classes_per_batch = {found}{more}")
  print(report.claim(topology))
  return found is not None
