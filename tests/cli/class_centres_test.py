"""Class centres from the command line: vectors, a linear layer and ArcFace."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from tests.faults.processes import run_task
from trainer import task
from trainer.retrieval.embedding_store import EmbeddingFolder

_RUN_FILE = "configs/runs/vectors_class_centres.gin"
_NUM_CLASSES, _SIZE, _NUM_STEPS = 30, 8, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with records, and a run of one example per class."""
  folder = tmp_path_factory.mktemp("vectors")
  rng = np.random.default_rng(0)
  labels = np.arange(_NUM_CLASSES * 10) % _NUM_CLASSES
  directions = rng.normal(size=(_NUM_CLASSES, _SIZE))
  vectors = directions[labels] + 0.3 * rng.normal(size=(len(labels), _SIZE))
  names = [f"class-{label}" for label in labels]
  np.savez(folder / "data.npz", x=vectors.astype(np.float32), y=names)
  assert _task(folder, "ingest") == 0
  assert _task(folder, "train") == 0
  return folder


def _arguments(folder, mode, *, run="run", steps=_NUM_STEPS, params=()):
  params = [
    f"VECTORS = '{folder / 'data.npz'}:x'",
    f"LABELS = '{folder / 'data.npz'}:y'",
    f"VECTOR_SIZE = {_SIZE}",
    f"DATA_DIR = '{folder / 'data'}'",
    f"NUM_STEPS = {steps}",
    "EMBEDDING_SIZE = 16",
    "CLASSES_PER_BATCH = 20",
    "SAMPLES_PER_CLASS = 1",
    "LoopOptions.steps_per_loop = 20",
    "ARC_SCALE = 16.0",
    *params,
  ]
  return [
    *("trainer.task", f"--mode={mode}", f"--gin_file={_RUN_FILE}"),
    f"--model_dir={folder / run}",
    *(f"--gin_param={param}" for param in params),
  ]


def _task(folder, mode, *flags, **options):
  return task.main([*_arguments(folder, mode, **options), *flags])


def _embedded(folder, name, *params, run="run", steps=_NUM_STEPS):
  target = folder / run / f"{name}-{steps}"
  params = [f"embed.folder = '{target}'", f"embed.content = '{name}'", *params]
  assert _task(folder, "embed", run=run, steps=steps, params=params) == 0
  return EmbeddingFolder(str(target))


def _saved_rows(folder, step):
  [path] = (folder / "run" / "checkpoints").glob(f"ckpt-{step}.centres-*.npy")
  return np.load(path)[:, 0]


def _means(records):
  """Returns the mean embedding of each class that has records, at norm 1, by name."""
  labels = np.asarray(records.labels)
  means = {
    records.class_names[label]: records.embeddings[labels == label].mean(0)
    for label in np.unique(labels)
  }
  return {name: mean / np.linalg.norm(mean) for name, mean in means.items()}


def test_centres_are_exported_at_norm_1_with_class_names(folder):
  centres = _embedded(folder, "class_centres")
  saved = _saved_rows(folder, _NUM_STEPS)
  expected = saved / np.linalg.norm(saved, axis=1, keepdims=True)
  np.testing.assert_allclose(centres.embeddings, expected, atol=1e-6)
  assert list(centres.keys) == [centres.class_names[label] for label in centres.labels]
  means = _means(_embedded(folder, "records"))
  cosines = [
    centre @ means[name] for name, centre in zip(centres.keys, centres.embeddings)
  ]
  assert len(cosines) < _NUM_CLASSES
  assert min(cosines) > 0.7


def test_search_among_centres_finds_the_class_of_a_vector(folder, capsys):
  centres = folder / "run" / "searched"
  params = [f"embed.folder = '{centres}'", "embed.content = 'class_centres'"]
  assert _task(folder, "embed", params=params) == 0
  records = _embedded(folder, "records")
  known = set(EmbeddingFolder(str(centres)).keys)
  row = next(
    i for i, label in enumerate(records.labels) if records.class_names[label] in known
  )
  np.save(folder / "query.npy", np.asarray(records.embeddings)[[row]])
  capsys.readouterr()
  flags = ("--json", f"--query={folder / 'query.npy'}")
  params = [f"search.embeddings = '{centres}'"]
  assert _task(folder, "search", *flags, params=params) == 0
  [result] = json.loads(capsys.readouterr().out)
  assert result["hits"][0]["class_name"] == records.class_names[records.labels[row]]


def test_class_centres_have_no_pictures(folder, capsys):
  _embedded(folder, "class_centres")
  stored = folder / "run" / f"class_centres-{_NUM_STEPS}"
  flags = ("--query=class-1", f"--picture={folder / 'picture.png'}")
  assert (
    _task(folder, "search", *flags, params=[f"search.embeddings = '{stored}'"]) == 2
  )
  assert "have no pictures" in capsys.readouterr().err


