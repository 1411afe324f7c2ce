import jax
import pytest
from jax.sharding import AxisType

from benchmarks.compiled import counts, programs
from benchmarks.compiled.programs import Case


@pytest.mark.parametrize(
    ("placement", "shard"), [("replicated", (48, 192)), ("rows", (6, 192)), ("columns", (48, 24))]
)
def test_updates_are_placed_as_their_names_say(placement, shard):
    case = Case("tpu", "bfloat16", "update", "vit", placement, "centering")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    compiled = programs.trace(case, mesh).lower().compile()
    grads = compiled.input_shardings[0][0]
    assert grads["stem"]["kernel"].shard_shape((48, 192)) == shard
    assert counts.count(compiled).all_reduces == (placement != "replicated")
