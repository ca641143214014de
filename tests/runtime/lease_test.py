"""Leases of folders for one writer, on one machine or several."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from trainer.data import ingestion
from trainer.data.records import RecordIndex
from trainer.data.sources.source import Item
from trainer.errors import UserError
from trainer.runtime import filesystem, lease
from trainer.runtime.lease import Lease, holding_lease


@pytest.fixture(params=["here", "elsewhere"])
def folder(request, tmp_path):
  """A local folder and a remote one."""
  name = re.sub("[^a-z0-9]+", "-", request.node.name)
  path = str(tmp_path) if request.param == "here" else f"ram://claims-{name}"
  filesystem.make_folder(path)
  return path


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
  monkeypatch.setattr(lease, "_TOUCH_S", 0.05)
  monkeypatch.setattr(lease, "_POLL_S", 0.01)
  monkeypatch.setattr(lease, "_EXPIRY_S", 1.0)


def _claims(folder):
  return [
    name for name in filesystem.list_folder(folder) if name.startswith(".in-use-")
  ]


def _put(folder, name="other", **changes):
  """Writes the claim of another process, by default on another machine; its path."""
  own = Lease("other", "another machine", 7, "yesterday", "training in")
  content = json.dumps({**dataclasses.asdict(own), **changes})
  path = f"{folder}/.in-use-{name}.json"
  filesystem.write_bytes(path, content.encode())
  return path


@pytest.fixture
def process():
  with subprocess.Popen(["sleep", "60"]) as running:
    yield running
    running.kill()


def test_folder_is_claimed_only_while_it_is_used(folder):
  for _ in range(2):
    with holding_lease(folder, "training in"):
      assert len(_claims(folder)) == 1
    assert not _claims(folder)


def test_running_local_process_is_named_immediately(folder, process):
  _put(folder, host="mine", machine=lease._machine(), pid=process.pid)
  words = f"process {process.pid} of mine is training in {folder} since yesterday; "
  with pytest.raises(UserError, match=words), holding_lease(folder, "training in"):
    pass
  assert _claims(folder) == [".in-use-other.json"]


def test_active_process_on_another_machine_is_named(folder):
  path = _put(folder)
  is_over = threading.Event()
  own = lease._OwnLease(folder, "training in")
  own.path = path
  own._lease = Lease("other", "another machine", 7, "yesterday", "training in")
  thread = threading.Thread(target=lease._touch, args=(own, is_over))
  thread.start()
  try:
    words = "process 7 of other"
    with pytest.raises(UserError, match=words), holding_lease(folder, "training in"):
      pass
  finally:
    is_over.set()
    thread.join()


def test_claim_of_an_exited_local_process_is_ignored_immediately(
  folder, process, caplog, monkeypatch
):
  monkeypatch.setattr(lease, "_EXPIRY_S", 3600.0)
  process.kill()
  process.wait()
  for pid in (
    process.pid,
    os.getpid(),
    2**80,
  ):  # Containers have separate pid namespaces.
    _put(folder, str(pid), machine=lease._machine(), pid=pid)
  with holding_lease(folder, "training in"):
    assert len(_claims(folder)) == 1
  assert caplog.text.count("of an ended process") == 3


def test_old_claim_is_ignored_although_its_pid_is_reused(
  tmp_path, process, monkeypatch
):
  path = _put(tmp_path, machine=lease._machine(), pid=process.pid)
  os.utime(path, (time.time() - 3600,) * 2)
  monkeypatch.setattr(lease, "_EXPIRY_S", 1800.0)
  with holding_lease(str(tmp_path), "training in"):
    assert not os.path.exists(path)


def test_inactive_claim_of_another_machine_expires(folder, monkeypatch):
  path = _put(folder)
  monkeypatch.setattr(lease, "_EXPIRY_S", 0.2)
  start_s = time.monotonic()
  with holding_lease(folder, "training in"):
    assert not filesystem.exists(path)
  assert time.monotonic() - start_s > 0.15


@pytest.mark.parametrize(
  "content", [b"", b"[1]", b'{"pid": "x"}', b"\xff", b" " * 10**5]
)
def test_empty_claim_expires(folder, content, monkeypatch):
  monkeypatch.setattr(lease, "_EXPIRY_S", 0.1)
  filesystem.write_bytes(f"{folder}/.in-use-x.json", content)
  with holding_lease(folder, "training in"):
    assert len(_claims(folder)) == 1


def test_manually_removed_claim_is_restored(folder):
  with holding_lease(folder, "training in"):
    [name] = _claims(folder)
    filesystem.remove(f"{folder}/{name}")
    end_s = time.monotonic() + 20
    while _claims(folder) != [name]:
      assert time.monotonic() < end_s
      time.sleep(0.01)


def test_at_most_one_of_many_concurrent_processes_has_the_folder(folder):
  """Threads stand for other machines."""
  start, inside, seen = threading.Barrier(8), [], []

  def come():
    start.wait()
    try:
      with holding_lease(folder, "training in"):
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.3)
        inside.pop()
    except UserError:
      pass

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "_machine", lambda: f"machine {threading.get_ident()}")
    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert max(seen, default=0) <= 1
  assert not _claims(folder)


@pytest.mark.parametrize("round_number", range(3))
def test_exactly_one_thread_of_a_process_has_the_folder(folder, round_number):
  """Concurrent threads are refused, and no claim is considered stale."""
  del round_number
  start, refused, inside = threading.Barrier(6), [], []
  all_came = threading.Event()

  def come():
    start.wait()
    try:
      with holding_lease(folder, "writing into"):
        inside.append(1)
        assert all_came.wait(30)
    except UserError as error:
      refused.append(str(error))
    if len(refused) == 5:
      all_came.set()

  threads = [threading.Thread(target=come) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(inside) == 1
  assert len(refused) == 5
  assert all(f"process {os.getpid()} of " in line for line in refused)
  assert not _claims(folder)


def test_unsettled_claim_yields_to_one_with_a_smaller_name(folder):
  path = _put(folder, "zzz", machine=lease._machine(), pid=1, is_settled=False)
  gone = threading.Timer(0.2, lambda: filesystem.remove(path))
  gone.start()
  with holding_lease(folder, "writing into"):
    assert len(_claims(folder)) == 1
  gone.join()


def test_unsettled_claim_with_the_smallest_name_is_kept(folder):
  _put(folder, "", machine=lease._machine(), pid=1, is_settled=False)
  with (
    pytest.raises(UserError, match="process 1 of other"),
    holding_lease(folder, "writing into"),
  ):
    pass


def test_unwritable_folder_is_read_without_a_claim(tmp_path, monkeypatch):
  def refuse(path, content):
    raise OSError(errno.EROFS, "Read-only file system", path)

  monkeypatch.setattr(filesystem, "replace_file", refuse)
  with lease.locked_folder(str(tmp_path), "indexing"):
    assert not _claims(str(tmp_path))


def test_checking_a_lock_does_not_release_it(tmp_path):
  path = str(tmp_path / "lock")
  with lease.try_lock(path):
    pass
  is_over = threading.Event()

  def look():
    while not is_over.is_set():
      lease.is_locked(path)

  threads = [threading.Thread(target=look) for _ in range(2)]
  for thread in threads:
    thread.start()
  lost = 0
  for _ in range(500):
    file = lease.try_lock(path)
    lost += file is None
    if file is not None:
      file.close()
  is_over.set()
  for thread in threads:
    thread.join()
  assert lost == 0


def test_held_lock_is_detected_and_refused(tmp_path):
  path = str(tmp_path / "lock")
  assert not lease.is_locked(path)
  with lease.try_lock(path):
    assert lease.is_locked(path)
    assert lease.try_lock(path) is None
  assert not lease.is_locked(path)


def test_file_system_without_locks_is_reported(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lease.fcntl, "flock", refuse)
  path = str(tmp_path / "lock")
  with pytest.raises(UserError, match=r"can't be locked \(No locks available"):
    lease.try_lock(path)
  with lease.locked_folder(str(tmp_path), "embedding into"):  # Needs no lock.
    assert len(_claims(str(tmp_path))) == 1


_SCRIPT = """
import sys
from trainer.runtime import lease
lease._TOUCH_S = 0.05
with lease.holding_lease(sys.argv[1], "training in"):
  print("in", flush=True)
  sys.stdin.read()
"""


def test_suspended_process_is_stopped_after_its_lease_was_taken(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", _SCRIPT, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as first:
    assert first.stdout.readline() == "in\n"
    first.send_signal(19)  # SIGSTOP
    time.sleep(1.1)
    with holding_lease(str(tmp_path), "training in"):
      first.send_signal(18)  # SIGCONT
      assert first.wait(20) == 2
    words = first.stderr.read()
  assert "error: this process was suspended and its lease expired: process" in words


def test_second_writer_of_remote_data_is_refused_naming_the_first():
  folder = "ram://claimed-data"
  items = [
    Item(str(n), f"class {n % 2}", features={"vector": [float(n)]}) for n in range(8)
  ]

  def write():
    ingestion.write_records(items, folder, records_per_shard=5, fingerprint={})

  filesystem.make_folder(folder)
  path = _put(
    folder, machine=lease._machine(), pid=os.getppid(), doing="ingesting into"
  )
  with pytest.raises(UserError, match="is ingesting into ram://claimed-data since"):
    write()
  filesystem.remove(path)
  write()
  assert RecordIndex.open(folder).num_records == 8
  assert not _claims(folder)
