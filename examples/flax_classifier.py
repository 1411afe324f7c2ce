"""Trains a Flax model of your own on NumPy arrays of your own; here rings, in seconds.

Needs Flax: `pip install . flax`. Run it with `python examples/flax_classifier.py`, then put your
arrays into `load_data` and your layers into `Classifier`. The rest can stay as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_autoscale import autoscale


def load_data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of shape (n, features) and dtype float32, integer labels of shape (n,)."""
    inputs = rng.uniform(-2, 2, size=(2000, 2)).astype(np.float32)
    return inputs, np.linalg.norm(inputs, axis=1).round().astype(np.int32)


class Classifier(nnx.Module):
    def __init__(self, features: int, classes: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(features, 256, rngs=rngs)
        self.norm = nnx.BatchNorm(256, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(256, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.hidden(x))))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(epochs: int = 20, batch_size: int = 50) -> None:
    rng = np.random.default_rng(seed=0)
    x, y = (jnp.asarray(array) for array in load_data(rng))
    (train_x, test_x), (train_y, test_y) = jnp.split(x, [1500]), jnp.split(y, [1500])
    model = Classifier(x.shape[-1], int(y.max()) + 1, nnx.Rngs(0))
    tx = optax.chain(autoscale(max_scale=1.0), optax.adamw(1e-2))  # s_t is often above e^-4 here
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for epoch in range(1, epochs + 1):
        model.train()
        batches = np.array_split(rng.permutation(len(train_x)), len(train_x) // batch_size)
        loss = np.mean([train_step(model, optimizer, train_x[b], train_y[b]) for b in batches])
        model.eval()
        accuracy = jnp.mean(model(test_x).argmax(-1) == test_y)
        scale = optax.tree.get(optimizer.opt_state, "scale_factor")[...]
        print(f"epoch {epoch:2}: loss {loss:.3f}, test accuracy {accuracy:.1%}, scale {scale:.3f}")


if __name__ == "__main__":
    main()
