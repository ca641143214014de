"""The cluster of workers: addresses from the environment, and the rendezvous.

TensorFlow waits for a missing worker without a message, and trains workers of unequal
configurations together. Therefore each worker first sends its index and fingerprints to
the chief, on the chief's own port. The chief sends the same reply to all workers and
releases the port for TensorFlow. Each message is one line of JSON.

Plain Python, without TensorFlow. Every launcher sets `TF_CONFIG`. Under Slurm the
cluster is built from the variables that `srun` sets. TensorFlow's resolver is not used:
it sorts hosts as strings and so swaps the ranks of node9 and node10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

from absl import logging

from trainer.errors import StalledError, UserError

_RETRY_S = 0.2
# A killed process may hold its port for a moment.
_PORT_TIMEOUT_S = 10.0
# A worker sends at once when connected; a silent connection must not block the others.
_MESSAGE_TIMEOUT_S = 5.0
_NUM_SHOWN = 3
# The fingerprints of 1,000 workers take about 100 kB.
_MAX_MESSAGE_BYTES, _PART_BYTES = 4 << 20, 1 << 16
# Below Linux's ephemeral ports, from 32768 on; a block of 32 for each job.
_FIRST_PORT, _NUM_BLOCKS, _BLOCK = 15000, 500, 32
_LAST_PORT = 65_535
Fingerprint = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class WorkerMessage:
  """Message from a worker to the chief.

  Attributes:
    index: number of the worker.
    addresses: of all workers, as given to this worker.
    fingerprint: values that must be equal on all workers, by name.
  """

  index: int
  addresses: tuple[str, ...]
  fingerprint: Fingerprint


def wait_for_workers(
  cluster: Cluster, fingerprint: Fingerprint, *, timeout_s: float
) -> None:
  """Waits for all workers, and checks that their fingerprints are equal.

  Args:
    cluster: the expected workers.
    fingerprint: values that must be equal on all workers, by name.
    timeout_s: limit of the wait for the others, seconds.

  Raises:
    UserError: the fingerprints differ, two processes have the same index, or this
      worker's port is in use.
    StalledError: a worker did not arrive in time.
  """
  deadline = time.monotonic() + timeout_s
  with _listen(cluster.address) as listener:
    if cluster.index == 0:
      reply = _receive_all(listener, cluster, fingerprint, deadline, timeout_s)
    else:
      reply = _report_to_chief(cluster, fingerprint, deadline, timeout_s)
  if reply["error"]:
    raise (UserError if reply["is_user_error"] else StalledError)(reply["error"])


def differences(fingerprints: Sequence[Fingerprint]) -> Optional[str]:
  """Describes how fingerprints differ; returns None if all are equal.

  Args:
    fingerprints: of each worker, by name.
  """
  lines = []
  for name in sorted({name for each in fingerprints for name in each}):
    values = [each.get(name, "nothing") for each in fingerprints]
    other = next((i for i, value in enumerate(values) if value != values[0]), None)
    if other is not None:
      lines.append(f"{name} is {values[0]} on worker 0, {values[other]} on {other}")
  if not lines:
    return None
  more = f"; and {len(lines) - _NUM_SHOWN} more" if len(lines) > _NUM_SHOWN else ""
  return f"the workers differ: {'; '.join(lines[:_NUM_SHOWN])}{more}."


def _listen(address: str) -> socket.socket:
  """Opens a socket on this worker's port, which proves that TensorFlow can use it."""
  port = int(address.rpartition(":")[2])
  deadline = time.monotonic() + _PORT_TIMEOUT_S
  while True:
    try:
      return socket.create_server(("", port))
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f"port {port} of this worker, {address}, is not available "
          f"({error.strerror}); end the process that uses it, or choose another port."
        ) from error
      time.sleep(_RETRY_S)