def test_new_classes_start_at_the_means_of_their_embeddings(folder, caplog):
  shutil.copytree(folder / "run", folder / "more")
  is_still = ["LEARNING_RATE = 1e-12", "CENTRE_LEARNING_RATE = 1e-12"]
  options = {
    "run": "more",
    "steps": _NUM_STEPS + 20,
    "params": ["HashSplit.evaluation_fraction = 0.1", *is_still],
  }
  caplog.set_level("INFO", logger="absl")
  assert _task(folder, "train", **options) == 2
  assert _task(folder, "train", "--allow_config_change", **options) == 0
  before = _embedded(folder, "class_centres")
  after = _embedded(folder, "class_centres", *options["params"], **_of(options))
  assert len(before.keys) < len(after.keys)
  num_new = len(after.keys) - len(before.keys)
  assert f"{num_new} classes start at the means" in caplog.text
  means = _means(_embedded(folder, "records", *options["params"], **_of(options)))
  kept = dict(zip(before.keys, before.embeddings))
  for name, centre in zip(after.keys, after.embeddings):
    np.testing.assert_allclose(centre, kept.get(name, means[name]), atol=1e-5)


def _of(options):
  return {name: options[name] for name in ("run", "steps")}


def _neighbours(folder, run, step):
  path = folder / run / "mining" / f"round-{step:08}" / "class_neighbours.npy"
  return np.load(path)


@pytest.mark.parametrize("process", ["training", "its own"])
def test_neighbours_of_classes_are_the_nearest_centres(folder, process):
  run = process.replace(" ", "-")
  shutil.copytree(folder / "run", folder / run)
  params = [
    "Miner.num_class_neighbours = 3",
    "Miner.class_vectors = 'centres'",
    "train.mining = @OfflineMining()",
    "OfflineMining.every_steps = 40",
    "OfflineMining.sampler_fn = @neighbouring_class_sampler",
    "neighbouring_class_sampler.sampler_fn = @PKSampler",
    "neighbouring_class_sampler.hard_fraction = 0.5",
    "neighbouring_class_sampler.neighbours_per_seed = 1",
  ]
  options = {"run": run, "steps": 60}
  if process == "training":
    params.append("OfflineMining.miner = @Miner()")
    flags = ["--allow_config_change"]
    assert _task(folder, "train", *flags, params=params, **options) == 0
  else:
    params += ["mine.miner = @Miner()", "mine.timeout_s = 0.5"]
    _task(folder, "mine", params=params, **options)
  found = _neighbours(folder, run, _NUM_STEPS)
  centres = _embedded(folder, "class_centres")
  vectors, labels = np.asarray(centres.embeddings), np.asarray(centres.labels)
  order = np.argsort(-vectors @ vectors.T, axis=1)[:, 1:4]
  np.testing.assert_array_equal(found[labels], labels[order])
  others = np.setdiff1d(np.arange(_NUM_CLASSES), labels)
  assert (found[others] == -1).all()


def test_replica_check_compares_centres(folder):
  # In a process of its own: two strategies of one process would share collectives.
  command = [sys.executable, "-m", *_arguments(folder, "check")]
  done = run_task([*command, "--num_virtual_replicas=2"])
  assert done.returncode == 0, done.stderr
  columns, *rows = done.stdout.splitlines()[1:]
  assert columns.split()[-1] == "centres"
  assert [row.split()[0] for row in rows] == ["1", "2", "4"]


@pytest.mark.parametrize(
  "param, message",
  [
    ("ClassCentres.num_classes = 7", "num_classes=7, and the training data has 24"),
    ("ARC_MARGIN = -0.1", "ArcFaceLoss.margin=-0.1 is not an angle"),
    ("ARC_SCALE = 0.0", "scale=0.0 is not above 0"),
    ("CENTRE_SAMPLING_RATE = 0.0", r"sampling_rate=0.0 must be in (0, 1]"),
    ("CENTRE_SAMPLING_RATE = 1.5", r"sampling_rate=1.5 must be in (0, 1]"),
    ("CENTRE_SAMPLING_RATE = 0.5", "fewer than the 20 classes of a batch"),
    ("TrainStep.objective_fn = @local_negatives", "shared by all replicas"),
    ("HashSplit.evaluation_fraction = 0.1", "another config"),
    ("ClassCentres.new_classes = 'zero'", "new_classes='zero'"),
    ("ClassCentres.initial_centres = 'zero'", "initial_centres='zero'"),
    ("embed.content = 'classes'", "embed.content='classes'"),
  ],
)
def test_bad_input_exits_with_one_line_and_status_2(folder, capsys, param, message):
  mode = "embed" if param.startswith("embed") else "train"
  name = "run" if message == "another config" else "bad"
  capsys.readouterr()
  assert _task(folder, mode, run=name, params=[param]) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith("error: ")
  assert message in last
