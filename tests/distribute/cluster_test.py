"""Which workers there are: from TF_CONFIG, from Slurm, and what is refused."""

from __future__ import annotations

import json

import pytest

from trainer.distribute.cluster import Cluster, find_cluster, from_slurm
from trainer.errors import UserError

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


def test_without_a_word_there_is_no_cluster():
  assert find_cluster({}) is None
  assert find_cluster({"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_workers_are_numbered_as_tf_config_lists_them():
  environment = _tf_config({"worker": ["a:1", "b:2"]}, index=1)
  assert find_cluster(environment) == Cluster(("a:1", "b:2"), 1)


def test_a_chief_comes_before_the_workers():
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
    (_tf_config({"worker": ["a"]}), "'a', which is no 'host:port'"),
    (_tf_config({"worker": ["a:99999"]}), "'a:99999', which is no 'host:port'"),
    (_tf_config({"chief": ["a:1"], "worker": None}), "worker has None, which is no"),
    (_tf_config({"worker": None, "chief": 3}), "has 3, which is no 'host:port'"),
    (_tf_config({"worker": ["a:1"]}, kind=[]), "has a '..'; only chief and worker"),
    (_tf_config({"worker": ["a:1"]}, index=None), "malformed .TypeError"),
    (_tf_config({"worker": "a:1"}), "'a:1', which is no"),
    (_tf_config({"worker": ["a:1"]}, index=1), "worker 1, but names 1 of that type"),
    (_tf_config({"worker": ["a:1"]}, index=-1), "names 1 of that type"),
    (_tf_config({"worker": ["a:1"], "ps": ["b:1"]}), "only chief and worker train"),
    (_tf_config({"worker": ["a:1"]}, kind="evaluator"), "has a 'evaluator'"),
  ],
)
def test_a_tf_config_that_does_not_fit_is_refused(environment, message):
  with pytest.raises(UserError, match=message):
    find_cluster(environment)


def test_slurm_tasks_are_numbered_node_by_node_as_slurm_orders_them():
  cluster = from_slurm(_SLURM, _hostnames)
  assert cluster.index == 2
  assert [address.split(":")[0] for address in cluster.addresses] == [
    "node9",
    "node9",
    "node10",
  ]
  assert len({address.split(":")[1] for address in cluster.addresses}) == 3


def test_slurm_jobs_side_by_side_have_other_ports():
  one, other = (
    from_slurm({**_SLURM, "SLURM_JOB_ID": job}, _hostnames) for job in ("7", "8")
  )
  assert not set(one.addresses) & set(other.addresses)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"SLURM_PROCID": "1"}, "--distribution=block"),
    ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "not as Slurm writes it"),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, "--distribution=block"),
  ],
)
def test_slurm_tasks_of_another_layout_are_refused(changed, message):
  with pytest.raises(UserError, match=message):
    from_slurm({**_SLURM, **changed}, _hostnames)


def test_a_slurm_variable_that_is_missing_is_named():
  environment = {k: v for k, v in _SLURM.items() if k != "SLURM_LOCALID"}
  with pytest.raises(UserError, match="SLURM_LOCALID is not set; start the task with"):
    from_slurm(environment, _hostnames)


def test_a_machine_without_slurm_says_so(monkeypatch):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(UserError, match="scontrol show hostnames"):
    find_cluster(_SLURM)
