import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.overhead import ADAMW, METHODS, measure, shapes_of, update


def test_gpt2_small_is_as_large_as_the_published_one():
    shapes = shapes_of("gpt2")
    assert (sum(map(np.prod, shapes)), len(shapes)) == (124_439_808, 148)


@pytest.mark.parametrize("method", ["autoscale", "measure_effect"])
def test_an_update_is_adamws_after_the_method(method):
    params = [jnp.ones((4, 3)), jnp.ones(3)]
    grads = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(params)]
    tx = METHODS[method]()
    (found, _), _ = update(tx, (params, ADAMW.init(params)), tx.init(params), grads)
    chain = ADAMW if method == "measure_effect" else optax.chain(METHODS[method](), ADAMW)
    updates, _ = chain.update(grads, chain.init(params), params)
    for leaf, expected in zip(found, optax.apply_updates(params, updates), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)
    assert measure([(8, 4)], ("adamw alone", method), repeats=2)[0]["ratio"] == "1.00"
