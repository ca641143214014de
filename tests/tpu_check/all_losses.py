"""Compiles a tiny step of every loss: python -m tests.tpu_check.all_losses [TOPOLOGY]

With the statistics of the mining, which take most of the time. A quarter of an hour;
./launch/tpu_check.sh makes the compiler that it needs.
"""

from __future__ import annotations

import sys

from tests.tpu_check.replica_program_test import STEPS, lowered
from trainer.losses.mining_statistics import MiningStatistics
from trainer.tpu_check import compile_check
from trainer.tpu_check import compiler as compiler_lib
from trainer.tpu_check.compiler import Compiler


def main(topology_name: str = "v5e:2x2") -> None:
  topology = compiler_lib.parse_topology(topology_name)
  compiler = Compiler(".venv-tpu/bin/python")
  print(f"| loss | memory on {topology.name} | compile time |\n|---|---|---|")
  for name, make_loss in STEPS.items():
    hlo = lowered(make_loss, topology.num_replicas, MiningStatistics())
    compiled = compiler.compile(hlo, topology)
    memory = compile_check.memory_text(compiled.memory_bytes)
    print(f"| {name} | {memory} | {compiled.compile_s:.0f} s |", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
