"""The programs that are compiled: those of `train.py`, and the updates of its methods alone."""

import dataclasses
import itertools
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
from training.config import recipe
from training.data import random_dataset
from training.optimizers import METHODS, OPTIMIZERS
from training.program import Program

PRECISIONS = ("float32", "bfloat16")
TREES = ("resnet56", "vit")
# Those of `training.optimizers` that differ in what they compute, and the effect of `autoscale`.
UPDATES = (
    *("none", "autoscale", "scaling", "centering", "gradient_centralization"),
    *("gradient_normalization", "zscore", "clip", "measure_effect"),
)
# Where a parameter lies: its last axis but one, or its last, split over the devices that divide it.
SPLIT_AXES = {"replicated": None, "rows": -2, "columns": -1, "shard_map": -1}
# In `jax.shard_map` a method has to sum over the mesh itself.
WITH_AXIS_NAME = ("autoscale", "scaling", "centering", "gradient_normalization", "zscore")


class Case(NamedTuple):
    """A program: an update, or a step of training or of evaluation."""

    target: str  # "tpu" or "h100"
    precision: str  # of the network, or of an update's gradients and parameters
    kind: str  # "update", "train" or "eval"
    model: str  # whose step it is, or whose parameters are updated
    placement: str  # of the parameters: "replicated", "rows", "columns", "shard_map" or "fsdp"
    method: str = "autoscale"
    optimizer: str = "adamw"  # or "alone": the method without an optimizer

    @property
    def name(self) -> str:
        """Such as `"tpu/float32/update/vit/rows/autoscale/adamw"`."""
        return "/".join(self)


def cases() -> list[Case]:
    """All programs, the quick ones to compile first."""
    updates = [
        Case(*fields)
        for fields in itertools.product(
            ("tpu", "h100"), PRECISIONS, ["update"], TREES, SPLIT_AXES, UPDATES, ("adamw", "alone")
        )
    ]
    steps = [
        Case(target, precision, kind, model, placement)
        for model in MODELS
        for kind in ("train", "eval")
        for precision in PRECISIONS
        for target, placement in (("h100", "replicated"), ("tpu", "replicated"), ("tpu", "fsdp"))
    ]
    return [case for case in updates + steps if _exists(case)]


def _exists(case: Case) -> bool:
    if (case.method, case.optimizer) == ("none", "alone"):
        return False
    if case.target == "h100" and case.placement != "replicated":
        return False
    # One mean per output feature needs no other device's; clipping would need an axis name.
    return not (case.placement == "shard_map" and case.method == "clip")


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

    def describe_data(images: np.ndarray, labels: np.ndarray) -> Any:
        return describe(images.reshape(len(images), -1)), describe(labels)

    state = jax.eval_shape(program.first_state)
    state = jax.tree.map(describe, state, devices.state_shardings(state, mesh, fsdp=fsdp))
    if case.kind == "eval":
        data = describe_data(dataset.test_images, dataset.test_labels)
        return program.eval_function.trace(state, data, np.int32(0))
    data = describe_data(dataset.train_images, dataset.train_labels)
    order = describe(jax.eval_shape(program.epoch_order, np.int32(1)))
    return program.train_functions[False].trace(state, data, order)


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
    state = jax.eval_shape(tx.init, params)
    arguments = (params, state, params)
    specs = jax.tree.map(spec, arguments)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates if case.optimizer == "alone" else optax.apply_updates(params, updates), state

    if case.placement == "shard_map":
        update = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), arguments[:2])
    # Nothing is donated: copies into the memory of arguments are not the method's.
    jitted: Any = jax.jit(update, out_shardings=shardings)
    return jitted.trace(*jax.tree.map(describe, arguments))


def _transformation(case: Case) -> optax.GradientTransformation:
    experiment = recipe("cifar100")
    rate, decay = experiment.learning_rate, experiment.weight_decay
    method = "autoscale" if case.method == "measure_effect" else case.method
    in_shard_map = case.placement == "shard_map"
    axis_name = "data" if in_shard_map else None
    make: Any = METHODS[method].make
    tx = make(axis_name=axis_name) if in_shard_map and method in WITH_AXIS_NAME else make()
    optimizer = optax.identity()
    if case.optimizer != "alone":
        optimizer = OPTIMIZERS[case.optimizer].make(rate, decay)
        tx = optax.chain(tx, optimizer)
    return (
        measure_effect(tx, optimizer, axis_name=axis_name)
        if case.method == "measure_effect"
        else tx
    )
