"""Processes on loopback train from one command line like a single process."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.distribute.cluster_test import free_addresses
from tests.faults.processes import ForkedTask
from tests.thorough import thorough_except
from trainer.mining.round import MiningRound
from trainer.retrieval.embedding_store import EmbeddingFolder

_REPOSITORY = pathlib.Path(__file__).parents[2]
_DIGITS = str(_REPOSITORY / "configs" / "runs" / "digits.gin")
# A smooth loss, because a rounding error can move a triplet across the margin, and SGD,
# because Adam normalizes gradients that consist of rounding errors.
_REPLACED = {
  "batch_all.gin": "supervised_contrastive.gin",
  "adam.gin": "sgd.gin",
  "'../": f"'{_REPOSITORY}/configs/",
}
_PARAMS = (
  "NUM_STEPS = 6",
  "LoopOptions.steps_per_loop = 2",
  "LoopOptions.checkpoint_every_steps = 4",
  "PKSampler.classes_per_batch = 6",
  "TrainStep.mining_statistics = None",  # Slow to compile.
)
_MINING = (
  "train.mining = @OfflineMining()",
  "OfflineMining.every_steps = 2",
  "OfflineMining.miner = @Miner()",
  "OfflineMining.sampler_fn = @neighbouring_class_sampler",
  "neighbouring_class_sampler.sampler_fn = @PKSampler",
  "neighbouring_class_sampler.hard_fraction = 0.5",
  "neighbouring_class_sampler.neighbours_per_seed = 2",
  "Miner.num_class_neighbours = 3",
  "Miner.examples = @ExampleMining()",
  "Miner.records_per_class = 40",
  "ExampleMining.window = @RankWindow()",
  "RankWindow.first = 1",
  "RankWindow.last = 8",
)
_CENTRES = (
  "TrainStep.loss = @SumOfLosses()",
  "SumOfLosses.losses = [@CosFaceLoss(), @SupervisedContrastiveLoss()]",
  "CosFaceLoss.centres = @ClassCentres()",
  "CosFaceLoss.scale = 8.0",
  "ClassCentres.optimizer = @RowSGD()",
  "ClassCentres.sampling_rate = 1.0",
  "RowSGD.learning_rate = 0.1",
)
_SAMPLED = ("ClassCentres.sampling_rate = 0.7", "PKSampler.classes_per_batch = 4")
_TIMEOUT_S = 300


def _command(folder, model_dir, *params, mode="train_and_evaluate", replaced=None):
  params = [*_PARAMS, f"DATA_DIR = '{folder / 'digits'}'", *params]
  run_file = folder / "run.gin"
  content = pathlib.Path(_DIGITS).read_text(encoding="utf-8")
  for old, new in {**(replaced or {}), **_REPLACED}.items():
    assert old in content
    content = content.replace(old, new)
  run_file.write_text(content)
  return [
    *(sys.executable, "-m", "trainer.task", f"--mode={mode}", f"--gin_file={run_file}"),
    f"--model_dir={model_dir}",
    "--worker_timeout_s=200",
    *(f"--gin_param={param}" for param in params),
  ]


def _own_process(command, environment, folder):
  return subprocess.Popen(
    command,
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(_REPOSITORY), **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _run_workers(commands, folders=None):
  """Runs a process for each command and returns its output and exit status.

  Args:
    commands: one for each worker.
    folders: where each runs; None for here.
  """
  addresses = free_addresses(len(commands))
  processes = []
  for index, command in enumerate(commands):
    cluster = {
      "cluster": {"worker": addresses},
      "task": {"type": "worker", "index": index},
    }
    environment = {"TF_CONFIG": json.dumps(cluster) if len(commands) > 1 else ""}
    place = folders[index] if folders else _REPOSITORY
    if command[0] == sys.executable:
      processes.append(ForkedTask(command, environment, place))
    else:
      processes.append(_own_process(command, environment, place))
  try:
    return [
      (*process.communicate(timeout=_TIMEOUT_S), process.returncode)
      for process in processes
    ]
  finally:
    for process in processes:
      process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("workers")


@functools.cache
def _finished(folder, num_workers, *params, mode="train_and_evaluate"):
  """Returns the folder of a run of `num_workers` and the output of each worker."""
  model_dir = folder / f"of_{num_workers}_with_{len(params)}"
  done = _run_workers([_command(folder, model_dir, *params, mode=mode)] * num_workers)
  assert [status for *_, status in done] == [0] * num_workers, done
  return model_dir, done


def _weights(model_dir):
  reader = tf.train.load_checkpoint(str(model_dir / "checkpoints"))
  names = sorted(
    name
    for name in reader.get_variable_to_shape_map()
    if name.startswith(("encoder", "loss")) and "OBJECT_GRAPH" not in name
  )
  assert names
  return {name: reader.get_tensor(name) for name in names}


def _rows(model_dir):
  lines = (model_dir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parity
@pytest.mark.parametrize(
  "num_workers", [2, pytest.param(3, marks=pytest.mark.thorough)]
)
def test_workers_train_the_weights_of_one_process(folder, num_workers):
  one, many = (_finished(folder, num)[0] for num in (1, num_workers))
  assert _different_weights(many, one) == []


@pytest.mark.parity
@pytest.mark.thorough
def test_workers_with_mining_train_the_weights_of_one_process(folder):
  one, two = (_finished(folder, num, *_MINING)[0] for num in (1, 2))
  for step in (2, 4):
    mined = [MiningRound(str(each), step, {}).arrays for each in (one, two)]
    neighbours, examples = zip(
      *((each["class_neighbours"], each["negatives"]) for each in mined)
    )
    np.testing.assert_array_equal(*neighbours)
    # Two neighbours may have equal distances up to rounding.
    assert np.mean(np.equal(*examples)) > 0.99
  assert [row.get("mining/round_step") for row in _rows(two)] == [None, 2.0, 4.0]
  assert _different_weights(two, one) == []


def _centres(model_dir):
  """Returns centres and moments of all classes at the last step."""
  shards = sorted((model_dir / "checkpoints").glob("ckpt-6.centres-0-*.npy"))
  return len(shards), np.concatenate([np.load(shard) for shard in shards])


@pytest.mark.parity
@pytest.mark.parametrize(
  "changes", [(), pytest.param(_SAMPLED, marks=pytest.mark.thorough)]
)
def test_workers_train_the_class_centres_of_one_process(folder, changes):
  _finished(folder, 1)  # Creates the records.
  one, two = (
    _finished(folder, num, *_CENTRES, *changes, mode="train")[0] for num in (1, 2)
  )
  (num_of_one, expected), (num_of_two, centres) = _centres(one), _centres(two)
  assert (num_of_one, num_of_two) == (1, 2)
  np.testing.assert_allclose(centres, expected, atol=1e-5 * np.abs(expected).max())
  assert _different_weights(two, one) == []


@pytest.mark.thorough
def test_full_disk_on_one_worker_stops_all_when_centres_are_saved(folder):
  _finished(folder, 1)  # Creates the records.
  params = (
    *_CENTRES,
    "LoopOptions.on_disk_full = 'stop'",
    "EMBEDDING_SIZE = 4096",
  )
  command = _command(folder, folder / "no_room_for_centres", *params, mode="train")
  of_16_kb = ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", *command]
  done = _run_workers([command, of_16_kb])
  for _, errors, status in done:
    assert status == 2, errors
    assert "Traceback" not in errors
  line = done[0][1].splitlines()[-1]
  assert "can't be written: " in line and "0000000006.npy: File too large" in line
  assert not list((folder / "no_room_for_centres" / "checkpoints").glob("*centres*"))


def test_full_disk_on_one_worker_stops_all_during_mining(folder):
  _finished(folder, 1)  # Creates the records.
  command = _command(folder, folder / "no_room", *_MINING, mode="train")
  of_16_kb = ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", *command]
  for _, errors, status in _run_workers([command, of_16_kb]):
    assert status == 2, errors
    assert "Traceback" not in errors
    assert "has no space for" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("error: worker 1: ")


def _different_weights(got, expected):
  """Returns names of weights missing in one run or different by more than 1e-5."""
  got, expected = _weights(got), _weights(expected)
  return sorted(got.keys() ^ expected.keys()) + [
    name
    for name in got.keys() & expected.keys()
    if not np.allclose(
      got[name], expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max()
    )
  ]


def _measured(model_dir):
  latest = json.loads((model_dir / "eval" / "metrics.json").read_text())["latest"]
  return {name: value for name, value in latest.items() if "eval/" in name}


@pytest.mark.parametrize("num_workers", thorough_except([2], [2, 3]))
def test_workers_log_and_evaluate_the_same_metrics_as_one_process(folder, num_workers):
  one, many = (_finished(folder, num)[0] for num in (1, num_workers))
  timed = ("time", "train/images_per_second", "train/seconds_per_step")
  assert [row["step"] for row in _rows(many)] == [2, 4, 6]
  for got, expected in zip(_rows(many), _rows(one)):
    for name in expected.keys() - set(timed):
      assert got[name] == pytest.approx(expected[name], rel=1e-4), name
  assert _measured(many) == pytest.approx(_measured(one), abs=2e-3)


def test_only_the_chief_writes(folder):
  model_dir, done = _finished(folder, 2)
  assert len(list(model_dir.glob("*tfevents*"))) == 1
  kept = sorted(path.name for path in (model_dir / "checkpoints").glob("*.index"))
  assert kept == ["ckpt-4.index", "ckpt-6.index"]
  assert not list(model_dir.glob("**/*temp*"))
  assert "recall@1" in done[0][0]
  assert [out for out, _, _ in done[1:]] == [""]


def test_user_error_on_one_worker_stops_all_in_one_line(folder):
  _finished(folder, 1)
  commands = [
    _command(folder, folder / f"own_{index}", mode="train") for index in range(2)
  ]
  damaged = folder / "own_1" / "checkpoints"
  damaged.mkdir(parents=True)
  (damaged / "ckpt-4.json").write_text("{")
  for _, errors, status in _run_workers(commands):
    assert status == 2, errors
    assert "Traceback" not in errors
    assert "eagerly" not in errors and "retracing" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: worker 1: ") and "is intact" in last


@pytest.fixture(scope="module")
def worker_folders(folder):
  """Folders of workers: with weights, with other weights and with damaged weights."""
  folders = {name: folder / name for name in ("whole", "other", "damaged")}
  for each in folders.values():
    each.mkdir()
    network = tf.keras.applications.MobileNet(
      include_top=False, weights=None, input_shape=(32, 32, 1)
    )
    network.save_weights(str(each / "weights.h5"))
  (folders["damaged"] / "weights.h5").write_bytes(b"no weights")
  return folders


_DAMAGED = ("train", "damaged", "worker 1: weights.h5 does not fit MobileNet", "")
_OTHER = ("train", "other", "the workers differ: SHA-256 of the initial", "checkpoints")


def _with_weights(folder, model_dir, mode):
  """Returns a command that loads the weights of its working directory."""
  _finished(folder, 1)  # Creates the records.
  return _command(
    folder,
    model_dir,
    "TrainStep.encoder = @Encoder()",
    "evaluate.encoder = @Encoder()",
    "Encoder.embedding_size = 8",
    "Encoder.pooling = 'average'",
    "Encoder.backbone = @KerasApplication()",
    "KerasApplication.name = 'MobileNet'",
    "KerasApplication.weights = 'weights.h5'",
    "ImageDecoder.height = 32",
    "ImageDecoder.width = 32",
    mode=mode,
    replaced={"include '../models/convnet.gin'\n": ""},
  )


@pytest.mark.parametrize(
  ("mode", "second", "message", "unwritten"),
  thorough_except(
    [_OTHER],
    [_DAMAGED, ("evaluate", *_DAMAGED[1:]), _OTHER],
  ),
)
def test_bad_initial_weights_on_one_worker_stop_all_in_one_line(
  folder, worker_folders, mode, second, message, unwritten
):
  model_dir = folder / f"never_{mode}_{second}"
  command = _with_weights(folder, model_dir, mode)
  folders = [worker_folders["whole"], worker_folders[second]]
  for _, errors, status in _run_workers([command] * 2, folders):
    assert status == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: {message}"), last
  assert not (model_dir / unwritten).exists()


def test_workers_with_different_configurations_are_refused(folder):
  _finished(folder, 1)
  model_dir = folder / "refused"
  commands = [
    _command(folder, model_dir, f"PKSampler.samples_per_class = {num}", mode="train")
    for num in (16, 8)
  ]
  for _, errors, status in _run_workers(commands):
    assert status == 2
    last = errors.splitlines()[-1]
    assert "samples_per_class is 16 on worker 0, 8 on 1" in last
  assert not model_dir.exists()


@pytest.mark.thorough
def test_workers_compute_the_embeddings_of_one_process(folder, tmp_path):
  for num_workers in (1, 2):
    param = f"embed.folder = '{tmp_path / str(num_workers)}'"
    command = _command(folder, _finished(folder, 2)[0], param, mode="embed")
    done = _run_workers([command] * num_workers)
    assert [status for *_, status in done] == [0] * num_workers, done
  one, two = (EmbeddingFolder(str(tmp_path / name)) for name in "12")
  np.testing.assert_allclose(one.embeddings, two.embeddings, atol=1e-6)
  assert list(one.keys) == list(two.keys)
  assert one.source == two.source
