"""Compiles our programs for a TPU and a GPU, and holds what they consist of to budgets.

    make accelerators                                     # all programs: hours, the first time
    make accelerators ARGS='--only h100 tpu/update/vit'   # all of the H100, and some of the TPU

No accelerator is needed, and nothing runs: eight chips of a TPU v5e and one H100 are compiled for,
by their own compilers. `counts.py` says what is counted, `budgets.toml` how much there may be.

The numbers go to `benchmarks/accelerators.json`, each program's as soon as it is compiled. One that
is there, and whose source is the same once it is lowered, is not compiled again.
"""

import dataclasses
import hashlib
import json
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks.accelerators import budgets as budgets_module
from benchmarks.accelerators import compilers, counts, programs

FOLDER = Path(__file__).parent
COLUMNS = {  # of the table; the file has all
    "launches": "launches",
    "copies": "copies",
    "library_calls": "library",
    "all_reduces": "all-reduce",
    "all_gathers": "all-gather",
    "other_collectives": "other",
    "conditionals": "branches",
    "bytes_accessed": "MB accessed",
    "temporary_bytes": "MB temporary",
}


def main(
    only: tuple[str, ...] = (),
    fresh: bool = False,
    output: Path = FOLDER.parent / "accelerators.json",
    budgets: Path = FOLDER / "budgets.toml",
) -> None:
    """Compiles our programs for a TPU and a GPU, and holds what they consist of to budgets.

    Args:
      only: leave out all programs but those with all parts of one of these in their names:
        tpu/update, train/resnet20/h100.
      fresh: compile also what has not changed.
      output: where the numbers are kept.
      budgets: how much there may be.
    """
    everything, limits = programs.cases(), tomllib.loads(budgets.read_text())["budget"]
    try:
        chosen = budgets_module.select(everything, only) if only else everything
        for budget in limits:
            budgets_module.select(everything, budget["programs"])
    except ValueError as error:
        sys.exit(str(error))
    kept = json.loads(output.read_text())["programs"] if output.exists() else {}
    known = {case.name: kept[case.name] for case in everything if case.name in kept}

    width = max(len(case.name) for case in chosen)
    print(f"{'program':{width}}", *COLUMNS.values())
    with compilers.alone():
        meshes = {target: compilers.mesh(target) for target in {case.target for case in chosen}}
        for index, case in enumerate(chosen):
            print(f"{index + 1} of {len(chosen)}: {case.name} ...", file=sys.stderr, flush=True)
            start = time.perf_counter()
            lowered = compilers.lower(programs.trace(case, meshes[case.target]), case.target)
            identity = fingerprint(lowered, case.target)
            if fresh or known.get(case.name, {}).get("fingerprint") != identity:
                counted = counts.count(compilers.compile(lowered, case.target))
                known[case.name] = {"fingerprint": identity, **dataclasses.asdict(counted)}
                save(output, known)
            print(f"{case.name:{width}}", *cells(known[case.name]), flush=True)
            print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    exceeded = list(
        budgets_module.exceeded({case.name: known[case.name] for case in chosen}, limits)
    )
    print(
        *exceeded, f"{len(chosen)} programs, {len(exceeded)} numbers above their budget", sep="\n"
    )
    sys.exit(bool(exceeded))


def fingerprint(lowered: Any, target: str) -> str:
    """A hash of all that a program's numbers come from."""
    known = [counts.VERSION, compilers.versions(target), compilers.OPTIONS[target]]
    return hashlib.sha256((json.dumps(known) + lowered.as_text()).encode()).hexdigest()[:16]


def cells(counted: Mapping[str, Any]) -> list[str]:
    """A line of the table, without the program's name."""
    return [
        f"{counted[column] / 1e6:{len(title)}.1f}"
        if title.startswith("MB")
        else f"{counted[column]:{len(title)}}"
        for column, title in COLUMNS.items()
    ]


def save(output: Path, known: Mapping[str, Any]) -> None:
    """Writes all numbers, a line for each program, in the order of their names."""
    versions = {target: compilers.versions(target) for target in compilers.PLATFORMS}
    lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
    part = output.with_suffix(".part")
    part.write_text(
        f'{{"versions": {json.dumps(versions)},\n"programs": {{\n' + ",\n".join(lines) + "\n}}\n"
    )
    part.replace(output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
