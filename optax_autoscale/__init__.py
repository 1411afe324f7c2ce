"""Gradient autoscaled normalization (arXiv 2509.03677) as an Optax gradient transformation."""

from importlib.metadata import version as _version

from optax_autoscale._autoscale import (
    AutoscaleState,
    autoscale,
    center_layers,
    scale_by_global_std,
)
from optax_autoscale._baselines import (
    gradient_centralization,
    gradient_normalization,
    zscore_normalization,
)
from optax_autoscale._effect import EffectState, EffectSums, measure_effect
from optax_autoscale._moments import (
    default_layer_axes,
    exclude,
    global_std,
    layer_std,
    layers,
)

__version__ = _version("optax-autoscale")

__all__ = [
    "AutoscaleState",
    "EffectState",
    "EffectSums",
    "autoscale",
    "center_layers",
    "default_layer_axes",
    "exclude",
    "global_std",
    "gradient_centralization",
    "gradient_normalization",
    "layer_std",
    "layers",
    "measure_effect",
    "scale_by_global_std",
    "zscore_normalization",
]
