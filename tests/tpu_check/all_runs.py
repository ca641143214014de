"""Compiles every run file for a TPU: python -m tests.tpu_check.all_runs [TOPOLOGY]

Prints the table of trainer/tpu_check/README.md. Minutes; ./launch/tpu_check.sh makes
the compiler that it needs.
"""

from __future__ import annotations

import pathlib
import sys

from trainer import gin_registrations  # noqa: F401  Registers what the files name.
from trainer.config import run_config
from trainer.errors import UserError
from trainer.tpu_check import compile_check, replica_program
from trainer.tpu_check import compiler as compiler_lib
from trainer.tpu_check.compiler import Compiler

_COLUMNS = ("run file", "P x K", "memory", "FLOP", "collectives", "compile time")


def main(topology_name: str = "v5e:2x2") -> None:
  topology = compiler_lib.parse_topology(topology_name)
  compiler = Compiler(".venv-tpu/bin/python")
  print(f"{topology.name}, memory and FLOP of a replica and step\n")
  _print_row(_COLUMNS)
  _print_row("---" for _ in _COLUMNS)
  for path in sorted(pathlib.Path("configs/runs").glob("*.gin")):
    run_config.load([str(path)], needed=("train",))
    try:
      run = replica_program.build_run_step(topology.num_replicas)
    except UserError as error:
      print(f"| {path.name} | {error} |")
      continue
    # The largest divisible P below: above it there may be too few classes.
    num_classes = run.num_classes - run.num_classes % topology.num_replicas
    batch = run.replica_batch(num_classes, topology.num_replicas)
    program = replica_program.export_program(run.step, batch, topology.num_replicas)
    compiled = compiler.compile(program.hlo, topology)
    _print_row(
      (
        path.name,
        f"{num_classes} x {run.num_samples}",
        compile_check.memory_text(compiled.memory_bytes),
        f"{compiled.flops:.2e}",
        "not available"
        if compiled.collectives is None
        else str(len(compiled.collectives)),
        f"{compiled.compile_s:.0f} s",
      )
    )


def _print_row(cells) -> None:
  print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
