"""What `chain(method, adamw)` costs compared with `adamw` alone: one update, without a model.

    python -m benchmarks.overhead                     # all trees, a few minutes on a laptop
    python -m benchmarks.overhead --trees resnet56 --repeats 200

AdamW reads the gradient, the parameter and two moments of each entry and writes the last three: 28
bytes in float32. A method that must know all gradients before it changes the first reads them once
more: 4 bytes. Where memory is the limit, 32 / 28 = 1.14 is the least that such a method can take.
`measure_effect`, with AdamW as its own reference, has two more moments to read and write: 16 bytes.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks.timing import interleaved, milliseconds, table
from models import resnet56, vgg16_bn
from optax_autoscale import (
    EffectState,
    autoscale,
    gradient_centralization,
    gradient_normalization,
    measure_effect,
    zscore_normalization,
)

TreeName = Literal["resnet56", "vgg16_bn", "gpt2", "thousand"]

ADAMW = optax.adamw(1e-3)
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw alone": optax.identity,
    "autoscale": autoscale,
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "gradient_centralization": gradient_centralization,
    "gradient_normalization": gradient_normalization,
    "zscore_normalization": zscore_normalization,
    "measure_effect": lambda: measure_effect(ADAMW, ADAMW),  # around AdamW, not in front of it
}


def shapes_of(name: TreeName) -> list[tuple[int, ...]]:
    """The shapes of a tree's leaves; GPT-2 small has 124 million entries in 148 leaves."""
    if name == "gpt2":
        d = 768
        kernels = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
        block = [*kernels, *((kernel[1],) for kernel in kernels), *[(d,)] * 4]
        return [(50257, d), (1024, d), (d,), (d,), *block * 12]
    if name == "thousand":
        return [(32, 32)] * 1000
    build = {"resnet56": resnet56, "vgg16_bn": vgg16_bn}[name]
    model = nnx.eval_shape(lambda: build(num_classes=100, rngs=nnx.Rngs(0)))
    return [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def update(tx: optax.GradientTransformation, shared: Any, state: Any, grads: Any) -> Any:
    """An update of AdamW after `tx`; `shared` is the parameters and AdamW's state."""
    params, adamw_state = shared
    if isinstance(state, EffectState):
        updates, state = tx.update(grads, state._replace(tx_state=adamw_state), params)
        adamw_state, state = state.tx_state, state._replace(tx_state=None)
    else:
        updates, state = tx.update(grads, state, params)
        updates, adamw_state = ADAMW.update(updates, adamw_state, params)
    return (optax.apply_updates(params, updates), adamw_state), state


def measure(shapes: list[tuple[int, ...]], methods: tuple[str, ...], repeats: int) -> list[Any]:
    """The rows of a table; the first method is what the others are compared with."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = [1e-3 * jax.random.normal(*args) for args in zip(keys, shapes, strict=True)]
    params = jax.tree.map(jnp.zeros_like, grads)
    entries = sum(leaf.size for leaf in grads)
    # All methods share the parameters and AdamW's state: they are donated from one to the next.
    shared = (params, ADAMW.init(params))
    programs, states, rows = {}, {}, []

    def call(method: str) -> None:
        nonlocal shared
        shared, states[method] = programs[method](shared, states[method], grads)
        jax.block_until_ready(shared)

    for method in methods:
        tx = METHODS[method]()
        state: Any = tx.init(params)
        if isinstance(state, EffectState):
            state = state._replace(tx_state=None)
        start = time.perf_counter()
        lowered = jax.jit(partial(update, tx), donate_argnums=(0, 1)).lower(shared, state, grads)
        programs[method], states[method] = lowered.compile(), state
        seconds = time.perf_counter() - start
        cost: Any = programs[method].cost_analysis() or {}
        temporary = programs[method].memory_analysis().temp_size_in_bytes
        rows.append(
            {
                "compile, s": f"{seconds:.1f}",
                "bytes an entry": f"{cost.get('bytes accessed', np.nan) / entries:.1f}",
                "temporary, MiB": f"{temporary / 2**20:.1f}",
            }
        )
    calls = {method: partial(call, method) for method in methods}
    times = {name: seconds[:, 0] for name, seconds in interleaved(calls, repeats).items()}
    base = np.median(times[methods[0]])
    return [
        {
            "method": method,
            "ms": milliseconds(times[method]),
            "ratio": f"{np.median(times[method]) / base:.2f}",
            **row,
        }
        for method, row in zip(methods, rows, strict=True)
    ]


def main(
    trees: tuple[TreeName, ...] = ("resnet56", "vgg16_bn", "gpt2", "thousand"),
    methods: tuple[str, ...] = tuple(METHODS),
    repeats: int = 20,
) -> None:
    """Times one update of AdamW with and without each method in front of it.

    Args:
      trees: whose parameters: ResNet-56, VGG-16-BN, GPT-2 small, a thousand small matrices.
      methods: what is put in front of AdamW; the first one is what the others are compared with.
      repeats: timed updates of each method.
    """
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device.device_kind}, n = {repeats}")
    for name in trees:
        shapes = shapes_of(name)
        entries = sum(map(np.prod, shapes))
        print(f"\n{name}: {entries:,} entries in {len(shapes)} leaves\n")
        print(table(measure(shapes, methods, repeats)), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
