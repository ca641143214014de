"""Pages in headless Chromium: two widths, no errors, no requests, and hovering."""

from __future__ import annotations

import pytest

from tests.report import browser, example_run
from tests.sweep import example_sweep
from trainer.report import comparison, measured_runs, page
from trainer.retrieval.report_data import ReportData

_WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pages")
  for name, options in {
    "pictures": {},
    "vectors": {"has_pictures": False, "num_classes": 20, "margin": 0.3},
  }.items():
    page.write_page(example_run.make(folder / name, **options))
  measured = measured_runs.read_measured(
    [str(folder / "pictures"), str(folder / "vectors")]
  )
  comparison.write_comparison_page(measured, str(folder / "comparison.html"))
  rows = [
    example_sweep.row(
      {"train.margin": f"0.{i}", "LOSS": f"@{'Long' * i}Loss()"}, 1 / i, 0.9 / i
    )
    for i in range(1, 6)
  ]
  failed = example_sweep.row(
    {"train.margin": "0.9"}, None, note=f"status 1: {'no' * 99}"
  )
  example_sweep.write_page([*rows, failed], folder / "sweep.html")
  return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory):
  with browser.opened(tmp_path_factory.mktemp("profile")) as opened:
    yield opened


@pytest.fixture(autouse=True)
def _quiet(window):
  """Checks after each test that no request was sent and no error occurred."""
  yield
  errors, requests = list(window.errors), list(window.requests)
  window.errors.clear()
  window.requests.clear()
  assert errors == []
  assert requests == []


def _center(window, selector):
  """Scrolls an element into the window and returns its centre."""
  return window.evaluate(f"""(() => {{
    const element = document.querySelector({selector!r});
    element.scrollIntoView({{block: "center", behavior: "instant"}});
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  }})()""")


def _text(window, selector):
  return window.evaluate(f"document.querySelector({selector!r}).textContent")


@pytest.mark.parametrize(("width", "num_lines"), [(390, 2), (1280, 1)])
def test_long_name_of_a_metric_takes_two_lines_only_on_a_narrow_screen(
  folder, window, width, num_lines
):
  window.open(folder / "pictures" / "report.html", width=width)
  lines = window.evaluate("""(() => {
    const names = [...document.querySelectorAll('.results th[scope=row]')];
    const range = document.createRange();
    range.selectNodeContents(names.find((th) => th.textContent.startsWith('TPR')));
    return new Set([...range.getClientRects()].map((box) => box.top)).size;
  })()""")
  assert lines == num_lines


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize(
  "name",
  ["pictures/report.html", "vectors/report.html", "comparison.html", "sweep.html"],
)
def test_page_fits_the_width_and_shows_its_pictures(
  folder, window, name, width, is_dark
):
  window.open(folder / name, width=width, is_dark=is_dark)
  assert window.evaluate("document.documentElement.scrollWidth") == width
  broken = "[...document.images].filter((i) => !i.hidden && !i.naturalWidth).length"
  assert window.evaluate(broken) == 0
  heights = "[...document.querySelectorAll('section')].map((s) => s.offsetHeight)"
  assert all(height > 50 for height in window.evaluate(heights))


@pytest.mark.parametrize("width", _WIDTHS)
def test_results_need_no_scrolling(folder, window, width):
  window.open(folder / "pictures" / "report.html", width=width)
  window.evaluate("document.querySelector('details').open = true")
  hidden = "(t) => t.parentElement.scrollWidth - t.parentElement.clientWidth"
  tables = "[...document.querySelectorAll('.results')]"
  assert window.evaluate(f"{tables}.map({hidden})") == [0, 0]


@pytest.mark.parametrize("name", ["pictures/report.html", "sweep.html"])
def test_text_has_enough_contrast_in_light_and_dark(folder, window, name):
  """WCAG requires 4.5:1 for all text against its background."""
  for is_dark in (False, True):
    window.open(folder / name, is_dark=is_dark)
    assert window.evaluate(_LOW_CONTRAST) == []


def test_dark_is_dark(folder, window):
  path = folder / "pictures" / "report.html"
  grey = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] / 255"
  window.open(path, is_dark=True)
  assert window.evaluate(grey) < 0.2
  window.open(path)
  assert window.evaluate(grey) > 0.9


def test_page_without_javascript_shows_everything(folder, window):
  path = folder / "pictures" / "report.html"
  shown = "document.body.innerText.length"
  window.open(path)
  with_script = window.evaluate(shown)
  window.open(path, has_script=False)
  assert window.evaluate(shown) == with_script > 1000


def _mapped(folder, name="pictures"):
  return ReportData.read(str(folder / name)).embedding_map


@pytest.mark.parametrize("width", _WIDTHS)
def test_hovering_an_item_of_the_map_shows_its_class_and_picture(folder, window, width):
  window.open(folder / "pictures" / "report.html", width=width)
  placed = _mapped(folder)
  for i in (0, 33):
    window.point(*_center(window, f"#item-{placed.items[i]}"))
    assert _text(window, ".card b") == placed.class_names[i]
    assert f"item {placed.items[i]}" in _text(window, ".card")
  column, row = 33 % placed.sprite.columns, 33 // placed.sprite.columns
  style = "document.querySelector('.card .sprite').style.backgroundPosition"
  found = [float(part.rstrip("%")) for part in window.evaluate(style).split()]
  ends = (placed.sprite.columns - 1, placed.sprite.rows - 1)
  assert found == pytest.approx([100 * column / ends[0], 100 * row / ends[1]], abs=0.01)


def test_map_supports_touch(folder, window):
  window.open(folder / "pictures" / "report.html", width=390)
  placed = _mapped(folder)
  window.touch(*_center(window, f"#item-{placed.items[5]}"))
  assert _text(window, ".card b") == placed.class_names[5]
  assert f"item {placed.items[5]}" in _text(window, ".card")


