"""Conditions over metrics, such as "top1 >= baseline.top1 - 0.003", and their parser, which never
executes text from a file.

condition := sum ("<=" | ">=" | "<" | ">") sum
sum       := product (("+" | "-") product)*
product   := factor (("*" | "/") factor)*
factor    := ("+" | "-") factor | NUMBER | METRIC | "(" sum ")"
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

from dsnet.errors import ConfigError
from dsnet.wording import way_out

Interval: TypeAlias = tuple[float, float]
"""(low, high), both ends included; an end may be infinite."""
Order = Literal["<=", ">=", "<", ">"]
ORDERS: tuple[Order, ...] = get_args(Order)
MAX_LENGTH = 200
"""Largest number of characters of a condition."""
MAX_DEPTH = 40
"""Largest number of nested parentheses and signs."""
LEAST_VIOLATION = -2.0
"""Lower bound of a violation: two sides differ by at most twice the size of the larger one."""
EVERYTHING: Interval = (-math.inf, math.inf)
LEAST_BROKEN_VIOLATION = sys.float_info.epsilon
"""Smallest violation of a broken condition, in units of the size of its sides, so that a strict
condition with equal sides counts as broken."""


class Expression(Protocol):
    """One side of a condition, or a part of it."""

    def value(self, values: Mapping[str, float]) -> float:
        """Value of the expression; NaN if a value is NaN or missing, or for a division by zero."""
        ...

    def size(self, values: Mapping[str, float]) -> float:
        """Magnitude of the value without cancellation: that of x - y is |x| + |y|."""
        ...

    def bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        """Interval that contains the floating-point value at every point of the ranges."""
        ...

    def size_bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        """Interval that contains the size at every point of the ranges."""
        ...


@dataclass(frozen=True)
class Number:
    """A constant."""

    number: float

    def value(self, values: Mapping[str, float]) -> float:
        return self.number

    def size(self, values: Mapping[str, float]) -> float:
        return abs(self.number)

    def bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return self.number, self.number

    def size_bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return abs(self.number), abs(self.number)


@dataclass(frozen=True)
class Metric:
    """The value of a metric, given by its name."""

    name: str

    def value(self, values: Mapping[str, float]) -> float:
        return float(values.get(self.name, math.nan))

    def size(self, values: Mapping[str, float]) -> float:
        return abs(self.value(values))

    def bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return ranges.get(self.name, EVERYTHING)

    def size_bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return _magnitude(self.bounds(ranges))


@dataclass(frozen=True)
class Negative:
    """A minus sign."""

    inner: Expression

    def value(self, values: Mapping[str, float]) -> float:
        return -self.inner.value(values)

    def size(self, values: Mapping[str, float]) -> float:
        return self.inner.size(values)

    def bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        low, high = self.inner.bounds(ranges)
        return -high, -low

    def size_bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return self.inner.size_bounds(ranges)


@dataclass(frozen=True)
class Operation:
    """Two parts and an operator: + - * /."""

    left: Expression
    operator: str
    right: Expression

    def value(self, values: Mapping[str, float]) -> float:
        return _combined(self.left.value(values), self.operator, self.right.value(values))

    def size(self, values: Mapping[str, float]) -> float:
        left = self.left.size(values)
        if self.operator == "/":  # by the divisor's actual value: a small one makes the quotient large
            return _combined(left, "/", abs(self.right.value(values)))
        return _combined(left, "*" if self.operator == "*" else "+", self.right.size(values))

    def bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        return _combined_intervals(self.left.bounds(ranges), self.operator, self.right.bounds(ranges))

    def size_bounds(self, ranges: Mapping[str, Interval]) -> Interval:
        left = self.left.size_bounds(ranges)
        if self.operator == "/":
            return _combined_intervals(left, "/", _magnitude(self.right.bounds(ranges)))
        operator = "*" if self.operator == "*" else "+"
        return _combined_intervals(left, operator, self.right.size_bounds(ranges))


def _combined(left: float, operator: str, right: float) -> float:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return left / right if right != 0 else math.nan


def _combined_intervals(left: Interval, operator: str, right: Interval) -> Interval:
    """Interval of the results of an operation on two intervals.

    Rounding is monotone, so that the rounded results at the corners bound every rounded result
    between them; no outward rounding is needed.
    """
    if operator == "/" and right[0] <= 0 <= right[1]:
        return EVERYTHING
    corners = [_combined(one, operator, other) for one in left for other in right]
    return EVERYTHING if any(map(math.isnan, corners)) else (min(corners), max(corners))


def _magnitude(interval: Interval) -> Interval:
    low, high = interval
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return least, max(abs(low), abs(high))


@dataclass(frozen=True)
class Comparison:
    """A condition; `parse_comparison` builds it."""

    text: str
    """The condition as it was written, with single spaces."""
    left: Expression
    order: Order
    right: Expression
    names: frozenset[str]
    """The metrics that it reads."""
    numbers: frozenset[float]
    """The numbers in it."""

    def __str__(self) -> str:
        return self.text

    def violation(self, values: Mapping[str, float]) -> float:
        """Violation of the condition, in units of the size of its larger side; <= 0 iff it holds.

        Thus violations of conditions over metrics in different units are comparable. The
        size is the magnitude without cancellation, so that `top1 - baseline.top1 >= 0` and `top1 >=
        baseline.top1` are broken by the same amount.

        Returns:
            -2 to 2; NaN if a value is NaN or missing, for a division by zero, or if a side is
            infinite.
        """
        left, right = self.left.value(values), self.right.value(values)
        if not (math.isfinite(left) and math.isfinite(right)):
            return math.nan
        excess = left - right if self.order in ("<=", "<") else right - left
        return self._relative(excess, max(self.left.size(values), self.right.size(values)))

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether the condition holds; it does not if its violation is NaN."""
        return self.violation(values) <= 0

    def least_violation(self, ranges: Mapping[str, Interval]) -> float:
        """Lower bound of the violation over all points of these ranges; above 0, no point meets the
        condition.

        It uses interval arithmetic, in which two occurrences of a name vary independently, so that
        the bound may be lower than the least violation, but never higher.

        Args:
            ranges: name -> (low, high); a missing name may have any value.
        """
        left, right = self.left.bounds(ranges), self.right.bounds(ranges)
        smaller, larger = (left, right) if self.order in ("<=", "<") else (right, left)
        excess = smaller[0] - larger[1]
        sizes = self.left.size_bounds(ranges), self.right.size_bounds(ranges)
        size = max(one[1 if excess > 0 else 0] for one in sizes)
        return LEAST_VIOLATION if math.isnan(excess) else self._relative(excess, size)

    def _relative(self, excess: float, size: float) -> float:
        """Relative violation from the excess of one side over the other and the size of the sides.

        It increases with the excess. For equal excess it decreases with the size where the excess
        is above 0, and increases with it where the excess is below 0.
        """
        is_broken = excess >= 0 if self.order in ("<", ">") else excess > 0
        share = max(min(excess / size, -LEAST_VIOLATION), LEAST_VIOLATION) if 0 < size < math.inf else 0.0
        if is_broken:
            return max(share, LEAST_BROKEN_VIOLATION)
        return share if size > 0 or excess == 0 else LEAST_VIOLATION


