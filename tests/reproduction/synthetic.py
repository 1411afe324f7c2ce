"""Records of a study with chosen outcomes."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduction.studies import STUDIES
from training.record import SCHEMA

# Final accuracies by seed, of the arm (model, method, optimizer) or, of the one with this weight
# decay, (model, method, optimizer, weight decay); None for a run that diverged.
Outcomes = Mapping[tuple, Sequence[float | None]]


def write(
    folder: Path,
    study: str,
    outcomes: Outcomes,
    epochs: int = 3,
    record: Mapping[str, Any] | None = None,
    **description: Any,
) -> None:
    """Writes the records of a study's planned runs whose outcomes are given.

    Args:
      folder: of the study.
      study: its name.
      outcomes: final test accuracies, 0 to 1.
      epochs: of each run.
      record: changes to the record of an epoch: a value, or a function of the epoch.
      description: changes to the description of a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in STUDIES[study].experiments():
        arm = (run.model, run.method, run.optimizer)
        values = outcomes.get((*arm, run.weight_decay), outcomes.get(arm, ()))
        if run.seed >= len(values):
            continue
        final = values[run.seed]
        about = {
            "schema": SCHEMA,
            "config": dataclasses.asdict(dataclasses.replace(run, epochs=epochs)),
            "command": "python train.py",
            "num_classes": 10,
            "channels": 1,
            "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
            "device": "cpu",
            "device_count": 2,
            "commit": "f2f4ca1a5ec737719d3260e2e7f02ed80c563a95",
            "diverged": "step 7: the training loss is nan; hint" if final is None else None,
        } | description
        lines = [about]
        for epoch in range(1, epochs + 1):
            if final is None:
                break
            changes = {
                key: value(epoch) if callable(value) else value
                for key, value in (record or {}).items()
            }
            lines.append(
                {
                    "epoch": epoch,
                    "step": 10 * epoch,
                    "train_loss": 2.0 / epoch,
                    "test_loss": 1.0,
                    "learning_rate": 1e-3,
                    "test_accuracy": final * epoch / epochs,
                    "global_std": math.exp(-4 - epoch * (1 + run.seed / 10) / 10),
                    "scale_factor": 0.5,
                    "exponent": 2 - run.seed % 2 if "autoscale" in run.method else None,
                    "layer_std": {"stem": 0.1 / epoch, "classifier": 0.2 * epoch},
                    "images_per_second": 640.0,
                    "seconds": 1.0,
                }
                | changes
            )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{run.name}.jsonl").write_text(text)
