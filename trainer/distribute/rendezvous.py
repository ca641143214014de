"""Workers meet before TensorFlow connects them, and compare what must be alike.

TensorFlow waits for a missing worker without a word, and trains workers of unequal
configurations together. So each worker first tells the chief, on the chief's own port,
who it is and what it has; the chief answers all of them alike, and the port is free
again for TensorFlow. One line of JSON each way.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Optional

from absl import logging

from trainer.distribute.cluster import Cluster
from trainer.errors import StalledError, UserError

_RETRY_S = 0.2
# A process that was killed may hold its port for a moment.
_PORT_PATIENCE_S = 10.0
# A worker speaks as soon as it is connected; who is silent must not hold up the others.
_SPEECH_S = 5.0
_NUM_SHOWN = 3
Facts = Mapping[str, str]


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
      stream, content = greeting
      waiting.append(stream)
      mistake = _misfit(content, heard, cluster)
      heard[content["index"]] = content["facts"]
    missing = sorted(set(range(cluster.num_workers)) - set(heard))
    if mistake is None and not missing:
      mistake = differences([heard[i] for i in range(cluster.num_workers)])
    late = f"{_names(cluster, missing)} did not come within {timeout_s:g} s."
    error = mistake or (late if missing else None)
    answer = {"error": error, "is_mistake": mistake is not None}
    for stream in waiting:
      with contextlib.suppress(OSError):
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
  return answer


def _accept(listener, connections, deadline):
  """The next worker's stream and greeting; None when the time is up."""
  while True:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
      return None
    listener.settimeout(left_s)
    try:
      connection, _ = listener.accept()
      connection.settimeout(_SPEECH_S)
      connections.enter_context(connection)
      stream = connections.enter_context(connection.makefile("rw", encoding="utf-8"))
      content = json.loads(stream.readline())
      return stream, {"index": int(content["index"]), **content}
    except (OSError, ValueError, KeyError, TypeError) as error:
      # Something else knocks on the port: health checks do.
      logging.debug("Not a worker: %s", error)


def _misfit(content: dict, heard: Mapping[int, Facts], cluster: Cluster):
  if content["addresses"] != list(cluster.addresses):
    return (
      f"worker {content['index']} was started with the cluster "
      f"{content['addresses']}, the chief with {list(cluster.addresses)}."
    )
  if content["index"] in heard:
    return f"two processes say that they are worker {content['index']}."
  return None


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


def _ask(chief: tuple[str, int], content: dict, left_s: float) -> dict:
  with socket.create_connection(chief, left_s) as connection:
    # The chief waits as long as we do, and tells us who was missing.
    connection.settimeout(left_s + _PORT_PATIENCE_S)
    with connection.makefile("rw", encoding="utf-8") as stream:
      stream.write(json.dumps(content) + "\n")
      stream.flush()
      return json.loads(stream.readline())


def _names(cluster: Cluster, indexes: Sequence[int]) -> str:
  names = [f"worker {i} ({cluster.addresses[i]})" for i in indexes[:_NUM_SHOWN]]
  more = f" and {len(indexes) - _NUM_SHOWN} more" if len(indexes) > _NUM_SHOWN else ""
  return ", ".join(names) + more
