"""A fake task of a worker: prints its cluster index and exits as requested.

The worker FAIL_INDEX exits at once with FAIL_STATUS ("killed" for a signal), FAIL_TIMES
times. The others wait for a signal if a worker fails, otherwise they finish.
"""

import json
import os
import pathlib
import signal
import sys
import time


def end(number, frame):
  print("told to end", flush=True)
  sys.exit(3)


def num_calls(path):
  return len(path.read_text().splitlines()) if path.exists() else 0


def main():
  signal.signal(signal.SIGTERM, end)
  config = json.loads(os.environ["TF_CONFIG"])
  index = config["task"]["index"]
  flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
  print(f"of {config['cluster']['worker']} GPU {visible} {flags}", flush=True)
  calls = pathlib.Path(flags["model_dir"]) / f"calls-{index}"
  with open(calls, "a") as file:
    file.write(f"{os.getpid()}\n")
  if "HANG" in os.environ:
    time.sleep(60)
  if num_calls(calls) > int(os.environ.get("FAIL_TIMES", "0")):
    return
  if str(index) != os.environ["FAIL_INDEX"]:
    time.sleep(60)
  others = range(len(config["cluster"]["worker"]))
  attempt = num_calls(calls)
  while any(num_calls(calls.with_name(f"calls-{i}")) < attempt for i in others):
    time.sleep(0.02)
  if os.environ["FAIL_STATUS"] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  sys.exit(int(os.environ["FAIL_STATUS"]))


if __name__ == "__main__":
  main()
