"""Draws the standard deviation of every layer's gradient while a small transformer learns.

Needs `pip install . flax matplotlib`. `python examples/transformer_gradients.py` saves a picture.
"""

from pydoc_data.topics import topics  # Python's help pages: the text that it learns to continue

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

from optax_autoscale import autoscale, layer_std


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, width, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss, layer_std(nnx.to_pure_dict(grads))


def main(steps: int = 200, depth: int = 4) -> None:
    rngs, text = nnx.Rngs(0), jnp.array([*"".join(topics.values()).encode()])
    blocks = [*(Block(64, rngs) for _ in range(depth)), nnx.LayerNorm(64, rngs=rngs)]
    model = nnx.Sequential(nnx.Embed(256, 64, rngs=rngs), *blocks, nnx.Linear(64, 256, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.chain(autoscale(), optax.adamw(3e-3)), wrt=nnx.Param)
    history = []
    for step in range(1, steps + 1):
        tokens = text[jax.random.randint(rngs(), (16, 1), 0, len(text) - 64) + jnp.arange(65)]
        loss, std = train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:])
        history.append(jax.tree_util.tree_leaves_with_path(std))
        if step % 20 == 0:
            print(f"step {step:3}: loss {loss:.3f}")
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in history[0]]
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    image = axes.imshow(jnp.array([[value for _, value in std] for std in history]).T, norm="log")
    axes.set(aspect="auto", xlabel="step", yticks=range(len(names)), yticklabels=names)
    figure.colorbar(image, label="standard deviation of the gradient")
    figure.savefig("transformer_gradients.png", dpi=150)


if __name__ == "__main__":
    main()
