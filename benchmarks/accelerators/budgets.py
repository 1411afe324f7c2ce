"""Which programs a selection is for, and what exceeds its budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.accelerators.programs import Case


def select(cases: Sequence[Case], selections: Sequence[str]) -> list[Case]:
    """The programs whose names have all parts of a selection, such as `"update/tpu"`.

    Args:
      cases: the programs to choose from.
      selections: parts of names in any order, with slashes between them.

    Returns:
      The programs that at least one of the selections is for.

    Raises:
      ValueError: if there is no program for one of them.
    """
    chosen = {
        text: [case for case in cases if set(text.split("/")) <= {*case}] for text in selections
    }
    for text, some in chosen.items():
        if not some:
            raise ValueError(f"no program has all parts of {text!r} in its name")
    return [case for case in cases if any(case in some for some in chosen.values())]


def exceeded(
    measured: Mapping[str, Mapping[str, int]], budgets: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What exceeds its budget.

    Args:
      measured: what was counted of each program, by the program's name.
      budgets: those of `budgets.toml`.

    Yields:
      A line for each number that is too large. One that is to be compared with a program that was
      not measured is left out.
    """
    cases = {Case(*name.split("/")): counted for name, counted in measured.items()}
    for budget in budgets:
        for case in cases:
            if not any(set(text.split("/")) <= {*case} for text in budget["programs"]):
                continue
            for column, most in budget["most"].items():
                if isinstance(most, Mapping):
                    other = cases.get(case._replace(method=most["method"]))
                    if other is None:
                        continue
                    most = other[column] * most.get("times", 1) + most.get("plus", 0)
                if (number := cases[case][column]) > most:
                    yield f"{case.name}: {column} {number:,} > {most:,.0f}. {budget['why']}"
