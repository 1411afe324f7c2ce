"""Numbers and tables as Markdown."""

import math
from collections.abc import Sequence

import numpy as np


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "run"), count(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" + "s" * (number != 1)


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    >>> listed(["one"]), listed(["one", "two"]), listed(["one", "two", "three"])
    ('one', 'one and two', 'one, two and three')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 3.0]), spread([1.0]), spread([])
    ('2.00 ± 1.41', '1.00', '-')
    """
    if not len(values):
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def between(low: float, high: float, form: str = ".2f") -> str:
    """An interval."""
    return "-" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def p_value(value: float) -> str:
    """A p-value.

    >>> p_value(0.03), p_value(0.0003), p_value(float("nan"))
    ('0.030', '< 0.001', '-')
    """
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
