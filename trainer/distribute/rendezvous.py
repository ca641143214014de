"""Workers meet before TensorFlow connects them, and compare what must be alike.

TensorFlow waits for a missing worker without a word, and trains workers of unequal
configurations together. So each worker first tells the chief, on the chief's own port,
who it is and what it has; the chief answers all of them alike, and the port is free
again for TensorFlow. One line of JSON each way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from absl import logging

from trainer.distribute.cluster import Cluster
from trainer.errors import StalledError, UserError

_RETRY_S = 0.2
# A process that was killed may hold its port for a moment.
_PORT_PATIENCE_S = 10.0
# A worker speaks as soon as it is connected; who is silent must not hold up the others.
_SPEECH_S = 5.0
_NUM_SHOWN = 3
# Facts of 1,000 workers are some 100 kB.
_MAX_MESSAGE_BYTES, _PART_BYTES = 4 << 20, 1 << 16
Facts = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Greeting:
  """What a worker sends to the chief.

  Attributes:
    index: number of the worker.
    addresses: of all workers, as it was started.
    facts: what all workers must have alike, by name.
  """

  index: int
  addresses: tuple[str, ...]
  facts: Facts


def meet(cluster: Cluster, facts: Facts, *, timeout_s: float) -> None:
  """Waits for all workers, and checks that their facts are equal.

  Args:
    cluster: who is expected.
    facts: what all workers must have alike, by name.
    timeout_s: how long to wait for the others, seconds.

  Raises:
    UserError: facts differ, two processes say they are the same worker, or this
      worker's port is in use.
    StalledError: somebody did not come in time.
  """
  deadline = time.monotonic() + timeout_s
  with _listen(cluster.address) as listener:
    if cluster.index == 0:
      answer = _receive_all(listener, cluster, facts, deadline, timeout_s)
    else:
      answer = _report(cluster, facts, deadline, timeout_s)
  if answer["error"]:
    raise (UserError if answer["is_mistake"] else StalledError)(answer["error"])


def differences(facts: Sequence[Facts]) -> Optional[str]:
  """What is not alike, in words; None where all is.

  Args:
    facts: of each worker, by name.
  """
  lines = []
  for name in sorted({name for each in facts for name in each}):
    values = [each.get(name, "nothing") for each in facts]
    other = next((i for i, value in enumerate(values) if value != values[0]), None)
    if other is not None:
      lines.append(f"{name} is {values[0]} on worker 0, {values[other]} on {other}")
  if not lines:
    return None
  more = f"; and {len(lines) - _NUM_SHOWN} more" if len(lines) > _NUM_SHOWN else ""
  return f"the workers differ: {'; '.join(lines[:_NUM_SHOWN])}{more}."


def _listen(address: str) -> socket.socket:
  """A socket on this worker's port: the proof that it is free for TensorFlow."""
  port = int(address.rpartition(":")[2])
  deadline = time.monotonic() + _PORT_PATIENCE_S
  while True:
    try:
      return socket.create_server(("", port))
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f"port {port} of this worker, {address}, can't be had ({error.strerror}); "
          "end what uses it, or choose another."
        ) from error
      time.sleep(_RETRY_S)


def _receive_all(
  listener: socket.socket,
  cluster: Cluster,
  facts: Facts,
  deadline: float,
  timeout_s: float,
) -> dict:
  """The chief's part: hears everybody, and answers them."""
  heard: dict[int, Facts] = {0: facts}
  with contextlib.ExitStack() as connections:
    waiting = []
    mistake = None
    while len(heard) < cluster.num_workers and mistake is None:
      greeting = _accept(listener, connections, deadline)
      if greeting is None:
        break
      connection, content = greeting
      waiting.append(connection)
      mistake = _misfit(content, heard, cluster)
      heard[content.index] = content.facts
    missing = sorted(set(range(cluster.num_workers)) - set(heard))
    if mistake is None and not missing:
      mistake = differences([heard[i] for i in range(cluster.num_workers)])
    late = f"{_names(cluster, missing)} did not come within {timeout_s:g} s."
    error = mistake or (late if missing else None)
    answer = {"error": error, "is_mistake": mistake is not None}
    for connection in waiting:
      with contextlib.suppress(OSError):
        _send(connection, answer)
  return answer