@dataclass(frozen=True)
class _Token:
    kind: Literal["number", "name", "order", "operator", "end"]
    text: str
    column: int
    """Column of its first character, from 1."""


_TOKEN = re.compile(
    r"""(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)
    | (?P<order><=|>=|<|>)
    | (?P<operator>[-+*/()])""",
    re.VERBOSE | re.ASCII,
)
_HINTS: Mapping[str, str] = {
    "=": "write <=, >=, < or >",
    "!": "write <=, >=, < or >",
    "≤": "write <=",
    "≥": "write >=",
    "%": "accuracies are fractions: write 0.9 for 90 %",
    "^": "powers are written as products",
    "&": "write one condition for each part",
    "|": "all conditions must hold, there is no 'or'; write one condition for each part",
    ",": "a decimal point is written '.'",
}
"""Characters that are not allowed but often written -> advice for the error message."""


def parse_comparison(text: str, names: Collection[str]) -> Comparison:
    """Read a condition.

    Args:
        text: two sums around one of <= >= < >, of numbers, names, + - * / and parentheses; names
            may hold dots.
        names: the names that exist.

    Raises:
        ConfigError: the text cannot be read, or a name is unknown; the message gives the column,
            and for an unknown name those that may be meant.
    """
    return _Parser(text, names).comparison()


