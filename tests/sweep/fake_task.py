"""A fast replacement of `trainer.task` in sweeps, which fails on request.

It makes a step every STEP_S seconds, logs loss 1 / (step x margin) and measures the
margin as MAP@R. EXIT_STATUS ends it at step 2, once; CRASH_ABOVE is a margin that
breaks it; HOLD is a file: while it exists, no run gets beyond step 2.
"""

import json
import os
import re
import sys
import time


def main(arguments):
  flags = dict(a.lstrip("-").split("=", 1) for a in arguments if "=" in a)
  folder = flags["model_dir"]
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, "calls.txt"), "a") as file:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    file.write(f"{flags['mode']} {os.getpid()} {visible}\n")
  if flags["mode"] == "ingest":
    return
  with open(flags["gin_file"]) as file:
    values = dict(re.findall(r"^(\w+) = (.+?)  #", file.read(), re.MULTILINE))
  margin, num_steps = float(values["MARGIN"]), int(values["NUM_STEPS"])
  if margin > float(os.environ.get("CRASH_ABOVE", "inf")):
    sys.exit("error: the margin is too much for me")
  path = os.path.join(folder, "metrics.jsonl")
  with open(path, "a+") as file:
    file.seek(0)
    done = len(file.readlines())
  for step in range(done + 1, num_steps + 1):
    time.sleep(float(os.environ.get("STEP_S", "0")))
    with open(path, "a") as file:
      row = {"step": step, "time": 0, "train/loss": 1 / (step * margin)}
      file.write(json.dumps(row) + "\n")
    while step == 2 and os.path.exists(os.environ.get("HOLD", "")):
      time.sleep(0.05)
    if step == 2 and "EXIT_STATUS" in os.environ:
      sys.exit(int(os.environ["EXIT_STATUS"]))
  if flags["mode"] == "train":
    return
  os.makedirs(os.path.join(folder, "eval"), exist_ok=True)
  latest = {"step": num_steps, "eval/map_at_r": margin, "eval/recall_at_1": margin}
  path = os.path.join(folder, "eval", "metrics.json")
  with open(path + ".new", "w") as file:
    json.dump({"latest": latest}, file)
  os.replace(path + ".new", path)
  with open(os.path.join(folder, "report.html"), "w"):
    pass


if __name__ == "__main__":
  main(sys.argv[1:])