def _receive_all(
  listener: socket.socket,
  cluster: Cluster,
  fingerprint: Fingerprint,
  deadline: float,
  timeout_s: float,
) -> dict:
  """Receives the messages of all workers on the chief, and replies to them."""
  fingerprints: dict[int, Fingerprint] = {0: fingerprint}
  with contextlib.ExitStack() as connections:
    waiting = []
    conflict = None
    while len(fingerprints) < cluster.num_workers and conflict is None:
      message = _accept(listener, connections, deadline)
      if message is None:
        break
      connection, content = message
      waiting.append(connection)
      conflict = _find_conflict(content, fingerprints, cluster)
      fingerprints[content.index] = content.fingerprint
    missing = sorted(set(range(cluster.num_workers)) - set(fingerprints))
    if conflict is None and not missing:
      conflict = differences([fingerprints[i] for i in range(cluster.num_workers)])
    timeout_error = (
      f"{_names(cluster, missing)} did not connect within {timeout_s:g} s."
    )
    error = conflict or (timeout_error if missing else None)
    reply = {"error": error, "is_user_error": conflict is not None}
    for connection in waiting:
      with contextlib.suppress(OSError):
        _send(connection, reply)
  return reply


def _accept(
  listener: socket.socket, connections: contextlib.ExitStack, deadline: float
) -> Optional[tuple[socket.socket, WorkerMessage]]:
  """Returns the next worker's connection and message; None after the deadline."""
  while True:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
      return None
    listener.settimeout(remaining_s)
    try:
      connection, _ = listener.accept()
      connections.enter_context(connection)
      content = _receive(
        connection, min(deadline, time.monotonic() + _MESSAGE_TIMEOUT_S)
      )
      return connection, _parse_message(content)
    except (OSError, ValueError) as error:
      # Other clients may connect to the port, such as health checks.
      logging.debug("Ignored a message that is not from a worker: %s", error)


def _parse_message(content: dict[str, Any]) -> WorkerMessage:
  """Returns a worker's message with each field checked.

  Raises:
    ValueError: the message is not from a worker.
  """
  index, addresses = content.get("index"), content.get("addresses")
  fingerprint = content.get("fingerprint")
  if type(index) is not int or index < 0:
    raise ValueError(f"index {index!r:.40} is not a worker number")
  if not isinstance(addresses, list) or not _are_texts(addresses):
    raise ValueError("addresses is not a list of strings")
  if not isinstance(fingerprint, dict) or not _are_texts(fingerprint.values()):
    raise ValueError("the fingerprint has a value that is not a string")
  return WorkerMessage(index, tuple(addresses), fingerprint)


def _are_texts(values: Iterable[object]) -> bool:
  return all(isinstance(value, str) for value in values)


def _find_conflict(
  message: WorkerMessage, fingerprints: Mapping[int, Fingerprint], cluster: Cluster
) -> Optional[str]:
  if message.addresses != cluster.addresses:
    return (
      f"worker {message.index} was started with the cluster "
      f"{list(message.addresses)}, the chief with {list(cluster.addresses)}."
    )
  if message.index >= cluster.num_workers:
    return (
      f"a process reports that it is worker {message.index} of {cluster.num_workers}; "
      "workers are numbered from 0."
    )
  if message.index in fingerprints:
    return f"two processes report that they are worker {message.index}."
  return None


def _send(connection: socket.socket, content: Mapping[str, Any]) -> None:
  connection.settimeout(_MESSAGE_TIMEOUT_S)
  connection.sendall(json.dumps(content).encode() + b"\n")


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
  """Returns the message of a connection: one line, a JSON object.

  Raises:
    OSError: it did not arrive in time.
    ValueError: it is too long, or not a JSON object.
  """
  line = bytearray()
  while not line.endswith(b"\n"):
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
      raise TimeoutError("no complete line in time")
    connection.settimeout(remaining_s)
    part = connection.recv(_PART_BYTES)
    line += part
    if not part or len(line) > _MAX_MESSAGE_BYTES:
      raise ValueError(f"no line within {len(line)} bytes")
  try:
    content = json.loads(line)
  except RecursionError as error:
    raise ValueError("its JSON is too deep") from error
  if not isinstance(content, dict):
    raise ValueError("not a JSON object")
  return content


def _report_to_chief(
  cluster: Cluster, fingerprint: Fingerprint, deadline: float, timeout_s: float
) -> dict:
  """Sends a message of this worker to the chief, and waits for the reply."""
  host, _, port = cluster.addresses[0].rpartition(":")
  content = {
    "index": cluster.index,
    "addresses": list(cluster.addresses),
    "fingerprint": dict(fingerprint),
  }
  while True:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
      reason = f"{_names(cluster, [0])} did not answer within {timeout_s:g} s."
      return {"error": reason, "is_user_error": False}
    with contextlib.suppress(OSError, ValueError):
      return _exchange((host.strip("[]"), int(port)), content, remaining_s)
    time.sleep(_RETRY_S)


