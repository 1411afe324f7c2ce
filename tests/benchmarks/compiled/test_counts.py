from pathlib import Path
from types import SimpleNamespace

from benchmarks.compiled import counts


def count(name: str, cost: dict[str, float] | None = None) -> dict[str, int]:
    """The counts of a text that are not 0."""
    compiled = SimpleNamespace(
        as_text=Path(__file__).with_name(name).read_text,
        cost_analysis=lambda: cost,
        memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=7),
    )
    return {name: value for name, value in vars(counts.count(compiled)).items() if value}


def test_counts_of_a_gpus_program():
    convolution, copy, compare = (128 + 128, 4 + 4, 4 + 4 + 1)
    reduction = (2 * 4 * 4 + 4) + (4 * 4 + 2)  # two rows of the eight are read
    gather, part = 16 + (16 + 64), 64 + 16
    assert count("h100.hlo") == {
        "launches": 6,  # two in a loop's body, one in its condition, an all-gather in two halves
        "copies": 1,
        "library_calls": 1,
        "all_gathers": 1,
        "bytes_accessed": convolution + copy + compare + reduction + gather + part,
        "temporary_bytes": 7,
        "largest_result": 128,
    }


def test_counts_of_a_tpus_program():
    assert count("tpu.hlo", {"bytes accessed": 1234.0}) == {
        # copy, fusion, convolution, slice, an all-gather in two pieces, two all-reduces (shard_map
        # gives all one channel), comparison, a branch (the other does nothing), permutation
        "launches": 11,
        "copies": 1,
        "convolutions": 1,
        "all_reduces": 2,
        "all_gathers": 1,
        "other_collectives": 1,
        "conditionals": 1,
        "bytes_accessed": 1234,
        "temporary_bytes": 7,
        "largest_result": 2 * 4 * 8 * 8 * 16,
    }
