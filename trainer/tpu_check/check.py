"""One check: lower, compile, tell; and what to change where it doesn't."""

from __future__ import annotations

from typing import Optional

from trainer.tpu_check import replica_step, report, run_step
from trainer.tpu_check.compiler import CompilationError, Compiled, Compiler
from trainer.tpu_check.run_step import RunStep
from trainer.tpu_check.topologies import Topology


def check(topology: Topology, *, compiler_python: str, is_fitting: bool) -> bool:
  """Checks the step of the config that gin has, and prints what it finds.

  Args:
    topology: the devices.
    compiler_python: path of a Python with JAX and libtpu.
    is_fitting: whether the largest P that fits is searched.

  Returns:
    Whether it compiles and fits.

  Raises:
    UserError: the run's parts don't fit each other or the replicas.
  """
  compiler = Compiler(compiler_python)
  run = run_step.of_run()
  print(report.devices(topology))
  print(f"global batch: {report.Batch(run.num_classes, run.num_samples)}")
  compiled = _compiled(run, run.num_classes, topology, compiler)
  if compiled is not None:
    print(report.costs(compiled, topology))
  print(report.verdict(compiled, topology))
  print(report.claim(topology))
  return compiled is not None and compiled.memory_bytes <= topology.memory_bytes


def _compiled(
  run: RunStep, num_classes: int, topology: Topology, compiler: Compiler
) -> Optional[Compiled]:
  batch = run.replica_batch(num_classes, topology.num_replicas)
  program = replica_step.export(run.step, batch, topology.num_replicas)
  try:
    return compiler.compile(program.hlo, topology)
  except CompilationError:
    return None