class _Parser:
    """Recursive-descent parser of a condition; each method moves `self._at` past the tokens that it
    has read."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self._text = text
        self._names = names
        if len(text) > MAX_LENGTH:
            raise ConfigError(
                f"condition {text[:40]!r}... has {len(text)} characters, but may have at most {MAX_LENGTH}"
            )
        self._tokens = list(self._split())
        self._at = 0
        self._depth = 0

    def comparison(self) -> Comparison:
        left = self._sum()
        order = self._next
        if order.kind != "order":
            rest = "it ends" if order.kind == "end" else f"got {order.text!r}"
            raise self._error(order, f"expected an operator, or one of {' '.join(ORDERS)} and a bound; {rest}")
        self._at += 1
        right = self._sum()
        if self._next.kind == "order":
            raise self._error(self._next, f"a second {self._next.text!r}; write two conditions")
        if self._next.kind != "end":
            raise self._error(self._next, f"expected an operator or the end; got {self._next.text!r}")
        used = frozenset(token.text for token in self._tokens if token.kind == "name")
        if not used:
            raise ConfigError(
                f"condition {self._text!r} reads no metric, so that it always or never holds; name a metric"
            )
        (symbol,) = (known for known in ORDERS if known == order.text)
        numbers = frozenset(float(token.text) for token in self._tokens if token.kind == "number")
        return Comparison(" ".join(self._text.split()), left, symbol, right, used, numbers)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _split(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._text):
            if self._text[at].isspace():
                at += 1
                continue
            match = _TOKEN.match(self._text, at)
            if match is None:
                character = self._text[at]
                hint = _HINTS.get(character, "known: numbers, metrics, + - * / ( ) and <= >= < >")
                raise self._error(_Token("end", character, at + 1), f"{character!r} cannot be read; {hint}")
            for kind in ("number", "name", "order", "operator"):
                if match[kind] is not None:
                    yield _Token(kind, match[kind], at + 1)
            at = match.end()
        yield _Token("end", "", len(self._text) + 1)

    def _sum(self) -> Expression:
        return self._chain(self._product, "+-")

    def _product(self) -> Expression:
        return self._chain(self._factor, "*/")

    def _chain(self, part: Callable[[], Expression], operators: str) -> Expression:
        found = part()
        while self._next.kind == "operator" and self._next.text in operators:
            operator = self._next.text
            self._at += 1
            divisor = self._next
            found = Operation(found, operator, part())
            if operator == "/" and found.right.bounds({}) == (0, 0):
                raise self._error(divisor, "this is 0, so that the division has no result")
        return found

    def _factor(self) -> Expression:
        token = self._next
        self._at += 1
        if token.kind == "number":
            return self._number(token)
        if token.kind == "name":
            return self._metric(token)
        if token.kind != "operator" or token.text not in "+-(":
            met = "the condition ends" if token.kind == "end" else f"got {token.text!r}"
            raise self._error(token, f"expected a number, a metric or '('; {met}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(token, f"more than {MAX_DEPTH} parentheses and signs inside each other")
        inner = self._sum() if token.text == "(" else self._factor()
        self._depth -= 1
        if token.text == "(":
            if self._next.text != ")":
                met = "the condition ends" if self._next.kind == "end" else f"got {self._next.text!r}"
                raise self._error(self._next, f"expected ')' for the '(' in column {token.column}; {met}")
            self._at += 1
        return Negative(inner) if token.text == "-" else inner

    def _number(self, token: _Token) -> Expression:
        number = float(token.text)
        if not math.isfinite(number):
            raise self._error(token, f"{token.text!r} is too large for a number")
        return Number(number)

    def _metric(self, token: _Token) -> Expression:
        if token.text not in self._names:
            raise self._error(token, f"unknown metric '{token.text}'{way_out(token.text, list(self._names))}")
        return Metric(token.text)

    def _error(self, token: _Token, message: str) -> ConfigError:
        return ConfigError(f"condition {self._text!r}, column {token.column}: {message}")
