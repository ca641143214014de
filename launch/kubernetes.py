r"""Prints the Kubernetes manifest of a run, for `kubectl apply -f -`.

  python launch/kubernetes.py RUN.gin --image=IMAGE --num_workers=4 --gpus=8 \
    --volume=CLAIM:/data --model_dir=/data/runs/mine

The manifest has one indexed Job with one pod per worker, and a headless service that
names the pods. By default each failed pod is restarted separately. With --jobset all
workers restart together, by the JobSet controller, which must be installed. --sweep
makes pods that share the points of a sweep file. Exit statuses 3 and 4 restart, 2 and 5
fail the job. The file and the folders are those of the image and the volumes. Other
flags are the task's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

_PORT = 12345
_CONTAINER = "trainer"
_INDEX = "batch.kubernetes.io/job-completion-index"
# Exit statuses of a container, for the controller; see trainer/errors.py.
_FAILS, _SWEEP_FAILS = (2, 5), (1, 2)


def main(arguments) -> int:
  """Prints the manifest."""
  options, task_flags = _parse(arguments)
  worker = _pod(options, task_flags)
  kind = _job_set if options.jobset else _job
  manifest = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [_service(options), kind(options, worker)],
  }
  json.dump(manifest, sys.stdout, indent=2)
  print()
  return 0


def _parse(arguments):
  """Parses the options and the flags of the task; refuses invalid ones."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run", metavar="RUN.gin")
  parser.add_argument("--image", required=True)
  parser.add_argument("--name", help="of the job [that of the file]")
  parser.add_argument("--namespace", default="default")
  parser.add_argument("--num_workers", type=int, default=1)
  parser.add_argument("--gpus", type=int, default=0, help="of each worker")
  parser.add_argument("--cpus", help="of each worker, such as 8")
  parser.add_argument("--memory", help="of each worker, such as 32Gi")
  parser.add_argument("--volume", action="append", default=[], metavar="CLAIM:/PATH")
  parser.add_argument("--max_restarts", type=int, default=20)
  parser.add_argument("--jobset", action="store_true", help="restart all together")
  parser.add_argument("--sweep", action="store_true", help="RUN.gin is a sweep file")
  # Check before argparse finds problems itself, so that each error is one line.
  parser.error = _fail
  options, rest = parser.parse_known_args(arguments)
  options.name = options.name or re.sub(r".*/|\.gin$", "", options.run).replace(
    "_", "-"
  )
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", options.name):
    _fail(
      f"--name={options.name} must be lower-case letters, digits and '-', up to 42."
    )
  for name in ("num_workers", "max_restarts"):
    if getattr(options, name) < 1:
      _fail(f"--{name}={getattr(options, name)} must be at least 1.")
  for volume in options.volume:
    if not re.fullmatch(r"[a-z0-9.-]+:/.+", volume):
      _fail(f"--volume={volume} is not CLAIM:/PATH.")
  if options.sweep and options.jobset:
    _fail("--jobset is for a run: a sweep's workers start again one by one.")
  if not options.sweep and not any(f.startswith("--model_dir=") for f in rest):
    _fail("--model_dir=FOLDER is missing; take one on a --volume, or it is lost.")
  return options, rest


def _job(options, pod):
  return {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": _metadata(options, options.name),
    "spec": _job_spec(options, pod),
  }


