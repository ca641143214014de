from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.tpu_check import compiler


@pytest.mark.parametrize(
  ("name", "num_replicas", "gib", "num_hosts"),
  [
    ("v2:2x2", 8, 7.48, 1),
    ("v4:2x2x1", 8, 15.25, 1),
    ("v5e:2x4", 8, 15.75, 1),
    ("v5e:4x4", 16, 15.75, 2),
    ("v5p:2x2x2", 8, 95.73, 2),
    ("v6e:1x1", 1, 31.24, 1),
  ],
)
def test_a_tpu_is_named_by_its_chips(name, num_replicas, gib, num_hosts):
  topology = compiler.parse_topology(name)
  assert topology.tpu == name
  assert topology.num_replicas == num_replicas
  assert topology.memory_bytes == int(gib * 2**30)
  assert topology.num_hosts == num_hosts


def test_gpus_are_named_by_their_memory():
  topology = compiler.parse_topology("gpu:4x16GB")
  assert topology.tpu is None
  assert topology.num_replicas == 4
  assert topology.memory_bytes == 16_000_000_000


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v9:2x2", "TPUs are v2, v3"),
    ("v5e-8", "such as v5e:2x4"),
    ("v4:2x2", "each of the 3 axes of v4, for example v4:2x2x1"),
    ("v5e:2x2x2", "v5e:2x2"),
    ("v5e:0x4", "each of the 2 axes"),
    ("gpu:0x16GB", "gpu:4x16GB"),
  ],
)
def test_unknown_device_is_refused_with_the_valid_forms(name, words):
  with pytest.raises(UserError, match=words):
    compiler.parse_topology(name)


def test_memory_limit_is_at_most_that_of_the_chip():
  # v5p: libtpu counts its 95 GB differently.
  others = {k: v for k, v in compiler.VERSIONS.items() if k != "v5p"}
  for version in others.values():
    assert version.replica_gib * version.replicas_per_chip < version.chip_gib
