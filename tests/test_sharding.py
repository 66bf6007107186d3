"""Split over devices by batch, the forward pass needs no word between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, assert_same, reference_rnn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrnn

DEVICES = 4
MASK = np.array([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1]] * 4, bool)


@pytest.fixture
def mesh():
    if jax.device_count() < DEVICES:
        pytest.skip("needs four devices, simulated ones will do (see conftest.py)")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((DEVICES,), ("batch",), auto, devices=jax.devices()[:DEVICES])


def call(case, params, inputs, states, mask):
    step = case.make_step(jnp, params)
    return jaxrnn.rnn(step, inputs, states, mask=mask)


def expectation(case, params, inputs, states):
    return reference_rnn(case.make_step(np, params), inputs, states, mask=MASK)


def test_sharded_jit_keeps_the_batch_sharding_and_communicates_nothing(mesh):
    case = CASES["readout"]
    params, *operands, _ = case.arguments(batch=2 * DEVICES)
    by_batch = NamedSharding(mesh, P("batch"))
    placed = jax.device_put((*operands, MASK), by_batch)
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    compiled = jax.jit(functools.partial(call, case)).lower(whole, *placed).compile()
    results = compiled(whole, *placed)
    for leaf in jax.tree.leaves(results):
        assert leaf.sharding.is_equivalent_to(by_batch, leaf.ndim)
    assert not re.findall(
        r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text()
    )
    assert_same(results, expectation(case, params, *operands))


def test_shard_map(mesh):
    case = CASES["readout"]
    params, *operands, _ = case.arguments(batch=2 * DEVICES)
    split = jax.shard_map(
        functools.partial(call, case),
        mesh=mesh,
        in_specs=(P(), P("batch"), P("batch"), P("batch")),
        out_specs=P("batch"),
    )
    assert_same(jax.jit(split)(params, *operands, MASK), expectation(case, params, *operands))
