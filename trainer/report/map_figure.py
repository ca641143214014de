"""The map of embeddings, which can be pointed at."""

from __future__ import annotations

import dataclasses
import html
import json

from trainer.retrieval.evidence import EmbeddingMap

# More classes than colours that can be told apart: only those pointed at are coloured.
_MAX_COLORS = 10
_RADIUS = 7
_WIDTH, _MARGIN = 1000, 30
_SPAN = _WIDTH - 2 * _MARGIN
# Of the width, lest items in a line have no room.
_LEAST_HEIGHT = 0.4


def embedding_map(found: EmbeddingMap, num_items: int) -> str:
  """The map with a legend and a card that tells of the item pointed at.

  Args:
    found: places, classes and pictures.
    num_items: how many items there are in all.
  """
  names = sorted(set(found.class_names))
  has_colors = len(names) <= _MAX_COLORS
  color_of = {name: i for i, name in enumerate(names)} if has_colors else {}
  top, height = _frame(found)
  circles = "".join(_circle(found, i, top, color_of) for i in range(len(found.items)))
  sheet, sprite = "", ""
  if found.sprite is not None:
    sheet = f'<img class="sheet" hidden alt="" src="{found.sprite.picture}">'
    sizes = {
      k: v for k, v in dataclasses.asdict(found.sprite).items() if k != "picture"
    }
    sprite = f" data-sprite='{json.dumps(sizes)}'"
  label = (
    f"Map of {len(found.items)} items of {len(names)} classes. The arrow keys go from "
    "item to item."
  )
  return (
    f"<p>{len(found.items):,} of {num_items:,} items, laid out by {found.method}: what "
    "is near here is near in the embedding, though not always the other way round."
    "</p>"
    f'<div class="map{"" if has_colors else " plain"}"{sprite}>{sheet}'
    f'<div class="canvas" tabindex="0" role="group" aria-label="{label}">'
    f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" aria-hidden="true">{circles}</svg></div>'
    '<div class="side"><div class="card empty" aria-live="polite"><p>Point at an '
    "item, or focus the map and use the arrow keys.</p></div>"
    f"{_legend(names if has_colors else [], len(names))}</div></div>"
  )


def _frame(found: EmbeddingMap) -> tuple[float, float]:
  """The y of its uppermost item, and the height of the picture that holds all."""
  top, span = max(found.y), max(found.y) - min(found.y)
  missing = max(0.0, _LEAST_HEIGHT - span)
  return top + missing / 2, (span + missing) * _SPAN + 2 * _MARGIN


def _circle(found: EmbeddingMap, i: int, top: float, color_of: dict[str, int]) -> str:
  name = found.class_names[i]
  color = f' style="--color:var(--c{color_of[name]})"' if name in color_of else ""
  kind = ' class="mistake"' if found.is_mistake[i] else ""
  return (
    f'<circle id="item-{found.items[i]}" cx="{_MARGIN + _SPAN * found.x[i]:.1f}" '
    f'cy="{_MARGIN + _SPAN * (top - found.y[i]):.1f}" r="{_RADIUS}"{kind}{color} '
    f'data-name="{html.escape(name, quote=True)}"/>'
  )


def _legend(names: list[str], num_classes: int) -> str:
  lines = [
    f'<li><span class="key" style="--color:var(--c{i})"></span>{html.escape(name)}</li>'
    for i, name in enumerate(names)
  ]
  if not names:
    lines.append(f"<li>{num_classes:,} classes; the one pointed at is coloured</li>")
  lines.append(
    '<li><span class="key ring"></span>nearest neighbour is of another class</li>'
  )
  return f'<ul class="legend">{"".join(lines)}</ul>'
