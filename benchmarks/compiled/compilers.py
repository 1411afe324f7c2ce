"""The compilers of a TPU and of a GPU, neither of which has to be there."""

import os
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

PLATFORMS = {"tpu": "tpu", "h100": "cuda"}
PACKAGES = {
    "tpu": ("jax", "jaxlib", "libtpu"),
    "h100": ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
}
# Which kernel of a library is fastest, only a GPU could tell.
OPTIONS = {"tpu": {}, "h100": {"xla_gpu_autotune_level": "0"}}


def mesh(target: str) -> Mesh:
    """Eight chips of a TPU v5e (`"tpu"`) or one H100 (`"h100"`), as `train.py` arranges devices."""
    jax.config.update("jax_platforms", "cpu")  # what is here
    if target == "tpu":
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",  # which would ask Google's cloud about this machine
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        topology = topologies.get_topology_desc("v5e:2x4", "tpu")
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of the drivers
        config = Path(__file__).with_name("h100.textproto").read_text()
        topology = topologies.get_topology_desc(
            "h100", "cuda", target_config=config, topology="1x1x1"
        )
    return Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))


def versions(target: str) -> dict[str, str]:
    """The versions of what compiles for a target."""
    return {package: version(package) for package in PACKAGES[target]}
