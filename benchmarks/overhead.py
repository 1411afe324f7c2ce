"""What `chain(method, adamw)` costs beside `adamw` alone: one update, without a model around it.

    python -m benchmarks.overhead                     # all trees, a few minutes on a laptop
    python -m benchmarks.overhead --trees resnet56 --repeats 200

AdamW reads the gradient, the parameter and two moments of each entry and writes the last three: 28
bytes in float32. A method that must know all gradients before it changes the first reads them once
more: 4 bytes. Where memory is the limit, 32 / 28 = 1.14 is the least that such a method can take.
`measure_effect`, with AdamW as its own reference, has two more moments to read and write: 16 bytes.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from models import resnet56, vgg16_bn
from optax_autoscale import (
    EffectState,
    autoscale,
    center_layers,
    gradient_centralization,
    gradient_normalization,
    measure_effect,
    scale_by_global_std,
    zscore_normalization,
)

TreeName = Literal["resnet56", "vgg16_bn", "gpt2", "thousand"]


def concatenated() -> optax.GradientTransformation:
    """The method as one would first write it: concatenate, take the standard deviation, scale."""

    def update(updates: Any, params: Any) -> Any:
        del params
        eligible = [leaf for leaf in jax.tree.leaves(updates) if leaf.ndim > 1]
        std = jnp.std(jnp.concatenate([leaf.ravel() for leaf in eligible]), ddof=1)
        scale = (4.0 / (jnp.abs(jnp.log(std)) + 1e-8)) ** 2
        return jax.tree.map(
            lambda leaf: scale * (leaf - leaf.mean()) if leaf.ndim > 1 else leaf, updates
        )

    return optax.stateless(update)


ADAMW = optax.adamw(1e-3)
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw alone": optax.identity,
    "autoscale": autoscale,
    "its two halves": lambda: optax.chain(scale_by_global_std(), center_layers()),
    "concatenated": concatenated,
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "gradient_centralization": gradient_centralization,
    "gradient_normalization": gradient_normalization,
    "zscore_normalization": zscore_normalization,
    "measure_effect": lambda: measure_effect(ADAMW, ADAMW),  # around AdamW, not in front of it
}


def gpt2_small() -> dict[str, tuple[int, ...]]:
    """GPT-2 small, 124 million parameters: 50 matrices, 98 vectors."""
    d = 768
    block = {
        "norm1_scale": (d,),
        "norm1_bias": (d,),
        "qkv_kernel": (d, 3 * d),
        "qkv_bias": (3 * d,),
        "out_kernel": (d, d),
        "out_bias": (d,),
        "norm2_scale": (d,),
        "norm2_bias": (d,),
        "up_kernel": (d, 4 * d),
        "up_bias": (4 * d,),
        "down_kernel": (4 * d, d),
        "down_bias": (d,),
    }
    shapes = {f"block{i}_{name}": shape for i in range(12) for name, shape in block.items()}
    return shapes | {"tokens": (50257, d), "positions": (1024, d), "scale": (d,), "bias": (d,)}


def shapes_of(name: TreeName) -> dict[str, tuple[int, ...]]:
    if name == "gpt2":
        return gpt2_small()
    if name == "thousand":
        return {f"kernel{i}": (32, 32) for i in range(1000)}
    build = {"resnet56": resnet56, "vgg16_bn": vgg16_bn}[name]
    model = nnx.eval_shape(lambda: build(num_classes=100, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return {f"leaf{i}": leaf.shape for i, leaf in enumerate(leaves)}


class Row(NamedTuple):
    """One method on one tree."""

    method: str
    seconds: list[float]
    compile_seconds: float
    bytes_accessed: float
    temporary_bytes: int


def measure(name: TreeName, methods: list[str], repeats: int) -> tuple[int, int, list[Row]]:
    """Numbers of entries and leaves, and times, interleaved so that drift affects all."""
    shapes = shapes_of(name)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = {
        leaf: 1e-3 * jax.random.normal(key, shape)
        for key, (leaf, shape) in zip(keys, shapes.items(), strict=True)
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    # All methods share the parameters and AdamW's state: they are donated from one to the next.
    shared = (params, ADAMW.init(params))

    def update(tx: optax.GradientTransformation, shared: Any, state: Any, grads: Any) -> Any:
        params, adamw_state = shared
        if isinstance(state, EffectState):
            state = state._replace(tx_state=adamw_state)
            updates, state = tx.update(grads, state, params)
            adamw_state, state = state.tx_state, state._replace(tx_state=None)
        else:
            updates, state = tx.update(grads, state, params)
            updates, adamw_state = ADAMW.update(updates, adamw_state, params)
        return (optax.apply_updates(params, updates), adamw_state), state

    programs, rows, states = [], [], []
    for method in methods:
        tx = METHODS[method]()
        state = tx.init(params)
        if isinstance(state, EffectState):
            state = state._replace(tx_state=None)
        start = time.perf_counter()
        program = jax.jit(partial(update, tx), donate_argnums=(0, 1))
        compiled = program.lower(shared, state, grads).compile()
        seconds = time.perf_counter() - start
        cost: Any = compiled.cost_analysis() or {}
        memory = compiled.memory_analysis()
        temporary = 0 if memory is None else memory.temp_size_in_bytes
        rows.append(Row(method, [], seconds, cost.get("bytes accessed", float("nan")), temporary))
        programs.append(compiled)
        states.append(state)
    for repeat in range(repeats + 1):
        for index, row in enumerate(rows):
            start = time.perf_counter()
            shared, states[index] = programs[index](shared, states[index], grads)
            jax.block_until_ready(shared)
            if repeat:  # the first touches the memory
                row.seconds.append(time.perf_counter() - start)
    return sum(leaf.size for leaf in grads.values()), len(grads), rows


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
        entries, leaves, rows = measure(name, list(methods), repeats)
        base = statistics.median(rows[0].seconds)
        print(f"\n{name}: {entries:,} entries in {leaves} leaves\n")
        print(
            "| method | ms, median (quartiles) | ratio | compile, s | bytes an entry | temporary |"
        )
        print("|---|---|---|---|---|---|")
        for row in rows:
            low, median, high = statistics.quantiles(row.seconds, n=4)
            print(
                f"| {row.method} | {1e3 * median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f}) "
                f"| {median / base:.2f} | {row.compile_seconds:.1f} "
                f"| {row.bytes_accessed / entries:.1f} | {row.temporary_bytes / 2**20:.1f} MiB |"
            )


if __name__ == "__main__":
    tyro.cli(main)
