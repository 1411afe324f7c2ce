"""Trains an Equinox model of your own on NumPy arrays of your own: here on noisy oscillations.

Needs Equinox: `pip install . equinox`. Run it with `python examples/equinox_recurrent.py`, then put
your arrays into `load_data` and your layers into `Recurrent`. The rest can stay as it is.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_autoscale import autoscale


def load_data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Float32 sequences of shape (n, length, 1) and targets of shape (n, 1): frequencies."""
    frequency, phase = rng.uniform(0.1, 1, size=(2000, 1)), rng.uniform(0, 6, size=(2000, 1))
    sequences = np.sin(frequency * np.arange(32) + phase) + rng.normal(0, 0.1, size=(2000, 32))
    return sequences[..., None].astype(np.float32), frequency.astype(np.float32)


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, sequence: jax.Array) -> jax.Array:
        hidden, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(32), sequence)
        return self.head(hidden)


TX = optax.chain(autoscale(), optax.adam(1e-2))


@eqx.filter_jit
def train_step(model: Recurrent, state: optax.OptState, x: jax.Array, y: jax.Array):
    def loss_fn(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    updates, state = TX.update(eqx.filter_grad(loss_fn)(model), state)
    return eqx.apply_updates(model, updates), state


def main(epochs: int = 10, batch_size: int = 50) -> None:
    rng = np.random.default_rng(seed=0)
    x, y = (jnp.asarray(array) for array in load_data(rng))
    (train_x, test_x), (train_y, test_y) = jnp.split(x, [1500]), jnp.split(y, [1500])
    keys = jax.random.split(jax.random.key(0))
    model = Recurrent(eqx.nn.GRUCell(1, 32, key=keys[0]), eqx.nn.Linear(32, 1, key=keys[1]))
    state = TX.init(eqx.filter(model, eqx.is_inexact_array))
    for epoch in range(1, epochs + 1):
        for batch in np.array_split(rng.permutation(len(train_x)), len(train_x) // batch_size):
            model, state = train_step(model, state, train_x[batch], train_y[batch])
        error = jnp.mean(jnp.abs(jax.vmap(model)(test_x) - test_y))
        scale = optax.tree.get(state, "scale_factor")
        print(f"epoch {epoch:2}: test error {error:.3f}, scale {scale:.3f}")


if __name__ == "__main__":
    main()