def _exchange(
  chief: tuple[str, int], content: dict, remaining_s: float
) -> dict[str, Any]:
  """Sends a message to the chief, and returns its reply.

  Raises:
    OSError: there is no chief, or no reply.
    ValueError: the reply is not from a chief.
  """
  with socket.create_connection(chief, remaining_s) as connection:
    _send(connection, content)
    # The chief waits as long as this worker, and reports who was missing.
    reply = _receive(connection, time.monotonic() + remaining_s + _PORT_TIMEOUT_S)
  error, is_user_error = reply.get("error"), reply.get("is_user_error")
  is_text = "error" in reply and (error is None or isinstance(error, str))
  if not is_text or type(is_user_error) is not bool:
    raise ValueError("the reply is not from a chief")
  return {"error": error, "is_user_error": is_user_error}


def _names(cluster: Cluster, indexes: Sequence[int]) -> str:
  names = [f"worker {i} ({cluster.addresses[i]})" for i in indexes[:_NUM_SHOWN]]
  more = f" and {len(indexes) - _NUM_SHOWN} more" if len(indexes) > _NUM_SHOWN else ""
  return ", ".join(names) + more


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers of a run.

  Attributes:
    addresses: "host:port" of each worker, the chief first.
    index: number of this worker.
  """

  addresses: tuple[str, ...]
  index: int

  @property
  def num_workers(self) -> int:
    """Number of workers."""
    return len(self.addresses)

  @property
  def address(self) -> str:
    """Address of this worker, "host:port"."""
    return self.addresses[self.index]


def find_cluster(environment: Mapping[str, str]) -> Optional[Cluster]:
  """Returns the cluster described by the environment.

  Args:
    environment: such as `os.environ`.

  Returns:
    The cluster of `TF_CONFIG` if it is set; else of Slurm's variables of a step with
    several tasks; else None.

  Raises:
    UserError: a variable is malformed.
  """
  if environment.get("TF_CONFIG", "").strip():
    return from_tf_config(environment["TF_CONFIG"])
  if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
    return from_slurm(environment)
  return None


def from_tf_config(text: str) -> Cluster:
  """Returns the cluster described by a `TF_CONFIG`.

  Args:
    text: {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker",
      "index": 0}}; a "chief" with one address may precede the workers.

  Raises:
    UserError: the JSON is invalid, an address occurs twice, or the task is not in the
      cluster.
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
    raise UserError(
      f"TF_CONFIG has a {strange[0]!r}; remove it: only chief and worker train."
    )
  chiefs, workers = _addresses(jobs, "chief"), _addresses(jobs, "worker")
  own = chiefs if kind == "chief" else workers
  if not 0 <= index < len(own):
    raise UserError(
      f"TF_CONFIG names this process {kind} {index}, but has {len(own)} addresses of "
      "that type."
    )
  return Cluster((*chiefs, *workers), index + (len(chiefs) if kind == "worker" else 0))


def _addresses(jobs: Mapping[str, Any], kind: str) -> list[str]:
  addresses = jobs.get(kind, [])
  is_list = isinstance(addresses, (list, tuple))
  for address in addresses if is_list else [addresses]:
    if not (is_list and _is_address(address)):
      raise UserError(f"TF_CONFIG's {kind} has {address!r}, which is not 'host:port'.")
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
  """Returns the cluster of a Slurm step, with one worker per task.

  The ports follow from the job's number and the task's rank.

  Args:
    environment: with the variables that `srun` sets.
    hostnames_fn: expands Slurm's list of hosts to their names, in order; None to call
      `scontrol`.

  Raises:
    UserError: a variable is missing, or the tasks are not assigned host by host.
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
  """Parses Slurm's format: "2(x3),1" is [2, 2, 2, 1]."""
  counts: list[int] = []
  for part in text.split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
    if match is None:
      raise UserError(
        f"SLURM_STEP_TASKS_PER_NODE={text!r} is malformed; it needs a form such as "
        "'2(x3),1'."
      )
    counts.extend([int(match[1])] * int(match[2] or 1))
  return counts


def _scontrol_hostnames(nodes: str) -> list[str]:
  command = ["scontrol", "show", "hostnames", nodes]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    raise UserError(f"{' '.join(command)} failed: {error}.") from error
  return done.stdout.split()
