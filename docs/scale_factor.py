"""Draws the scale factor over the standard deviation of the gradients, for `method.md`."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from optax_autoscale import scale_by_global_std


def scale_factor(std, exponent, **kwargs):
    grads = std * jnp.array([[-1.0, 1.0]]) / jnp.sqrt(2)  # their standard deviation is `std`
    tx = scale_by_global_std(**kwargs)
    state = tx.init(grads)._replace(exponent=jnp.int32(exponent))
    return tx.update(grads, state)[1].scale_factor


distances = np.geomspace(1e-3, 14, 400)  # of ln s from the singularity
std = np.exp(np.concatenate([-distances[::-1], distances])).astype(np.float32)
figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
for exponent, color in (2, "#0072B2"), (1, "#D55E00"):
    factors = jax.vmap(lambda s, p=exponent: scale_factor(s, p))(std)
    axes.plot(std, factors, color=color, label=f"$p = {exponent}$")
factors = jax.vmap(lambda s: scale_factor(s, 2, max_scale=1.0))(std)
axes.plot(std, factors, "k:", label="$p = 2$, max_scale=1.0")
axes.axvspan(np.exp(-4), np.exp(4), color="k", alpha=0.07, label="$e^{-4} < s_t < e^4$")
axes.axhline(0.5, color="k", linewidth=0.6, linestyle="--", label="$a_1 = 0.5$")
axes.set(xscale="log", yscale="log", xlim=(std[0], std[-1]), ylim=(0.07, 2e3))
axes.set(xlabel="standard deviation of the gradients, $s_t$", ylabel="scale factor $a_t$")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