def test_tooltip_stays_when_the_pointer_moves_onto_it(folder, window):
  window.open(folder / "pictures" / "report.html")
  item = ReportData.read(str(folder / "pictures")).queries[0].item
  window.point(*_center(window, f"#item-{item}"))
  window.click(*_center(window, ".card a"))
  assert window.evaluate("location.hash") == f"#query-{item}"
  assert window.evaluate("document.querySelector('.canvas.pointed')") is None


@pytest.mark.parametrize(
  ("key", "axis", "sign"),
  [
    ("ArrowRight", "x", 1),
    ("ArrowLeft", "x", -1),
    ("ArrowUp", "y", 1),
    ("ArrowDown", "y", -1),
  ],
)
def test_arrow_keys_move_between_items_of_the_map(folder, window, key, axis, sign):
  window.open(folder / "pictures" / "report.html")
  placed = _mapped(folder)
  places = [sign * value for value in getattr(placed, axis)]
  first = places.index(min(places))
  window.point(*_center(window, f"#item-{placed.items[first]}"))
  window.evaluate("document.querySelector('.canvas').focus()")
  window.press(key)
  chosen = window.evaluate("document.querySelector('circle.chosen').id")
  second = placed.items.index(int(chosen.replace("item-", "")))
  assert places[second] > places[first]
  assert _text(window, ".card b") == placed.class_names[second]
  window.press("Escape")
  assert window.evaluate("document.querySelector('circle.chosen')") is None


def test_first_arrow_key_selects_an_item_of_the_map(folder, window):
  window.open(folder / "pictures" / "report.html")
  window.evaluate("document.querySelector('.canvas').focus()")
  window.press("ArrowRight")
  assert window.evaluate("document.querySelectorAll('circle.chosen').length") == 1


def test_items_of_many_classes_are_distinguished_on_hover(folder, window):
  window.open(folder / "vectors" / "report.html")
  placed = _mapped(folder, "vectors")
  window.point(*_center(window, f"#item-{placed.items[7]}"))
  alike = window.evaluate("document.querySelectorAll('circle.alike').length")
  assert alike == list(placed.class_names).count(placed.class_names[7])
  assert _text(window, ".card b") == placed.class_names[7]


def test_query_links_to_its_position_on_the_map(folder, window):
  window.open(folder / "pictures" / "report.html")
  item = ReportData.read(str(folder / "pictures")).queries[0].item
  window.evaluate(f"document.querySelector('#query-{item} h3 a').click()")
  window.evaluate("new Promise((done) => setTimeout(done, 50))")
  assert window.evaluate("document.querySelector('circle.chosen').id") == f"item-{item}"
  assert window.evaluate("document.querySelector('.card a').hash") == f"#query-{item}"


def test_hovering_a_curve_shows_the_value(folder, window):
  window.open(folder / "pictures" / "report.html")
  x, y = _center(window, "#training .plot")
  window.point(x, y)
  assert _text(window, "#training output") == "step 20 · 0.01"
  window.point(0, 0)
  assert _text(window, "#training output") == "0.006667"


def test_arrow_keys_move_along_curves_of_several_runs(folder, window):
  window.open(folder / "comparison.html")
  window.evaluate("document.querySelector('#training .plot').focus()")
  window.press("ArrowRight")
  assert _text(window, "#training output") == "step 10 · pictures 0.02 · vectors 0.03"
  window.press("End")
  assert _text(window, "#training output").startswith("step 30 · ")


def test_frames_of_right_and_wrong_neighbours_differ_in_colour_and_width(
  folder, window
):
  window.open(folder / "pictures" / "report.html")
  styles = {
    judgement: window.evaluate(f"""[...new Set(
      [...document.querySelectorAll('.{judgement} .frame')].map((frame) => {{
        const style = getComputedStyle(frame);
        return `${{style.borderColor}} ${{style.borderWidth}}`;
      }}))]""")
    for judgement in ("right", "wrong")
  }
  assert styles == {
    "right": ["rgb(0, 114, 178) 1px"],
    "wrong": ["rgb(200, 68, 12) 2px"],
  }


@pytest.mark.parametrize("width", _WIDTHS)
def test_a_neighbour_that_is_focused_or_hovered_is_named(folder, window, width):
  window.open(folder / "pictures" / "report.html", width=width)
  query = ReportData.read(str(folder / "pictures")).queries[0]
  first = f"#query-{query.item} .right, #query-{query.item} .wrong"
  shown = "getComputedStyle(document.{}, '::after').content"
  x, y = _center(window, first)
  assert window.evaluate(shown.format(f"querySelector({first!r})")) == "none"
  window.point(x, y)
  hovered = window.evaluate(shown.format(f"querySelector({first!r})"))
  assert hovered.startswith(f'"{query.neighbours[0].class_name}, ')
  window.point(0, 0)
  window.evaluate(f"document.querySelector({first!r}).focus()")
  for neighbour in query.neighbours[1:]:
    window.press("ArrowRight")
    judgement = "right" if neighbour.is_right else "wrong"
    words = f'"{neighbour.class_name}, {judgement}, distance '
    assert window.evaluate(shown.format("activeElement")).startswith(words)
    assert window.evaluate("document.documentElement.scrollWidth") == width


_LOW_CONTRAST = """(() => {
  const light = (c) => {
    const parts = c.map((v) => v / 255).map(
      (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const color = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = color(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.offsetParent) continue;
    const a = light(color(getComputedStyle(element).color));
    const b = light(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${walker.currentNode.textContent.trim()} ${ratio}`);
  }
  return low;
})()"""
