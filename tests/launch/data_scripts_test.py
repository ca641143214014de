"""Selection of images by the programs that draw data sets."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from fontTools import fontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

_FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "data"


@pytest.fixture(autouse=True)
def _threads_for_processes(monkeypatch):
  # Processes import a program by name; a module loaded by path has none.
  threads = concurrent.futures.ThreadPoolExecutor
  monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", threads)


def _program(name):
  spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _box(left, bottom, right, top):
  pen = TTGlyphPen(None)
  pen.moveTo((left, bottom))
  for point in ((left, top), (right, top), (right, bottom)):
    pen.lineTo(point)
  pen.closePath()
  return pen.glyph()


def _write_font(path, boxes):
  """Writes a font whose letters are boxes; a missing box is a blank."""
  names = [".notdef", *(f"u{ord(letter):04X}" for letter in boxes)]
  glyphs = [_box(0, 0, 900, 900)]
  glyphs += [_box(*box) if box else TTGlyphPen(None).glyph() for box in boxes.values()]
  builder = fontBuilder.FontBuilder(1000, isTTF=True)
  builder.setupGlyphOrder(names)
  builder.setupCharacterMap({ord(letter): n for letter, n in zip(boxes, names[1:])})
  builder.setupGlyf(dict(zip(names, glyphs)))
  builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
  builder.setupHorizontalHeader(ascent=1000, descent=0)
  builder.setupOS2()
  builder.setupPost()
  builder.save(path)


def test_glyphs_keeps_drawn_and_distinct_characters(tmp_path, monkeypatch):
  glyphs = _program("glyphs")
  monkeypatch.setattr(glyphs, "_MIN_SAMPLES", 2)
  wide, tall = (0, 0, 900, 300), (0, 0, 300, 900)
  same = (100, 100, 500, 500)  # The placeholder of a missing character.
  fonts = [
    {"A": wide, "B": tall, "C": None, "D": same, "E": same, "F": same, "1": wide},
    {"A": (0, 0, 900, 500), "B": tall, "C": wide, "D": tall, "E": wide},
    {"A": (0, 0, 900, 600), "B": (0, 0, 400, 900), "E": (0, 0, 900, 100)},
  ]
  for number, boxes in enumerate(fonts):
    _write_font(tmp_path / f"{number}.ttf", boxes)
  _write_font(tmp_path / "reggae-1.ttf", {"A": (0, 0, 700, 300), "B": tall})
  _write_font(tmp_path / "reggae-2.ttf", {"A": (0, 0, 700, 500)})
  (tmp_path / "bad.ttf").write_bytes(b"no font")
  glyphs.main(tmp_path, tmp_path / "out")
  labels = np.load(tmp_path / "out" / "labels.npy").tolist()
  assert labels == ["A"] * 3 + ["B"] * 2 + ["E"] * 2
  images = np.load(tmp_path / "out" / "images.npy")
  assert images.shape == (7, 32, 32)
  assert len({image.tobytes() for image in images}) == 7
  held_out = np.load(tmp_path / "out" / "held_out_fonts_labels.npy").tolist()
  assert held_out == ["A", "A"]


def test_emoji_keeps_symbols_drawn_by_enough_vendors(tmp_path, monkeypatch, capsys):
  emoji = _program("emoji")
  monkeypatch.setattr(emoji, "_MIN_SAMPLES", 2)
  for number in range(3):
    radius = 20 + 10 * number
    icons = {
      "circle": {"body": f'<circle cx="64" cy="64" r="{radius}" fill="red"/>'},
      "same": {"body": '<circle cx="64" cy="64" r="30" fill="blue"/>'},
      "blank": {"body": "<g/>"},
    }
    if number == 0:
      icons["alone"] = {"body": '<rect width="9" height="9"/>'}
      icons["circle"]["body"] += '<rect fill="url(#gone)"/>'
    folder = tmp_path / f"vendor {number}"
    folder.mkdir()
    content = {"icons": icons, "width": 128, "height": 128}
    (folder / "icons.json").write_text(json.dumps(content))
  emoji.main(tmp_path, tmp_path / "out")
  assert np.load(tmp_path / "out" / "labels.npy").tolist() == ["circle"] * 3
  images = np.load(tmp_path / "out" / "images.npy")
  assert images.shape == (3, 48, 48, 3)
  reddish = (images[..., 0] > 200) & (images[..., 1] < 50)
  assert (np.diff(reddish.sum(axis=(1, 2))) > 0).all()
  assert "3 images of 1 emoji" in capsys.readouterr().out