def _accept(
  listener: socket.socket, connections: contextlib.ExitStack, deadline: float
) -> Optional[tuple[socket.socket, Greeting]]:
  """Returns the next worker's connection and greeting; None when the time is up."""
  while True:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
      return None
    listener.settimeout(left_s)
    try:
      connection, _ = listener.accept()
      connections.enter_context(connection)
      content = _receive(connection, min(deadline, time.monotonic() + _SPEECH_S))
      return connection, _greeting(content)
    except (OSError, ValueError) as error:
      # Something else connects to the port: health checks do.
      logging.debug("Not a worker: %s", error)


def _greeting(content: dict[str, Any]) -> Greeting:
  """Returns a worker's message, each field checked.

  Raises:
    ValueError: it is not from a worker.
  """
  index, addresses = content.get("index"), content.get("addresses")
  facts = content.get("facts")
  if type(index) is not int or index < 0:
    raise ValueError(f"index {index!r:.40} is no number of a worker")
  if not isinstance(addresses, list) or not _are_texts(addresses):
    raise ValueError("addresses are no list of texts")
  if not isinstance(facts, dict) or not _are_texts(facts.values()):
    raise ValueError("facts are no texts by name")
  return Greeting(index, tuple(addresses), facts)


def _are_texts(values: Iterable[object]) -> bool:
  return all(isinstance(value, str) for value in values)


def _misfit(
  greeting: Greeting, heard: Mapping[int, Facts], cluster: Cluster
) -> Optional[str]:
  if greeting.addresses != cluster.addresses:
    return (
      f"worker {greeting.index} was started with the cluster "
      f"{list(greeting.addresses)}, the chief with {list(cluster.addresses)}."
    )
  if greeting.index >= cluster.num_workers:
    return (
      f"a process says that it is worker {greeting.index} of {cluster.num_workers}, "
      "which are counted from 0."
    )
  if greeting.index in heard:
    return f"two processes say that they are worker {greeting.index}."
  return None


def _send(connection: socket.socket, content: Mapping[str, Any]) -> None:
  connection.settimeout(_SPEECH_S)
  connection.sendall(json.dumps(content).encode() + b"\n")


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any]:
  """Returns the message of whoever connected: one line, a JSON object.

  Raises:
    OSError: it did not come in time.
    ValueError: it is too long, or no JSON object.
  """
  line = bytearray()
  while not line.endswith(b"\n"):
    left_s = deadline - time.monotonic()
    if left_s <= 0:
      raise TimeoutError("no whole line in time")
    connection.settimeout(left_s)
    part = connection.recv(_PART_BYTES)
    line += part
    if not part or len(line) > _MAX_MESSAGE_BYTES:
      raise ValueError(f"no line within {len(line)} bytes")
  try:
    content = json.loads(line)
  except RecursionError as error:
    raise ValueError("its JSON is too deep") from error
  if not isinstance(content, dict):
    raise ValueError("no JSON object")
  return content


def _report(cluster: Cluster, facts: Facts, deadline: float, timeout_s: float) -> dict:
  """A worker's part: tells the chief, and waits for its answer."""
  host, _, port = cluster.addresses[0].rpartition(":")
  content = {
    "index": cluster.index,
    "addresses": list(cluster.addresses),
    "facts": dict(facts),
  }
  while True:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
      late = f"{_names(cluster, [0])} did not come within {timeout_s:g} s."
      return {"error": late, "is_mistake": False}
    with contextlib.suppress(OSError, ValueError):
      return _ask((host.strip("[]"), int(port)), content, left_s)
    time.sleep(_RETRY_S)


def _ask(chief: tuple[str, int], content: dict, left_s: float) -> dict[str, Any]:
  """Sends a greeting to the chief, and returns its answer.

  Raises:
    OSError: there is no chief, or no answer.
    ValueError: the answer is not from a chief.
  """
  with socket.create_connection(chief, left_s) as connection:
    _send(connection, content)
    # The chief waits as long as we do, and tells us who was missing.
    answer = _receive(connection, time.monotonic() + left_s + _PORT_PATIENCE_S)
  error, is_mistake = answer.get("error"), answer.get("is_mistake")
  is_text = "error" in answer and (error is None or isinstance(error, str))
  if not is_text or type(is_mistake) is not bool:
    raise ValueError("not the answer of a chief")
  return {"error": error, "is_mistake": is_mistake}


def _names(cluster: Cluster, indexes: Sequence[int]) -> str:
  names = [f"worker {i} ({cluster.addresses[i]})" for i in indexes[:_NUM_SHOWN]]
  more = f" and {len(indexes) - _NUM_SHOWN} more" if len(indexes) > _NUM_SHOWN else ""
  return ", ".join(names) + more
