"""Interleaved times, and tables of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Times several calls in turn, so that whatever else the machine does affects all of them.

    Args:
      calls: each returns when its work is done.
      repeats: the number of timed calls of each, after two that are not timed.

    Returns:
      An array of shape `(repeats, 2)` for each: seconds that passed, and seconds of CPU time.
    """
    times = {name: np.empty((repeats, 2)) for name in calls}
    for repeat in range(-2, repeats):
        for name, call in calls.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            if repeat >= 0:
                times[name][repeat] = time.perf_counter() - start, time.process_time() - cpu_start
    return times


def milliseconds(seconds: np.ndarray) -> str:
    """The median and the quartiles, such as `"2.45 [2.22, 2.63]"`."""
    low, median, high = 1e3 * np.percentile(seconds, [25, 50, 75])
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same columns as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
