"""The programs that are compiled: those of `train.py`, and the updates of its methods alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import MODELS
from optax_autoscale import measure_effect
from training import devices
from training.data import random_dataset
from training.optimizers import METHODS, OPTIMIZERS
from training.options import recipe
from training.step import Program

# Where a parameter lies: its last axis but one, or its last, split over the devices that divide it.
SPLIT_AXES = {"replicated": None, "rows": -2, "columns": -1, "shard_map": -1}
# In `jax.shard_map` a method has to sum over the mesh itself.
WITH_AXIS_NAME = (
    *("autoscale", "scaling", "centering", "gradient_normalization", "zscore", "measure_effect"),
)
UPDATES = ("none", "clip", "gradient_centralization", *WITH_AXIS_NAME)


TRAINED = ("resnet20", "resnet56", "vgg16_bn", "vit")  # of which there are budgets


class Case(NamedTuple):
    """A program: an update of a method and AdamW, or a training step."""

    target: str  # "tpu" or "h100"
    precision: str  # of the network, or of an update's gradients and parameters
    kind: str  # "update" or "train"
    model: str  # whose step it is, or whose parameters are updated
    placement: str  # of the parameters: "replicated", "rows", "columns", "shard_map" or "fsdp"
    method: str = "autoscale"

    @property
    def name(self) -> str:
        """Such as `"tpu/float32/update/resnet56/rows/autoscale"`."""
        return "/".join(self)


def cases() -> list[Case]:
    """All programs, the quick ones to compile first."""
    updates = {
        ("h100", "float32", "update", "resnet56", "replicated"): UPDATES,
        ("tpu", "float32", "update", "resnet56", "rows"): UPDATES,
        ("tpu", "bfloat16", "update", "vit", "columns"): UPDATES,
        ("tpu", "bfloat16", "update", "vit", "shard_map"): WITH_AXIS_NAME,
    }
    return [
        *(Case(*fields, method) for fields, methods in updates.items() for method in methods),
        *(Case("h100", "bfloat16", "train", model, "replicated") for model in TRAINED),
        *(Case("h100", "float32", "train", model, "replicated") for model in TRAINED[:3]),
        *(Case("tpu", "bfloat16", "train", model, "replicated") for model in TRAINED),
        Case("tpu", "bfloat16", "train", "vit", "fsdp"),
    ]


def trace(case: Case, mesh: Mesh) -> Any:
    """Traces a program for the devices of a mesh, which need not be here."""
    if case.kind == "update":
        return _trace_update(case, mesh)
    experiment = dataclasses.replace(
        recipe("cifar100"), model=case.model, precision=case.precision, method=case.method
    )
    dataset, fsdp = random_dataset("cifar100"), case.placement == "fsdp"
    program = Program(experiment, dataset, mesh, fsdp=fsdp)
    everywhere = devices.replicated(mesh)

    def describe(leaf: Any, sharding: Any = everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(program.first_state)
    state = jax.tree.map(describe, state, devices.state_shardings(state, mesh, fsdp=fsdp))
    images = dataset.train_images.reshape(len(dataset.train_images), -1)
    data = describe(images), describe(dataset.train_labels)
    order = describe(jax.eval_shape(program.epoch_order, np.int32(1)))
    return program.train_step.trace(state, data, order)


def _trace_update(case: Case, mesh: Mesh) -> Any:
    make_model = MODELS[case.model].make
    model: Any = nnx.eval_shape(lambda: make_model(num_classes=100, rngs=nnx.Rngs(0)))
    tx = _transformation(case)
    split_axis = SPLIT_AXES[case.placement]

    def spec(leaf: Any) -> P:
        axes = leaf.ndim if split_axis is None else leaf.ndim + split_axis
        if split_axis is None or axes < 0 or leaf.shape[axes] % mesh.size:
            return P()
        return P(*[None] * axes, "data")

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec(leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, case.precision),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )
    arguments = (params, jax.eval_shape(tx.init, params), params)
    specs = jax.tree.map(spec, arguments)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if case.placement == "shard_map":
        update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), arguments[:2])
    # Nothing is donated: copies into the memory of arguments are not the method's.
    jitted: Any = jax.jit(update, out_shardings=shardings)
    return jitted.trace(*jax.tree.map(describe, arguments))


def _transformation(case: Case) -> optax.GradientTransformation:
    experiment = recipe("cifar100")
    adamw = OPTIMIZERS["adamw"].make(experiment.learning_rate, experiment.weight_decay)
    axis_name = "data" if case.placement == "shard_map" else None
    make: Any = METHODS["autoscale" if case.method == "measure_effect" else case.method].make
    method = make(axis_name=axis_name) if axis_name else make()
    tx = optax.chain(method, adamw)
    if case.method == "measure_effect":
        return measure_effect(tx, adamw, axis_name=axis_name)
    return tx
