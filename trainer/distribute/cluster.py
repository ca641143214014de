"""Which workers train together, and which of them this is: from the environment.

Plain Python. `TF_CONFIG` says it on every launcher; under Slurm it is built from what
`srun` sets, without TensorFlow's resolver, which sorts hosts as strings and so swaps
the ranks of node9 and node10.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Mapping
from typing import Any, Callable, Optional

from trainer.errors import UserError

# Below the ports that Linux hands out by itself, 32768 on; a block of 32 for each job.
_FIRST_PORT, _NUM_BLOCKS, _BLOCK = 15000, 500, 32
_LAST_PORT = 65_535


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of a run.

  Attributes:
    addresses: "host:port" of each worker, the chief first.
    index: which of them this is.
  """

  addresses: tuple[str, ...]
  index: int

  @property
  def num_workers(self) -> int:
    """How many there are."""
    return len(self.addresses)

  @property
  def address(self) -> str:
    """Where this worker listens, "host:port"."""
    return self.addresses[self.index]


def find_cluster(environment: Mapping[str, str]) -> Optional[Cluster]:
  """The cluster that the environment describes.

  Args:
    environment: such as `os.environ`.

  Returns:
    From `TF_CONFIG` if it is set, else from Slurm's variables of a step of several
    tasks, else None.

  Raises:
    UserError: what is set is malformed.
  """
  if environment.get("TF_CONFIG", "").strip():
    return from_tf_config(environment["TF_CONFIG"])
  if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
    return from_slurm(environment)
  return None


def from_tf_config(text: str) -> Cluster:
  """The cluster that a `TF_CONFIG` describes.

  Args:
    text: {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker",
      "index": 0}}; a "chief" of one address may stand before the workers.

  Raises:
    UserError: it is no such JSON, an address is there twice, or the task is none of
      the cluster's.
  """
  try:
    content = json.loads(text)
    jobs, task = dict(content["cluster"]), content["task"]
    kind, index = str(task["type"]), int(task["index"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"TF_CONFIG={text!r} is malformed ({type(error).__name__}: {error}); it needs "
      '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", '
      '"index": 0}}.'
    ) from error
  strange = sorted({kind, *jobs} - {"chief", "worker"})
  if strange:
    raise UserError(f"TF_CONFIG has a {strange[0]!r}; only chief and worker train.")
  chiefs, workers = _addresses(jobs, "chief"), _addresses(jobs, "worker")
  own = chiefs if kind == "chief" else workers
  if not 0 <= index < len(own):
    raise UserError(
      f"TF_CONFIG says this is {kind} {index}, but names {len(own)} of that type."
    )
  return Cluster((*chiefs, *workers), index + (len(chiefs) if kind == "worker" else 0))


def _addresses(jobs: Mapping[str, Any], kind: str) -> list[str]:
  addresses = jobs.get(kind, [])
  is_list = isinstance(addresses, (list, tuple))
  for address in addresses if is_list else [addresses]:
    if not (is_list and _is_address(address)):
      raise UserError(f"TF_CONFIG's {kind} has {address!r}, which is no 'host:port'.")
  everyone = [address for each in jobs.values() for address in each or ()]
  twice = [address for address in addresses if everyone.count(address) > 1]
  if twice:
    raise UserError(f"TF_CONFIG names {twice[0]} twice; give each worker its own port.")
  return list(addresses)


def _is_address(address: Any) -> bool:
  match = re.fullmatch(r"\S+:(\d{1,5})", str(address))
  return match is not None and 0 < int(match[1]) <= _LAST_PORT


def from_slurm(
  environment: Mapping[str, str],
  hostnames_fn: Optional[Callable[[str], list[str]]] = None,
) -> Cluster:
  """The cluster of a Slurm step: a worker for each task.

  The ports follow from the job's number and the task's rank.

  Args:
    environment: with what `srun` sets.
    hostnames_fn: from a list as Slurm writes it to the names of its hosts, in order;
      None to ask `scontrol`.

  Raises:
    UserError: a variable is missing, or the tasks are not laid out host by host.
  """
  try:
    hosts = (hostnames_fn or _scontrol_hostnames)(environment["SLURM_STEP_NODELIST"])
    counts = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    node, job = int(environment["SLURM_NODEID"]), int(environment["SLURM_JOB_ID"])
  except KeyError as error:
    raise UserError(f"{error.args[0]} is not set; start the task with srun.") from error
  if len(hosts) != len(counts) or rank != sum(counts[:node]) + local:
    raise UserError(
      f"Slurm's task {rank} is number {local} on node {node} of {hosts}: tasks are not "
      "laid out node by node; use srun --distribution=block."
    )
  first_port = _FIRST_PORT + job % _NUM_BLOCKS * _BLOCK
  places = [host for host, count in zip(hosts, counts) for _ in range(count)]
  addresses = [f"{host}:{first_port + i}" for i, host in enumerate(places)]
  return Cluster(tuple(addresses), rank)


def _tasks_per_node(text: str) -> list[int]:
  """Slurm's "2(x3),1" is [2, 2, 2, 1]."""
  counts: list[int] = []
  for part in text.split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
    if match is None:
      raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not as Slurm writes it.")
    counts.extend([int(match[1])] * int(match[2] or 1))
  return counts


def _scontrol_hostnames(nodes: str) -> list[str]:
  command = ["scontrol", "show", "hostnames", nodes]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise UserError(f"{' '.join(command)} failed: {error}.") from error
  return done.stdout.split()
