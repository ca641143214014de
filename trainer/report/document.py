"""The frame of every page: head, style, links to its sections, script."""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from trainer.data import paths


class Section(NamedTuple):
  """One part of a page.

  Attributes:
    name: its title, from which its place in the page's address is made.
    content: HTML; a section without any is left out.
  """

  name: str
  content: str

  @property
  def place(self) -> str:
    """Its identifier in the page."""
    return self.name.lower().replace(" ", "-")


def write(path: str, title: str, summary: str, sections: Sequence[Section]) -> None:
  """Writes a page, whole.

  Args:
    path: of the file.
    title: plain text.
    summary: HTML that stands under the title.
    sections: in order.
  """
  there = [section for section in sections if section.content]
  page = string.Template(_asset("document.html")).substitute(
    title=html.escape(title),
    style=_asset("document.css"),
    script=_asset("document.js"),
    summary=summary,
    links="".join(f'<a href="#{s.place}">{html.escape(s.name)}</a>' for s in there),
    sections="\n".join(_section(section) for section in there),
  )
  paths.replace_file(path, page)


def _section(section: Section) -> str:
  heading = f'<h2 id="{section.place}-title">{html.escape(section.name)}</h2>'
  return (
    f'<section id="{section.place}" aria-labelledby="{section.place}-title">'
    f"{heading}{section.content}</section>"
  )


def _asset(name: str) -> str:
  return resources.files("trainer.report").joinpath(name).read_text(encoding="utf-8")
