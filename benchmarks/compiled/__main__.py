"""Compiles our programs for a TPU and a GPU, and compares what they consist of with budgets.

    make accelerators                                     # all programs: 20 minutes, the first time
    make accelerators ARGS='--only h100 tpu/update/vit'   # all of the H100, and some of the TPU

No accelerator is needed, and nothing runs: the programs are compiled for eight chips of a TPU v5e
and for one H100, by their own compilers. `counts.py` says what is counted, `budgets.toml` how much
there may be.

`counts.json` has the numbers, each program's as soon as it is compiled. A program whose lowered
source has not changed is not compiled again; delete the file to compile all of them.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from filelock import FileLock

from benchmarks.compiled import budgets, compilers, counts, programs

COUNTS = Path(__file__).with_name("counts.json")
BUDGETS = Path(__file__).with_name("budgets.toml")


def main(only: tuple[str, ...] = ()) -> None:
    """Compiles our programs for a TPU and a GPU, and compares what they consist of with budgets.

    Args:
      only: leave out all programs but those with all parts of one of these in their names:
        tpu/update, train/resnet20/h100.
    """
    limits = tomllib.loads(BUDGETS.read_text())["budget"]
    cases = programs.cases()
    for text in (*only, *(text for budget in limits for text in budget["programs"])):
        if not any(budgets.matches(case, [text]) for case in cases):
            sys.exit(f"no program has all parts of {text!r} in its name")
    chosen = [case for case in cases if not only or budgets.matches(case, only)]
    kept = json.loads(COUNTS.read_text())["programs"] if COUNTS.exists() else {}
    known = {case.name: kept[case.name] for case in cases if case.name in kept}

    mesh = functools.cache(compilers.mesh)
    # libtpu aborts where another process uses it.
    with FileLock(Path(tempfile.gettempdir(), "optax_autoscale_accelerators.lock")):
        for case in chosen:
            start = time.perf_counter()
            platform, options = compilers.PLATFORMS[case.target], compilers.OPTIONS[case.target]
            traced = programs.trace(case, mesh(case.target))
            lowered = traced.lower(lowering_platforms=(platform,))
            identity = fingerprint(lowered, case.target)
            if known.get(case.name, {}).get("fingerprint") != identity:
                counted = dataclasses.asdict(counts.count(lowered.compile(options)))
                known[case.name] = {"fingerprint": identity, **counted}
                save(known)
            numbers = ", ".join(
                f"{column} {value:,}"
                for column, value in known[case.name].items()
                if value and column != "fingerprint"
            )
            print(f"{case.name} ({time.perf_counter() - start:.0f} s): {numbers}", flush=True)

    exceeded = list(budgets.exceeded({case: known[case.name] for case in chosen}, limits))
    print(*exceeded, f"{len(chosen)} programs, {len(exceeded)} numbers above budget", sep="\n")
    sys.exit(bool(exceeded))


def fingerprint(lowered: Any, target: str) -> str:
    """A hash of all that a program's numbers come from."""
    known = [counts.VERSION, compilers.versions(target), compilers.OPTIONS[target]]
    return hashlib.sha256((json.dumps(known) + lowered.as_text()).encode()).hexdigest()[:16]


def save(known: Mapping[str, Any]) -> None:
    """Writes all numbers, a line for each program, in the order of their names."""
    versions = {target: compilers.versions(target) for target in compilers.PLATFORMS}
    lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
    part = COUNTS.with_suffix(".part")
    part.write_text(
        f'{{"versions": {json.dumps(versions)},\n"programs": {{\n' + ",\n".join(lines) + "\n}}\n"
    )
    part.replace(COUNTS)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
