"""Conditions on the points of a sweep, such as `P * K == 64`, over gin names.

Only arithmetic, comparison, `and`, `or`, `not` and `in` are understood: a sweep file is
read, never run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config import suggest
from trainer.config.statements import Reference
from trainer.errors import UserError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Eq: operator.eq,
  ast.NotEq: operator.ne,
  ast.Lt: operator.lt,
  ast.LtE: operator.le,
  ast.Gt: operator.gt,
  ast.GtE: operator.ge,
  ast.In: lambda left, right: left in right,
  ast.NotIn: lambda left, right: left not in right,
}


class Constraint:
  """A condition that every point must meet.

  Args:
    text: a Python expression over swept names; a part that is referred to, such as
      `@TripletLoss()`, is compared by its name as text.
    names: what may stand in it.

  Raises:
    UserError: it does not parse, uses a name that is not swept, or is no condition.
  """

  def __init__(self, text: str, names: Mapping[str, Any]):
    self.text = text
    try:
      self._expression = ast.parse(str(text), mode="eval").body
    except SyntaxError as error:
      raise UserError(
        f"sweep.constraints: {text!r} is no expression: {error.msg}."
      ) from error
    self.holds(names)

  def holds(self, values: Mapping[str, Any]) -> bool:
    """Whether it is true of these values.

    Args:
      values: by the names that are swept.

    Raises:
      UserError: it can't be said.
    """
    try:
      return bool(self._value(self._expression, values))
    except (TypeError, ZeroDivisionError) as error:
      raise UserError(f"sweep.constraints: {self.text!r}: {error}.") from error

  def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
      return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
      return [self._value(item, values) for item in node.elts]
    if isinstance(node, (ast.Name, ast.Attribute)):
      return self._named(ast.unparse(node), values)
    if isinstance(node, ast.BoolOp):
      is_and = isinstance(node.op, ast.And)
      parts = (self._value(part, values) for part in node.values)
      return all(parts) if is_and else any(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
      value = self._value(node.operand, values)
      return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
      left, right = self._value(node.left, values), self._value(node.right, values)
      return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Compare) and all(type(op) in _BINARY for op in node.ops):
      sides = [self._value(side, values) for side in (node.left, *node.comparators)]
      pairs = zip(node.ops, sides, sides[1:])
      return all(_BINARY[type(op)](left, right) for op, left, right in pairs)
    raise UserError(
      f"sweep.constraints: {ast.unparse(node)!r} in {self.text!r} is more than "
      "arithmetic and comparison."
    )

  def _named(self, name: str, values: Mapping[str, Any]) -> Any:
    if name not in values:
      nearest = suggest.nearest(name, values) or f"; swept are {', '.join(values)}"
      raise UserError(f"sweep.constraints: {self.text!r}: {name} is not swept{nearest}")
    value = values[name]
    return value.name if isinstance(value, Reference) else value
