"""`python -m optax_autoscale` shows versions, devices and a self-check.

The self-check compares the library, on this machine's devices, with the paper's equations in plain
Python. The exit code is 1 if anything differs.
"""

import math
import platform
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_autoscale import __version__, autoscale, center_layers, scale_by_global_std


def main() -> int:
    print(
        f"optax_autoscale {__version__}, jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}"
    )
    print("devices:", *jax.devices(), end="\n\n")
    failures = 0
    for what, passed in checks():
        print("ok  " if passed else "FAIL", what)
        failures += not passed
    print("\nall checks passed" if failures == 0 else f"\n{failures} of the checks failed")
    return min(failures, 1)


def checks() -> Iterator[tuple[str, bool]]:
    devices = jax.local_devices()
    kernel = jnp.sin(jnp.arange(24.0 * len(devices))).reshape(len(devices), 24) / 300
    grads = {"kernel": kernel, "bias": jnp.cos(jnp.arange(24.0))}

    entries = kernel.ravel().tolist()
    std, mean = statistics.stdev(entries), statistics.fmean(entries)
    ratio = 4 / (abs(math.log(std)) + 1e-8)  # ratio**2 is below 0.5: the exponent becomes 1
    centered = jnp.array([entry - mean for entry in entries]).reshape(kernel.shape)

    first, state = first_step(autoscale(), grads)
    yield "global standard deviation of the weights' gradients", close(state.global_std, std)
    yield "scale factor of the first step", close(state.scale_factor, ratio**2)
    yield "exponent of later steps", int(state.exponent) == 1
    yield "weights: centered and scaled", close(first["kernel"], ratio**2 * centered)
    yield "biases: unchanged", bool(jnp.array_equal(first["bias"], grads["bias"]))

    update = jax.jit(autoscale().update)
    second, _ = update(grads, state)
    yield "second step, with its exponent", close(second["kernel"], ratio * centered)
    zeros, _ = update(jax.tree.map(jnp.zeros_like, grads), state)
    yield "gradients of 0: updates of 0", not any(jnp.any(leaf) for leaf in zeros.values())

    halves, _ = first_step(optax.chain(scale_by_global_std(), center_layers()), grads)
    yield "its two halves, one after the other", close(halves["kernel"], first["kernel"])
    bounded, _ = first_step(autoscale(max_scale=0.25), grads)
    yield "max_scale", close(bounded["kernel"], 0.25 * centered)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("devices",), auto, devices=devices)
    rows = jax.NamedSharding(mesh, jax.P("devices"))
    sharded, _ = first_step(autoscale(), grads | {"kernel": jax.device_put(kernel, rows)})
    yield f"sharded over {len(devices)} device(s)", close(sharded["kernel"], first["kernel"])


def first_step(tx: optax.GradientTransformation, grads: dict[str, jax.Array]) -> tuple[Any, Any]:
    return jax.jit(tx.update)(grads, tx.init(grads))


def close(actual: jax.Array, expected: jax.typing.ArrayLike) -> bool:
    return bool(jnp.allclose(actual, expected, rtol=1e-4, atol=1e-8))


if __name__ == "__main__":
    sys.exit(main())
