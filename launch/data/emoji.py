"""Draws the emoji of several vendors: python emoji.py ICONS_FOLDER TARGET_FOLDER.

A class is an emoji, identified by its name; a sample is its image by one vendor.
ICONS_FOLDER has one folder per vendor with its `icons.json` (Iconify's format). Images
that cannot be drawn, are blank, or already exist in their class are dropped. Writes
images and labels as NumPy files.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import json
import pathlib
import sys

import numpy as np
import resvg_py
from PIL import Image

_SIZE = 48
_MIN_SAMPLES = 6


def main(icons: pathlib.Path, target: pathlib.Path) -> None:
  """Draws all vendors' emoji and writes the data set."""
  drawings: dict[str, list[str]] = collections.defaultdict(list)
  for path in sorted(icons.rglob("icons.json")):
    for name, svg in _drawings(json.loads(path.read_text(encoding="utf-8"))).items():
      drawings[name].append(svg)
  drawings = {n: each for n, each in drawings.items() if len(each) >= _MIN_SAMPLES}
  with concurrent.futures.ProcessPoolExecutor() as processes:
    drawn = dict(
      zip(drawings, processes.map(_draw_all, drawings.values(), chunksize=8))
    )
  drawn = {n: drawn[n] for n in sorted(drawn) if len(drawn[n]) >= _MIN_SAMPLES}
  images = np.stack([image for each in drawn.values() for image in each])
  labels = [name for name, each in drawn.items() for _ in each]
  target.mkdir(parents=True, exist_ok=True)
  np.save(target / "images.npy", images)
  # Written last: the script uses this file as the sign of completion.
  np.save(target / "labels.npy", np.array(labels))
  print(f"{target}/images.npy: {len(images)} images of {len(drawn)} emoji.")


def _drawings(icon_set: dict) -> dict[str, str]:
  """Returns SVG files by name, without aliases."""
  size = icon_set.get("width", 16), icon_set.get("height", 16)
  drawings = {}
  for name, icon in icon_set["icons"].items():
    if icon.get("hidden"):
      continue
    width, height = icon.get("width", size[0]), icon.get("height", size[1])
    left, top = icon.get("left", 0), icon.get("top", 0)
    drawings[name] = (
      '<svg xmlns="http://www.w3.org/2000/svg" '
      'xmlns:xlink="http://www.w3.org/1999/xlink" '
      f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
  return drawings


def _draw_all(drawings: list[str]) -> list[np.ndarray]:
  """Returns the distinct images [S, S, 3] uint8, on white."""
  images = {}
  for svg in drawings:
    image = _draw(svg)
    if image is not None and image.min() != image.max():
      images.setdefault(image.tobytes(), image)
  return list(images.values())


def _draw(svg: str) -> np.ndarray | None:
  try:
    png = resvg_py.svg_to_bytes(
      svg_string=svg,
      background="#ffffff",
      width=_SIZE,
      height=_SIZE,
      skip_system_fonts=True,
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
  except Exception as error:  # The renderer raises its own types.
    print(f"left out: {error}", file=sys.stderr)
    return None
  canvas = Image.new("RGB", (_SIZE, _SIZE), "white")
  canvas.paste(image, ((_SIZE - image.width) // 2, (_SIZE - image.height) // 2))
  return np.asarray(canvas)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
