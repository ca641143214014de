"""Handshake of workers: complete, with a missing worker, with a different worker."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import pytest

from trainer.distribute.cluster import (
  Cluster,
  differences,
  find_cluster,
  from_slurm,
  wait_for_workers,
)
from trainer.errors import StalledError, UserError


def free_addresses(num):
  """Returns addresses of this machine on which no process listens."""
  sockets = [socket.create_server(("", 0)) for _ in range(num)]
  ports = [each.getsockname()[1] for each in sockets]
  for each in sockets:
    each.close()
  return tuple(f"127.0.0.1:{port}" for port in ports)


def _meet(addresses, fingerprints, *, indexes=None, timeout_s=20.0):
  """Returns the error of each worker, or None."""
  indexes = range(len(addresses)) if indexes is None else indexes

  def one(index, fingerprint):
    try:
      wait_for_workers(Cluster(addresses, index), fingerprint, timeout_s=timeout_s)
    except (UserError, StalledError) as error:
      return error
    return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, indexes, fingerprints))


def test_identical_workers_form_a_cluster():
  assert _meet(free_addresses(3), [{"x": "1"}] * 3) == [None] * 3


def test_ports_are_released_after_the_handshake():
  addresses = free_addresses(2)
  for _ in range(2):
    assert _meet(addresses, [{}, {}]) == [None, None]


def test_every_worker_reports_the_facts_that_differ():
  fingerprints = [
    {"train.margin": "0.2"},
    {"train.margin": "0.2"},
    {"train.margin": "0.3"},
  ]
  errors = _meet(free_addresses(3), fingerprints)
  assert all(isinstance(error, UserError) for error in errors)
  expected = "the workers differ: train.margin is 0.2 on worker 0, 0.3 on 2."
  assert [str(error) for error in errors] == [expected] * 3


def test_missing_fact_on_one_worker_is_a_difference():
  assert "numpy is nothing on worker 0, 2 on 1" in differences([{}, {"numpy": "2"}])


def test_missing_worker_is_reported_to_the_other_workers():
  addresses = free_addresses(3)
  errors = _meet(addresses, [{}, {}], indexes=[0, 2], timeout_s=1.0)
  assert all(isinstance(error, StalledError) for error in errors)
  expected = f"worker 1 ({addresses[1]}) did not connect within 1 s."
  assert [str(error) for error in errors] == [expected] * 2


def test_missing_chief_is_reported():
  [error] = _meet(free_addresses(2), [{}], indexes=[1], timeout_s=0.5)
  assert isinstance(error, StalledError)
  assert "worker 0" in str(error)


def _connect(address):
  host, port = address.split(":")
  deadline = time.monotonic() + 20
  while True:
    try:
      return socket.create_connection((host, int(port)))
    except OSError:
      assert time.monotonic() < deadline


def test_duplicate_worker_is_refused():
  addresses = free_addresses(3)
  greeting = {"index": 1, "addresses": addresses, "fingerprint": {}}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]) as one, _connect(addresses[0]) as other:
      for connection in (one, other):
        connection.sendall(json.dumps(greeting).encode() + b"\n")
      assert str(chief.exception()) == "two processes report that they are worker 1."


def test_workers_of_different_clusters_are_refused():
  chief, one, other = free_addresses(3)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    meeting = pool.submit(
      wait_for_workers, Cluster((chief, one), 0), {}, timeout_s=20.0
    )
    pool.submit(wait_for_workers, Cluster((chief, other), 1), {}, timeout_s=20.0)
    error = meeting.exception()
  assert isinstance(error, UserError)
  assert "was started with the cluster" in str(error)


def test_connections_of_other_programs_are_ignored():
  addresses = free_addresses(2)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]) as stranger:
      stranger.sendall(b"GET / HTTP/1.0\n")
    wait_for_workers(Cluster(addresses, 1), {}, timeout_s=20.0)
    assert chief.exception() is None


_STRANGERS = (
  b'{"index": 1}',
  b'{"index": 1, "addresses": [], "fingerprint": null}',
  b'{"index": "1", "addresses": ["a:1"], "fingerprint": {}}',
  b'{"index": true, "addresses": ["a:1"], "fingerprint": {}}',
  b'{"index": Infinity, "addresses": ["a:1"], "fingerprint": {}}',
  b'{"index": -1, "addresses": ["a:1"], "fingerprint": {}}',
  b'{"index": 1, "addresses": [[]], "fingerprint": {}}',
  b'{"index": 1, "addresses": ["a:1"], "fingerprint": {"x": {}}}',
  b"[1]",
  b"null",
  b"[" * 100_000,
  b"\xff\xfe",
  b"",
)


def test_messages_that_are_not_from_a_worker_are_ignored(monkeypatch):
  monkeypatch.setattr("trainer.distribute.cluster._MESSAGE_TIMEOUT_S", 5.0)
  addresses = free_addresses(2)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    for message in _STRANGERS:
      with _connect(addresses[0]) as stranger:
        stranger.sendall(message + b"\n")
    wait_for_workers(Cluster(addresses, 1), {}, timeout_s=20.0)
    assert chief.exception() is None


def test_worker_index_out_of_range_is_refused():
  addresses = free_addresses(2)
  greeting = {"index": 2, "addresses": addresses, "fingerprint": {}}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]) as stranger:
      stranger.sendall(json.dumps(greeting).encode() + b"\n")
      error = chief.exception()
  assert isinstance(error, UserError)
  assert "it is worker 2 of 2" in str(error)


def test_unterminated_line_is_abandoned(monkeypatch):
  monkeypatch.setattr("trainer.distribute.cluster._MAX_MESSAGE_BYTES", 1000)
  addresses = free_addresses(2)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]) as stranger:
      stranger.sendall(b"x" * 2000)
      wait_for_workers(Cluster(addresses, 1), {}, timeout_s=20.0)
    assert chief.exception() is None


def test_slow_sender_is_abandoned(monkeypatch):
  monkeypatch.setattr("trainer.distribute.cluster._MESSAGE_TIMEOUT_S", 0.3)
  addresses = free_addresses(2)
  is_over = threading.Event()

  def drip(stranger):
    with contextlib.suppress(OSError):
      while not is_over.wait(0.05):
        stranger.sendall(b"x")

  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]) as stranger:
      dripping = pool.submit(drip, stranger)
      try:
        wait_for_workers(Cluster(addresses, 1), {}, timeout_s=10.0)
        assert chief.exception() is None
      finally:
        is_over.set()
        dripping.result()


@pytest.mark.parametrize(
  "answer", [b"[]", b"{}", b'{"error": 1, "is_user_error": true}']
)
def test_worker_retries_after_an_answer_not_from_a_chief(answer):
  addresses = free_addresses(2)
  server = socket.create_server(("127.0.0.1", int(addresses[0].split(":")[1])))
  with server, concurrent.futures.ThreadPoolExecutor() as pool:
    worker = pool.submit(wait_for_workers, Cluster(addresses, 1), {}, timeout_s=20.0)
    for line in (answer, b'{"error": null, "is_user_error": false}'):
      connection, _ = server.accept()
      with connection:
        connection.sendall(line + b"\n")
    assert worker.exception() is None


def test_silent_connection_does_not_block_the_workers(monkeypatch):
  monkeypatch.setattr("trainer.distribute.cluster._MESSAGE_TIMEOUT_S", 0.2)
  addresses = free_addresses(2)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    chief = pool.submit(wait_for_workers, Cluster(addresses, 0), {}, timeout_s=20.0)
    with _connect(addresses[0]):
      start_s = time.monotonic()
      wait_for_workers(Cluster(addresses, 1), {}, timeout_s=20.0)
      assert time.monotonic() - start_s < 10
    assert chief.exception() is None


def test_port_in_use_is_reported(monkeypatch):
  monkeypatch.setattr("trainer.distribute.cluster._PORT_TIMEOUT_S", 0.0)
  with socket.create_server(("", 0)) as taken:
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=f"of this worker, {address}, is not available"):
      wait_for_workers(Cluster((address, "127.0.0.1:1"), 0), {}, timeout_s=1.0)


_SLURM = {
  "SLURM_STEP_NUM_TASKS": "3",
  "SLURM_STEP_NODELIST": "node[9-10]",
  "SLURM_STEP_TASKS_PER_NODE": "2,1",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
  "SLURM_NODEID": "1",
  "SLURM_JOB_ID": "7",
}


def _tf_config(cluster, kind="worker", index=0):
  task = {"type": kind, "index": index}
  return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def _hostnames(nodes):
  assert nodes == "node[9-10]"
  return ["node9", "node10"]


def test_no_cluster_without_environment_variables():
  assert find_cluster({}) is None
  assert find_cluster({"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_worker_indices_follow_the_order_of_tf_config():
  environment = _tf_config({"worker": ["a:1", "b:2"]}, index=1)
  assert find_cluster(environment) == Cluster(("a:1", "b:2"), 1)


def test_chief_has_index_zero():
  cluster = {"worker": ["b:2", "c:3"], "chief": ["a:1"]}
  assert find_cluster(_tf_config(cluster, "worker", 1)).address == "c:3"
  assert find_cluster(_tf_config(cluster, "chief")).index == 0


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ({"TF_CONFIG": "{"}, "malformed"),
    ({"TF_CONFIG": "[]"}, "malformed"),
    ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, "malformed .KeyError: 'task'"),
    (_tf_config({"worker": ["a:1", "a:1"]}), "names a:1 twice"),
    (_tf_config({"worker": ["a:1"], "chief": ["a:1"]}), "names a:1 twice"),
    (_tf_config({"worker": ["a"]}), "'a', which is not 'host:port'"),
    (_tf_config({"worker": ["a:99999"]}), "'a:99999', which is not 'host:port'"),
    (_tf_config({"chief": ["a:1"], "worker": None}), "worker has None, which is not"),
    (_tf_config({"worker": None, "chief": 3}), "has 3, which is not 'host:port'"),
    (_tf_config({"worker": ["a:1"]}, kind=[]), "has a '..'; remove it: only chief"),
    (_tf_config({"worker": ["a:1"]}, index=None), "malformed .TypeError"),
    (_tf_config({"worker": "a:1"}), "'a:1', which is not"),
    (_tf_config({"worker": ["a:1"]}, index=1), "worker 1, but has 1 addresses"),
    (_tf_config({"worker": ["a:1"]}, index=-1), "has 1 addresses of that type"),
    (_tf_config({"worker": ["a:1"], "ps": ["b:1"]}), "only chief and worker train"),
    (_tf_config({"worker": ["a:1"]}, kind="evaluator"), "has a 'evaluator'"),
  ],
)
def test_invalid_tf_config_is_refused(environment, message):
  with pytest.raises(UserError, match=message):
    find_cluster(environment)


def test_slurm_tasks_are_numbered_by_node_in_the_order_of_slurm():
  cluster = from_slurm(_SLURM, _hostnames)
  assert cluster.index == 2
  assert [address.split(":")[0] for address in cluster.addresses] == [
    "node9",
    "node9",
    "node10",
  ]
  assert len({address.split(":")[1] for address in cluster.addresses}) == 3


def test_concurrent_slurm_jobs_use_different_ports():
  one, other = (
    from_slurm({**_SLURM, "SLURM_JOB_ID": job}, _hostnames) for job in ("7", "8")
  )
  assert not set(one.addresses) & set(other.addresses)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"SLURM_PROCID": "1"}, "--distribution=block"),
    ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "is malformed; it needs a form"),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, "--distribution=block"),
  ],
)
def test_unsupported_layout_of_slurm_tasks_is_refused(changed, message):
  with pytest.raises(UserError, match=message):
    from_slurm({**_SLURM, **changed}, _hostnames)


def test_missing_slurm_variable_is_named():
  environment = {k: v for k, v in _SLURM.items() if k != "SLURM_LOCALID"}
  with pytest.raises(UserError, match="SLURM_LOCALID is not set; start the task with"):
    from_slurm(environment, _hostnames)


def test_missing_slurm_is_reported(monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(UserError, match="scontrol show hostnames"):
    find_cluster(_SLURM)
