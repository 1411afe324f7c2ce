"""Trains a small transformer on bytes, with `autoscale` before AdamW; here on Python's help pages.

Needs `pip install . flax matplotlib rich tyro`. `python examples/transformer.py --help` lists the
options. Put your text into `load_text` and your layers into `Block`; the rest can stay as it is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

from optax_autoscale import autoscale, default_layer_axes, exclude, layer_std, measure_effect

WIDTH, HEADS, DEPTH, CONTEXT, BATCH_SIZE = 128, 4, 4, 64, 12  # as nanoGPT on a CPU


def load_text() -> list[np.ndarray]:
    """Bytes to train on and, the last tenth, for validation; int32. No paragraph is in both."""
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = np.frombuffer("\n\n".join(paragraphs).encode(), np.uint8).astype(np.int32)
    return np.split(text, [len(text) * 9 // 10])


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        # Without biases, whose shape (heads, features) would make layers of them.
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Maps bytes, of shape (batch, length), to logits of the next ones, (batch, length, 256)."""

    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        keys = jax.random.split(rngs(), DEPTH)
        self.blocks = jax.vmap(lambda key: Block(nnx.Rngs(key)))(keys)  # stacked on a first axis
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return self.head(self.norm(x))


def stacked(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for `layer_axes` where `blocks` are stacked, from the rule for a single one."""

    def layer_axes(path: Any, leaf: Any) -> tuple[int, ...] | None:
        if not jax.tree_util.keystr(path, simple=True, separator="/").startswith("blocks/"):
            return rule(path, leaf)
        axes = rule(path, jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype))
        return None if axes is None else tuple(axis + 1 for axis in axes)

    return layer_axes


LAYERS, NO_EMBEDDINGS = stacked(default_layer_axes), stacked(exclude("embedding"))
METHODS = {
    "none": optax.identity(),
    "autoscale": autoscale(layer_axes=LAYERS),
    "autoscale_no_embeddings": autoscale(layer_axes=NO_EMBEDDINGS),
}


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up in the first twentieth of the steps and a cosine decay to a tenth."""
    schedule = (0.0, learning_rate, steps // 20, steps, learning_rate / 10)
    return optax.adamw(optax.warmup_cosine_decay_schedule(*schedule))


def windows(text: jax.Array, starts: jax.Array) -> jax.Array:
    """Parts of the text, (n, CONTEXT + 1), from these places on, (n,)."""
    return text[starts[:, None] + jnp.arange(CONTEXT + 1)]


@nnx.jit
def losses(model: Transformer, parts: jax.Array) -> jax.Array:
    """The cross-entropy of each byte but the first, in nats, (n, CONTEXT)."""
    logits = model(parts[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, parts[:, 1:])


@nnx.jit
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, rngs: nnx.Rngs, text: jax.Array
) -> tuple[jax.Array, Any]:
    """A step on random windows; returns the loss, and the deviation of each layer's gradient."""
    parts = windows(text, jax.random.randint(rngs(), (BATCH_SIZE,), 0, len(text) - CONTEXT))
    loss, grads = nnx.value_and_grad(lambda model: losses(model, parts).mean())(model)
    optimizer.update(model, grads)
    return loss, layer_std(nnx.to_pure_dict(grads), layer_axes=LAYERS)


def draw(history: Sequence[Any], path: Path) -> None:
    """Draws the standard deviation of each layer's gradient over the steps."""
    rows: dict[str, np.ndarray] = {}
    for keys, values in jax.tree.leaves_with_path(jax.tree.map(lambda *x: np.stack(x), *history)):
        name, by_step = jax.tree_util.keystr(keys, simple=True, separator="/"), values.T
        blocks = enumerate(by_step) if by_step.ndim > 1 else [("", by_step)]
        rows |= {f"{name} {block}".strip(): row for block, row in blocks}
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.stack([*rows.values()]), norm="log", aspect="auto")
    axes.set(xlabel="step", yticks=range(len(rows)), yticklabels=rows)
    figure.colorbar(image, label="standard deviation of the gradient")
    figure.savefig(path, dpi=150)


def main(
    method: Literal["none", "autoscale", "autoscale_no_embeddings"] = "autoscale_no_embeddings",
    learning_rate: float = 2e-3,
    steps: int = 2000,
    seed: int = 0,
    picture: Path | None = None,
) -> None:
    """Trains; `picture` is a file for the standard deviation of each layer's gradient."""
    train, validation = map(jnp.asarray, load_text())
    parts = windows(validation, jnp.arange(0, len(validation) - CONTEXT, CONTEXT))
    rngs, plain = nnx.Rngs(seed), adamw(learning_rate, steps)
    tx = measure_effect(optax.chain(METHODS[method], plain), plain)
    model, history = Transformer(rngs), []
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in track(range(1, steps + 1), "training"):
        loss, stds = train_step(model, optimizer, rngs, train)
        history.append(stds)
        if step % 100 == 0 or step == steps:
            names = ("norm_ratio", "cosine")  # of this step and AdamW's
            ratio, cosine = (optax.tree.get(optimizer.opt_state, name)[...] for name in names)
            print(
                f"step {step:4}: loss {loss:.3f}, validation {losses(model, parts).mean():.3f}, "
                f"norm ratio {ratio:.3f}, cosine {cosine:.3f}"
            )
    if picture:
        draw(jax.device_get(history), picture)


if __name__ == "__main__":
    tyro.cli(main)
