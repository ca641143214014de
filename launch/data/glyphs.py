"""Draws the characters of fonts: python glyphs.py FONTS_FOLDER TARGET_FOLDER.

A class is a character; a sample is its image in one font. Character maps of fonts are
unreliable, so images are compared. Dropped are blanks, the box of a missing character
(any image that one font draws for several characters), and duplicates of an image that
the character already has.

Writes images and labels of the training fonts, and separately those of a few held-out
fonts, as NumPy files.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import pathlib
import sys
import unicodedata

import numpy as np
from fontTools import ttLib
from PIL import Image, ImageDraw, ImageFont

_SIZE, _MARGIN = 32, 2
_FONT_SIZE = 28
_MIN_SAMPLES, _MIN_HELD_OUT_SAMPLES = 8, 2
_MAX_CHARACTERS_OF_AN_IMAGE = 2
_HELD_OUT = ("reggae", "ipafont-mincho", "wqy-zenhei", "yusei-magic")
_ENDINGS = (".otf", ".ttc", ".ttf")


def main(fonts: pathlib.Path, target: pathlib.Path) -> None:
  """Draws all fonts and writes the two data sets."""
  faces = [face for path in _font_files(fonts) for face in _faces(path)]
  with concurrent.futures.ProcessPoolExecutor() as processes:
    drawn = list(processes.map(_draw_face, faces))
  held_out = [any(name in str(path) for name in _HELD_OUT) for path, _ in faces]
  known = [d for d, is_held_out in zip(drawn, held_out) if not is_held_out]
  others = [d for d, is_held_out in zip(drawn, held_out) if is_held_out]
  images = _by_character(known)
  images = {c: each for c, each in images.items() if len(each) >= _MIN_SAMPLES}
  unknown = {
    c: each
    for c, each in _by_character(others).items()
    if c in images and len(each) >= _MIN_HELD_OUT_SAMPLES
  }
  target.mkdir(parents=True, exist_ok=True)
  _write(target, "", images)
  _write(target, "held_out_fonts_", unknown)
  print(f"{len(known)} faces to train with, {len(others)} held out.")


def _font_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _ENDINGS)


def _faces(path: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
  if path.is_symlink() or path.suffix.lower() != ".ttc":
    return [] if path.is_symlink() else [(path, 0)]
  with ttLib.TTCollection(path, lazy=True) as collection:
    return [(path, number) for number in range(len(collection))]


def _draw_face(face: tuple[pathlib.Path, int]) -> dict[str, np.ndarray]:
  """Returns the images [S, S] uint8 of a face, by character."""
  path, number = face
  try:
    font = ImageFont.truetype(str(path), _FONT_SIZE, index=number)
    with ttLib.TTFont(path, fontNumber=number, lazy=True) as tables:
      characters = [chr(code) for code in sorted(tables.getBestCmap() or ())]
  except Exception as error:  # Each kind of damage raises another type.
    print(f"{path.name}: left out: {error}", file=sys.stderr)
    return {}
  images = {}
  for character in filter(_is_wanted, characters):
    image = _draw(font, character)
    if image is not None:
      images[character] = image
  users = collections.Counter(image.tobytes() for image in images.values())
  return {
    character: image
    for character, image in images.items()
    if users[image.tobytes()] <= _MAX_CHARACTERS_OF_AN_IMAGE
  }


def _is_wanted(character: str) -> bool:
  """Returns whether a character is a letter or ideograph, not a compatibility form."""
  is_letter = unicodedata.category(character)[0] == "L"
  return is_letter and unicodedata.normalize("NFKC", character) == character


def _draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
  """Draws white ink on black, centred; returns None if there is none."""
  try:
    left, top, right, bottom = font.getbbox(character)
  except OSError:
    return None
  width, height = right - left, bottom - top
  if width < 1 or height < 1 or max(width, height) > 3 * _SIZE:
    return None
  image = Image.new("L", (width, height))
  ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
  room = _SIZE - 2 * _MARGIN
  if max(width, height) > room:
    scale = room / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
  canvas = Image.new("L", (_SIZE, _SIZE))
  canvas.paste(image, ((_SIZE - image.width) // 2, (_SIZE - image.height) // 2))
  pixels = np.asarray(canvas)
  return pixels if (pixels > 64).sum() >= 4 else None


def _by_character(drawn: list[dict[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
  """Returns all distinct images of each character."""
  images: dict[str, dict[bytes, np.ndarray]] = collections.defaultdict(dict)
  for face in drawn:
    for character, image in face.items():
      digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
      images[character].setdefault(digest, image)
  return {character: list(images[character].values()) for character in sorted(images)}


def _write(target: pathlib.Path, name: str, images: dict[str, list]) -> None:
  labels = [character for character, each in images.items() for _ in each]
  pixels = [image for each in images.values() for image in each]
  np.save(target / f"{name}images.npy", np.stack(pixels))
  # Written last: the script uses this file as the sign of completion.
  np.save(target / f"{name}labels.npy", np.array(labels))
  print(f"{target}/{name}images.npy: {len(pixels)} images of {len(images)} characters.")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
