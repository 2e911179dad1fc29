"""The first steps of packed rows against PyTorch and PEFT on examples one by one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.sft import oracle
from fixtures.sft.tiny import config_of, write_model

import rmlora_jax as rm
from rmlora_jax import hub, methods
from rmlora_jax.data.packing import filled, pack
from rmlora_jax.data.tokens import Tokens
from rmlora_jax.models.family import flat_params
from rmlora_jax.parallel.mesh import all_devices, replicate, shard, spread
from rmlora_jax.tasks import targets
from rmlora_jax.train.config import resolve
from rmlora_jax.train.step import Constants, State, make_train_step

FOUND = json.loads((Path(oracle.__file__).parent / "steps.json").read_text())
NAMES = {
    **{f"attention/{ours}": f"self_attn.{theirs}_proj" for ours, theirs in
       (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))},
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}  # fmt: skip
LENGTH = 24


def named(path: str) -> tuple[str, str]:
    """("model.layers.{}.self_attn.q_proj", "lora_A") of layers/attention/query/lora_a."""
    module, leaf = path.removeprefix("layers/").rsplit("/", 1)
    return f"model.layers.{{}}.{NAMES[module]}", {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]


def factors(trainable):
    """The same factors that PEFT began with."""

    def one(path, x):
        name, side = named(jax.tree_util.keystr(path, simple=True, separator="/"))
        layers = [oracle.factor(f"{name.format(i)}.{side}.weight", x.shape[:0:-1])
                  for i in range(len(x))]  # fmt: skip
        return jnp.asarray(np.stack(layers).swapaxes(1, 2))

    return jax.tree.map_with_path(one, trainable)


def batch_of(step: int):
    tokens, wanted = zip(*oracle.examples(step), strict=True)
    offsets = np.cumsum([0, *map(len, tokens)])
    every = Tokens(np.concatenate(tokens), np.concatenate(wanted), offsets)
    rows = pack(every.lengths, LENGTH, seed=step)
    assert len(rows) == 2
    return {"id": np.arange(2, dtype=np.int32), **filled(every, [rows[0], rows[1]], LENGTH, 0)}


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_first_steps_are_those_of_peft(tmp_path, devices):
    base = hub.load_pretrained(write_model(tmp_path / "model"))
    config = resolve(config_of(tmp_path, oracle.STEPS, **{
        "lora.rank": oracle.RANK, "lora.alpha": oracle.ALPHA,
        "optimizer.learning_rate": oracle.RATE, "optimizer.schedule": "constant",
    }))  # fmt: skip
    lora, tokens = methods.description(config), jnp.zeros((1, 4), jnp.int32)
    model = base.family.model(base.config, base.config.vocab_size)
    adapted = rm.adapt(model, lora)
    params = rm.attach(jax.random.key(0), adapted, base.params, tokens)
    trainable, frozen = rm.split(params, lora)
    trainable = factors(trainable)

    def apply(params, inputs, rngs=None, **keywords):
        return adapted.apply({"params": params}, *inputs, train=rngs is not None, **keywords)

    objective, tx = targets.objective(), methods.optimizer(config, oracle.STEPS)
    where = all_devices(limit=devices)
    step = spread(make_train_step(
        apply, objective.loss, tx, lambda key, positions, data, batch: targets.shifted(batch),
        means=objective.means,
    ), where)  # fmt: skip
    seed = np.uint32(0)
    state = replicate(State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable)), where)
    constants = replicate(Constants(frozen, {}, seed, seed), where)
    for number, theirs in enumerate(FOUND["steps"]):
        state, metrics = step(state, constants, shard(batch_of(number), where))
        for name, value in theirs.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
    for path, x in flat_params(jax.device_get(state.trainable)).items():
        name, side = named(path)
        for i, own in enumerate(x):
            value = FOUND["norms"][f"{name.format(i)}.{side}.weight"]
            np.testing.assert_allclose(np.linalg.norm(own), value, rtol=1e-4, err_msg=path)
