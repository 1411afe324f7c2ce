"""What exceeds its budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.compiled.programs import Case


def matches(case: Case, selections: Sequence[str]) -> bool:
    """Whether a program's name has all parts of one of the selections, such as `"update/tpu"`."""
    return any(set(text.split("/")) <= {*case} for text in selections)


def exceeded(
    measured: Mapping[Case, Mapping[str, int]], budgets: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """What exceeds its budget.

    Args:
      measured: what was counted of each program.
      budgets: those of `budgets.toml`.

    Yields:
      A line for each number that is too large. A number to compare with that was not measured is
      no limit.
    """
    for budget in budgets:
        for case, counted in measured.items():
            if not matches(case, budget["programs"]):
                continue
            for column, most in budget["most"].items():
                if isinstance(most, Mapping):
                    other = measured.get(case._replace(method=most["method"]))
                    if other is None:
                        continue
                    most = other[column] * most.get("times", 1) + most.get("plus", 0)
                if (number := counted[column]) > most:
                    yield f"{case.name}: {column} {number:,} > {most:,.0f}. {budget['why']}"
