"""Queries with their neighbours, and the classes that are taken for each other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from trainer.report.axes import short
from trainer.retrieval.evidence import Confusion, Evidence, Neighbour, Query


def queries(evidence: Evidence) -> str:
  """A row a query: itself, then its neighbours, right and wrong ones framed.

  Args:
    evidence: with the shown queries and their pictures.
  """
  rows = "".join(_query(query, evidence.pictures) for query in evidence.queries)
  num_mistakes = sum(query.is_mistake for query in evidence.queries)
  return (
    f"<p>{num_mistakes} whose nearest neighbour is wrong, with the most wrong ones "
    f"first, then {len(evidence.queries) - num_mistakes} others; drawn at random, and "
    "with an example of each confused pair. A thick frame marks a neighbour of another "
    "class, which is named below it.</p>"
    f'<div class="queries">{rows}</div>'
  )


def confusions(found: Sequence[Confusion], pictures: Mapping[str, str]) -> str:
  """The most confused pairs, each with an example; empty if there are none.

  Args:
    found: the most frequent first.
    pictures: data URIs by item.
  """
  rows = "".join(_confusion(each, pictures) for each in found)
  return f'<ul class="confusions">{rows}</ul>' if rows else ""


def _query(query: Query, pictures: Mapping[str, str]) -> str:
  num_right = sum(n.is_right for n in query.neighbours)
  name = html.escape(query.class_name)
  asked = (
    f'<li class="asked"><span class="frame">'
    f"{_picture(query.item, f'query, {query.class_name}', pictures)}</span></li>"
  )
  answers = "".join(
    _answer(neighbour, i, pictures) for i, neighbour in enumerate(query.neighbours)
  )
  return (
    f'<article class="query" id="query-{query.item}"><h3>{name} '
    f"<small>{num_right} of {len(query.neighbours)} right</small>"
    f'<a href="#item-{query.item}">on the map</a></h3>'
    f'<ol class="answers">{asked}{answers}</ol></article>'
  )


def _answer(neighbour: Neighbour, rank: int, pictures: Mapping[str, str]) -> str:
  judgement = "right" if neighbour.is_right else "wrong"
  words = f"{neighbour.class_name}, {judgement}, distance {short(neighbour.distance)}"
  name = (
    "" if neighbour.is_right else f"<small>{html.escape(neighbour.class_name)}</small>"
  )
  return (
    f'<li class="{judgement}" tabindex="{-1 if rank else 0}" '
    f'data-words="{html.escape(words, quote=True)}"><span class="frame">'
    f"{_picture(neighbour.item, words, pictures)}</span>{name}</li>"
  )


def _confusion(confusion: Confusion, pictures: Mapping[str, str]) -> str:
  shown = (
    _picture(confusion.query, confusion.class_name, pictures),
    _picture(confusion.neighbour, confusion.taken_for, pictures),
  )
  return (
    f'<li><a href="#query-{confusion.query}">{"".join(shown)}'
    f"<span><b>{html.escape(confusion.class_name)}</b> taken for "
    f"<b>{html.escape(confusion.taken_for)}</b>"
    f"<small>{confusion.num_mistakes:,} of {confusion.num_queries:,} queries, "
    f"{_share(confusion.num_mistakes / confusion.num_queries)}</small></span></a></li>"
  )


def _share(share: float) -> str:
  return "under 0.1%" if share < 0.001 else f"{share:.1%}"


def _picture(item: int, words: str, pictures: Mapping[str, str]) -> str:
  words = html.escape(words, quote=True)
  picture = pictures.get(str(item))
  if picture is None:
    return f'<span class="nopicture">{words.split(",")[0]}</span>'
  return f'<img class="item small" src="{picture}" alt="{words}">'
