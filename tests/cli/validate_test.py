"""Mode `validate`: reports and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trainer.cli.validate import validate
from trainer.data import ingestion, statistics
from trainer.data.dataset import Dataset, ListSplit
from trainer.data.images import ImageDecoder
from trainer.data.index_arrays import members_from_labels
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError
from trainer.run import Hardware, Run


def _dataset(folder, bad=()):
  items = [
    Item(str(n), f"c{n % 4}", encode_png(np.full((4, 4), n, np.uint8)))
    for n in range(40)
  ]
  for number in bad:
    items[number] = Item(f"bad {number}", items[number].label, features={"x": 1})
  ingestion.write_records(items, str(folder), records_per_shard=15, fingerprint={})
  return Dataset(
    folder=str(folder),
    split=ListSplit(evaluation_classes=["c3"]),
    decoder=ImageDecoder(height=4, width=4, channels=1),
  )


def _run(folder):
  return Run(str(folder / "run"), None, Hardware("cpu", 1, None), False)


def _sampler(index, classes):
  return PKSampler(
    index, classes_per_batch=2, samples_per_class=3, seed=0, classes=classes
  )


def test_valid_data_is_reported(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  report = validate(
    _run(tmp_path), dataset=_dataset(tmp_path / "data"), sampler_fn=_sampler
  )
  written = json.loads((tmp_path / "run" / "validation.json").read_text())
  assert written == json.loads(json.dumps(report))
  assert report["num_records_checked"] == 40
  assert report["bad_records"] == []
  assert report["draws"]["num_classes"] == 3
  assert "40 records of 4 classes" in caplog.text
  assert "40 records read and decoded, 0 bad." in caplog.text


def test_bad_records_are_an_error_if_strict(tmp_path):
  dataset = _dataset(tmp_path / "data", bad=(3, 17))
  with pytest.raises(
    UserError, match=r"2 of 40 .*00000\.tfrecord: record 3 .* record 2"
  ):
    validate(_run(tmp_path), dataset=dataset)
  assert (tmp_path / "run" / "validation.json").exists()


def test_bad_records_are_reported_if_tolerant(tmp_path, caplog):
  dataset = _dataset(tmp_path / "data", bad=(3,))
  report = validate(_run(tmp_path), dataset=dataset, is_strict=False)
  assert len(report["bad_records"]) == 1
  assert "records-00000.tfrecord: record 3 can't be decoded" in caplog.text


def _with_a_small_class(folder):
  labels = ["a"] * 5 + ["b ü"] * 2 + ["c"] * 3 + ["d"]
  items = [
    Item(str(n), label, encode_png(np.full((4, 4), n, np.uint8)))
    for n, label in enumerate(labels)
  ]
  ingestion.write_records(items, str(folder), records_per_shard=15, fingerprint={})
  return Dataset(
    folder=str(folder),
    split=ListSplit(evaluation_classes=["d"]),
    decoder=ImageDecoder(height=4, width=4, channels=1),
  )


def test_too_small_classes_are_an_error_if_strict(tmp_path):
  dataset = _with_a_small_class(tmp_path / "data")
  with pytest.raises(
    UserError, match=r"1 classes have fewer than 3 .*: b ü \(2\)\. Add"
  ):
    validate(_run(tmp_path), dataset=dataset, sampler_fn=_sampler)
  report = json.loads((tmp_path / "run" / "validation.json").read_text())
  assert report["small_classes"]["sizes"] == {"b ü": 2}


def test_too_small_classes_are_reported_if_tolerant(tmp_path, caplog):
  dataset = _with_a_small_class(tmp_path / "data")
  report = validate(_run(tmp_path), dataset=dataset, min_members=4, is_strict=False)
  assert report["small_classes"]["num_classes"] == 2
  assert list(report["small_classes"]["sizes"].items()) == [("b ü", 2), ("c", 3)]
  assert "2 classes have fewer than 4 records: b ü (2), c (3)." in caplog.text


def test_sample_spans_all_records(tmp_path):
  dataset = _dataset(tmp_path / "data", bad=(0, 39))
  report = validate(_run(tmp_path), dataset=dataset, num_records=5, is_strict=False)
  assert report["num_records_checked"] == 5
  assert len(report["bad_records"]) == 2


@pytest.mark.parametrize(
  ("name", "message"),
  [("labels", "labels from 0 to 99"), ("member_records", "do not match its labels")],
)
def test_inconsistent_index_is_refused(tmp_path, name, message):
  _dataset(tmp_path / "data")
  path = tmp_path / "data" / "index" / f"{name}.npy"
  array = np.load(path)
  array[5] = 99 if name == "labels" else array[30]
  np.save(path, array)
  dataset = Dataset(
    folder=str(tmp_path / "data"),
    split=ListSplit(evaluation_classes=["c3"]),
    decoder=ImageDecoder(height=4, width=4, channels=1),
  )
  with pytest.raises(UserError, match=message):
    validate(_run(tmp_path), dataset=dataset)


def test_unwritable_folder_is_named(tmp_path):
  (tmp_path / "run").write_text("mine")
  with pytest.raises(UserError, match=r"validation\.json can't be written"):
    validate(_run(tmp_path), dataset=_dataset(tmp_path / "data"))


def test_draws_are_counted():
  sizes = [2, 5, 9, 4]
  table = members_from_labels(np.repeat(np.arange(4), sizes).astype(np.int32), 4)
  classes = np.array([0, 1, 2], np.int32)
  sampler = PKSampler(
    table, classes_per_batch=2, samples_per_class=4, seed=0, classes=classes
  )
  drawn = statistics.draw_statistics(sampler, table, classes, 3)
  assert (drawn.num_draws, drawn.num_classes, drawn.num_records) == (24, 3, 16)
  assert drawn.class_epochs == 2.0
  assert drawn.most_draws_of_a_class == 2
  assert drawn.record_epochs == 1.5
  assert drawn.num_classes_never_drawn == 0
  assert drawn.num_records_never_drawn == 1  # Eight of nine of the largest.
  assert drawn.most_draws_of_a_record == 4  # Twice two of the smallest, twice.
  assert drawn.num_repeats_in_a_batch == 4


def test_classes_never_drawn_are_counted():
  table = members_from_labels(np.repeat(np.arange(9), 3).astype(np.int32), 9)
  sampler = PKSampler(table, classes_per_batch=2, samples_per_class=2, seed=0)
  drawn = statistics.draw_statistics(sampler, table, np.arange(9), 2)
  assert drawn.num_classes_never_drawn == 5
  assert "5 are never drawn" in drawn.lines()[1]
