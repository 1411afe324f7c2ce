import numpy as np

from benchmarks.timing import interleaved, milliseconds, table


def test_calls_are_made_in_turn():
    made = []
    times = interleaved({name: lambda name=name: made.append(name) for name in "ab"}, 3)
    assert made == ["a", "b"] * 5  # two of each are not timed
    assert [seconds.shape for seconds in times.values()] == [(3, 2)] * 2


def test_table_of_medians_and_quartiles():
    text = milliseconds(np.array([0.004, 0.001, 0.0025, 0.009, 0.002]))
    assert table([{"a": text}]) == "| a |\n| --- |\n| 2.50 [2.00, 4.00] |"
