"""The manifests: contents, and validity under the published Kubernetes schemas."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import kubernetes_validate
import pytest

from trainer import errors
from trainer.distribute import cluster

ROOT = pathlib.Path(__file__).parents[2]
VERSIONS = ("1.31", "1.33", "1.37")
RUN = ("configs/runs/digits.gin", "--image=trainer:1", "--model_dir=/data/run")
KINDS = {
  "one": RUN,
  "gpus": (*RUN, "--num_workers=4", "--gpus=8", "--cpus=8", "--memory=32Gi"),
  "volumes": (*RUN, "--num_workers=2", "--volume=nfs:/data", "--volume=own:/own"),
  "jobset": (*RUN, "--num_workers=4", "--jobset"),
  "sweep": (*RUN, "--num_workers=8", "--sweep"),
}


def _run(*flags):
  return subprocess.run(
    [sys.executable, str(ROOT / "launch" / "kubernetes.py"), *flags],
    capture_output=True,
    text=True,
    timeout=60,
  )


def _items(kind):
  """Returns the service and the job; for a JobSet, the Job in its template."""
  done = _run(*KINDS[kind])
  assert done.returncode == 0, done.stderr
  service, job = json.loads(done.stdout)["items"]
  if job["kind"] == "JobSet":
    [replicated] = job["spec"]["replicatedJobs"]
    job = {**job, "apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
  return service, job


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_manifest_matches_the_published_schemas(kind, version):
  for item in _items(kind):
    assert kubernetes_validate.validate(item, version, strict=True) == version


def test_misspelt_field_does_not_match_the_schema():
  _, job = _items("one")
  job["spec"]["backofLimit"] = 3
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", ["gpus", "jobset"])
def test_tf_config_of_each_pod_has_the_service_names_of_all(kind):
  service, job = _items(kind)
  spec = job["spec"]["template"]["spec"]
  index, config = spec["containers"][0]["env"]
  assert index["name"] == "WORKER_INDEX"
  found = [
    cluster.from_tf_config(config["value"].replace("$(WORKER_INDEX)", str(i)))
    for i in range(4)
  ]
  assert [each.index for each in found] == [0, 1, 2, 3]
  # Host names of the pods of an indexed Job are the Job's name and the pod's index.
  name = "digits-workers-0" if kind == "jobset" else "digits"
  port = service["spec"]["ports"][0]["port"]
  expected = tuple(f"{name}-{i}.digits:{port}" for i in range(4))
  assert {each.addresses for each in found} == {expected}
  assert spec["subdomain"] == service["metadata"]["name"] == "digits"
  labels = job["spec"]["template"]["metadata"]["labels"]
  assert service["spec"]["selector"].items() <= labels.items()


def _actions(job):
  rules = job["spec"]["podFailurePolicy"]["rules"]
  return {
    status: rule["action"]
    for rule in rules
    for status in rule.get("onExitCodes", {}).get("values", ())
  }


def test_exit_statuses_are_configured_in_the_controller():
  preempted, stalled = errors.PreemptedError, errors.StalledError
  mistake, not_finite = errors.UserError, errors.NotFiniteError
  _, job = _items("gpus")
  assert _actions(job) == {
    mistake.exit_status: "FailJob",
    not_finite.exit_status: "FailJob",
    preempted.exit_status: "Ignore",
    stalled.exit_status: "Count",
  }
  _, sweep = _items("sweep")
  assert _actions(sweep)[mistake.exit_status] == "FailIndex"


def test_jobset_restarts_all_unless_the_failure_policy_applies():
  job_set = json.loads(_run(*KINDS["jobset"]).stdout)["items"][1]
  assert job_set["spec"]["failurePolicy"] == {
    "maxRestarts": 20,
    "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
  }
  [replicated] = job_set["spec"]["replicatedJobs"]
  assert replicated["template"]["spec"]["backoffLimit"] == 0


def test_gpus_and_volumes_are_requested():
  _, job = _items("gpus")
  container = job["spec"]["template"]["spec"]["containers"][0]
  limits = {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "8"}
  assert container["resources"]["limits"] == limits
  _, job = _items("volumes")
  spec = job["spec"]["template"]["spec"]
  mounts = {m["name"]: m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
  assert mounts == {"nfs": "/data", "own": "/own"}
  claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"]]
  assert claims == ["nfs", "own"]


def test_flags_of_the_task_reach_the_command():
  done = _run(*RUN, "--gin_param=A.b = 'c d'", "--mode=train")
  command = json.loads(done.stdout)["items"][1]["spec"]["template"]["spec"][
    "containers"
  ][0]["command"]
  assert command == [
    *("python", "-m", "trainer.task", "--gin_file=configs/runs/digits.gin"),
    *("--model_dir=/data/run", "--gin_param=A.b = 'c d'", "--mode=train"),
  ]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ((), "required: RUN.gin, --image"),
    ((RUN[0], RUN[1]), "--model_dir=FOLDER is missing"),
    ((*RUN, "--num_workers=0"), "--num_workers=0 must be at least 1"),
    ((*RUN, "--num_workers=x"), "invalid int value: 'x'"),
    ((*RUN, "--volume=nfs"), "--volume=nfs is not CLAIM:/PATH"),
    ((*RUN, "--name=Mine"), "--name=Mine must be lower-case"),
    ((*RUN, "--sweep", "--jobset"), "--jobset is for a run"),
  ],
)
def test_user_error_is_one_line(flags, words):
  done = _run(*flags)
  assert done.returncode == 2
  [line] = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert words in line


def test_dockerfile_copies_what_exists_and_installs_wheels_only():
  lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
  copied = [word for x in lines if x.startswith("COPY") for word in x.split()[1:-1]]
  assert copied
  assert [path for path in copied if not (ROOT / path).exists()] == []
  assert not any("apt-get" in line for line in lines)