def _job_spec(options, pod):
  """Returns the spec of an indexed Job: one pod per worker, with exit-status rules."""
  fails = _SWEEP_FAILS if options.sweep else _FAILS
  # Workers of a sweep are independent: if one fails, the others continue.
  action = "FailIndex" if options.sweep else "FailJob"
  limit = "backoffLimitPerIndex" if options.sweep else "backoffLimit"
  rules = [
    {"action": action, "onExitCodes": _exit_codes(fails)},
    # The node was drained or preempted: do not count this as a failure.
    {
      "action": "Ignore",
      "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
  ]
  if not options.jobset:
    rules.append({"action": "Ignore", "onExitCodes": _exit_codes((3,))})
    rules.append({"action": "Count", "onExitCodes": _exit_codes((4,))})
  return {
    "completionMode": "Indexed",
    "completions": options.num_workers,
    "parallelism": options.num_workers,
    # Under a JobSet one failed pod ends the Job, and the JobSet restarts all pods.
    limit: 0 if options.jobset else options.max_restarts,
    "podReplacementPolicy": "Failed",
    "podFailurePolicy": {"rules": rules},
    "template": pod,
  }


def _job_set(options, pod):
  """Returns a JobSet: failures other than user errors restart all workers."""
  replicated = {
    "name": "workers",
    "replicas": 1,
    "template": {"spec": _job_spec(options, pod)},
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": _metadata(options, options.name),
    "spec": {
      "network": {"enableDNSHostnames": False},
      "failurePolicy": {
        "maxRestarts": options.max_restarts,
        "rules": [
          {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        ],
      },
      "replicatedJobs": [replicated],
    },
  }


def _service(options):
  """Returns the headless service that names each pod, also before it is ready."""
  return {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": _metadata(options, options.name),
    "spec": {
      "clusterIP": "None",
      "publishNotReadyAddresses": True,
      "selector": {"app": options.name},
      "ports": [{"name": "workers", "port": _PORT}],
    },
  }


def _pod(options, task_flags):
  """Returns the template of a worker's pod."""
  volumes = [volume.split(":", 1) for volume in options.volume]
  container = {
    "name": _CONTAINER,
    "image": options.image,
    "command": _command(options, task_flags),
    "env": _environment(options),
    "ports": [{"containerPort": _PORT}],
    "resources": _resources(options),
    "volumeMounts": [{"name": claim, "mountPath": path} for claim, path in volumes],
  }
  return {
    "metadata": {"labels": {"app": options.name}},
    "spec": {
      "restartPolicy": "Never",
      "subdomain": options.name,
      # Time to save a checkpoint when the node is preempted.
      "terminationGracePeriodSeconds": 120,
      "containers": [container],
      "volumes": [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim}}
        for claim, _ in volumes
      ],
    },
  }


def _command(options, task_flags):
  if options.sweep:
    return ["python", "-m", "trainer.sweep", options.run, *task_flags]
  mode = (
    [] if any(f.startswith("--mode=") for f in task_flags) else ["train_and_evaluate"]
  )
  return [
    *("python", "-m", "trainer.task", f"--gin_file={options.run}"),
    *(f"--mode={name}" for name in mode),
    *task_flags,
  ]


def _environment(options):
  """Returns the pod's number, and TF_CONFIG, which Kubernetes completes from it."""
  if options.sweep or options.num_workers == 1:
    return []
  job = f"{options.name}-workers-0" if options.jobset else options.name
  workers = [f"{job}-{i}.{options.name}:{_PORT}" for i in range(options.num_workers)]
  cluster = json.dumps({"worker": workers})
  task = '{"type": "worker", "index": $(WORKER_INDEX)}'
  field = {"fieldPath": f"metadata.annotations['{_INDEX}']"}
  return [
    {"name": "WORKER_INDEX", "valueFrom": {"fieldRef": field}},
    {"name": "TF_CONFIG", "value": f'{{"cluster": {cluster}, "task": {task}}}'},
  ]


def _resources(options):
  asked = {"cpu": options.cpus, "memory": options.memory}
  asked["nvidia.com/gpu"] = str(options.gpus) if options.gpus else None
  limits = {name: value for name, value in asked.items() if value}
  return {"limits": limits} if limits else {}


def _exit_codes(values):
  return {"containerName": _CONTAINER, "operator": "In", "values": list(values)}


def _metadata(options, name):
  return {"name": name, "namespace": options.namespace, "labels": {"app": options.name}}


def _fail(message):
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
