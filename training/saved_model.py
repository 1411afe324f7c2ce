"""The final parameters of a run."""

import json
import os
from pathlib import Path

from flax import nnx
from orbax.checkpoint import v1 as ocp

from models import MODELS
from training.checkpoints import CheckpointError, first_line, is_full

VARIABLES = (nnx.Param, nnx.BatchStat)


def save_model(folder: Path, model: nnx.Module) -> None:
    """Saves a network's variables to `parameters/`; every process of a run takes part.

    Raises:
      CheckpointError: if they cannot be written.
    """
    path = folder / "parameters"
    try:
        ocp.save(str(path.absolute()), nnx.state(model, VARIABLES), overwrite=True)
    except Exception as error:
        remedy = "free some space and resume" if is_full(error) else "resume"
        raise CheckpointError(
            f"{path} could not be written ({first_line(error)}); {remedy} with --resume"
        ) from error


def load_model(folder: str | os.PathLike[str]) -> nnx.Module:
    """The trained model of a finished run, in evaluation mode.

    Args:
      folder: the run's folder.

    Returns:
      The network that `config.json` describes, with the parameters that the run ended with.
    """
    description = json.loads(Path(folder, "config.json").read_text())
    experiment = description["config"]
    model = MODELS[experiment["model"]].make(
        num_classes=description["num_classes"],
        channels=description["channels"],
        dtype=experiment["precision"],
        rngs=nnx.Rngs(experiment["seed"]),
    )
    path = Path(folder).absolute() / "parameters"
    nnx.update(model, ocp.load(str(path), nnx.state(model, VARIABLES)))
    model.eval()
    return model
