"""The progress bar of ingest: completed items, speed and remaining time."""

from __future__ import annotations

import re

from trainer.data import ingestion
from trainer.data.example_encoder import ExampleEncoder
from trainer.data.sources import source as source_lib
from trainer.data.sources.source import Item, ItemLoader
from trainer.runtime import progress
from trainer.runtime.progress import Progress


def _at(monkeypatch, seconds):
  monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)


def test_remaining_time_is_estimated_from_completed_items(monkeypatch):
  _at(monkeypatch, 100.0)
  bar = Progress("ingesting", "items", 4000)
  _at(monkeypatch, 110.0)
  bar.advance(1000)
  assert bar.line() == (
    "ingesting  [#######.......................] 1,000/4,000 items  100 items/s  "
    "30 s left"
  )


def test_speed_excludes_previously_completed_items(monkeypatch):
  _at(monkeypatch, 100.0)
  bar = Progress("ingesting", "items", 4000, done=3000)
  _at(monkeypatch, 110.0)
  bar.advance(500)
  assert bar.line().endswith("3,500/4,000 items  50 items/s  10 s left")


def test_remaining_time_is_never_negative():
  bar = Progress("ingesting", "items", 2)
  bar.advance(5)
  assert "[##############################] 5/2" in bar.line()
  assert bar.line().endswith(" 0 s left")


def test_no_remaining_time_without_a_total():
  bar = Progress("ingesting", "items")
  bar.advance(5)
  assert "left" not in bar.line()


class _Source(source_lib.Source):
  def fingerprint(self):
    return {"source": "test"}

  def num_items(self):
    return 8

  def loaders(self):
    for number in range(8):
      item = Item(str(number), f"class {number % 2}", features={"x": number})
      yield ItemLoader(item)


def test_ingest_shows_progress_for_each_item(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(progress, "_LOG_INTERVAL_S", 0.0)
  caplog.set_level("INFO", logger="absl")
  record_writer = ingestion.RecordWriter(
    ExampleEncoder(max_pixels=9), records_per_shard=3
  )
  source = _Source()
  record_writer.write(source.loaders(), str(tmp_path), {}, num_items=source.num_items())
  counts = re.findall(r"ingesting .* (\d)/8 items .* s left", caplog.text)
  assert counts == [str(number) for number in range(1, 9)]
