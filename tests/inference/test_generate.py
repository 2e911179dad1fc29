"""The compiled loop: its tokens are those of whole forward passes, for any batch around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmlora_jax as rm
from rmlora_jax.inference import generate
from rmlora_jax.inference.generate import NOTHING, STEPS, bucket, compiled, decoder, padded
from rmlora_jax.inference.sampling import Sampling, as_arguments, row_keys
from rmlora_jax.models.decoder import Decoder, DecoderConfig, new_cache

SIZES = {
    "vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.4,
}  # fmt: skip
CONFIGS = {
    "plain": {},
    "tied, windows": {
        "tie_word_embeddings": True, "sliding_window": 5, "final_logit_softcapping": 3.0,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
}  # fmt: skip
PROMPTS = [np.random.RandomState(i).randint(0, 41, n).tolist() for i, n in
           enumerate((3, 21, 1, 9, 16))]  # fmt: skip
GREEDY = Sampling()
LONGER = 19  # than the window


class Model:
    """A random decoder, its programs, and how often they were traced."""

    def __init__(self, rows=lambda decode: decode, lora=None, **fields):
        self.config = config = DecoderConfig(**SIZES | fields)
        self.plain = model = Decoder(config, config.vocab_size)
        self.params = model.init(jax.random.key(1), jnp.ones((1, 2), jnp.int32))["params"]
        self.traced = []
        decode = rows(decoder(model if lora is None else rm.adapt(model, lora)))

        def counted(params, tokens, positions, cache):
            self.traced.append(tokens.shape)
            return decode(params, tokens, positions, cache)

        self.programs = compiled(counted, lambda b, n: new_cache(config, b, n))
        self.forward = jax.jit(lambda params, x: model.apply({"params": params}, x))

    def write(self, prompts, number=LONGER, *, params=None, rows=None, stops=(), slots=None,
              sampling=GREEDY, count=STEPS):
        """The tokens of each row, and the last state."""
        params = self.params if params is None else params
        tokens, positions = padded(prompts)
        left = np.zeros(len(tokens), np.int32)
        left[: len(prompts)] = number
        slots = slots or tokens.shape[1] + bucket(int(left.max()))
        state = self.programs.start(params, tokens, positions, left, slots=slots)
        numbers = np.zeros(len(tokens), np.uint32)
        numbers[: len(prompts)] = range(len(prompts)) if rows is None else rows
        ends = np.array([*stops, *[-2] * (4 - len(stops))], np.int32)
        sampling = as_arguments(sampling)
        found = [[] for _ in prompts]
        while True:
            state, written = self.programs.write(
                params, state, row_keys(np.uint32(5), numbers), ends, sampling, np.int32(count)
            )
            for row, more in zip(found, np.asarray(written), strict=False):
                row += more[more != NOTHING].tolist()
            if not np.asarray(state.left).any():
                return found, state

    def by_whole_passes(self, prompt, number=LONGER, params=None):
        """Greedy tokens: the argmax of one whole forward pass for each; padded, causal."""
        params = self.params if params is None else params
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(prompt)] = prompt
        for place in range(len(prompt), len(prompt) + number):
            tokens[0, place] = self.forward(params, tokens)[0, place - 1].argmax()
        return tokens[0, len(prompt) : len(prompt) + number].tolist()


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def model(request):
    return Model(**CONFIGS[request.param])


@pytest.fixture(scope="module")
def plain():
    return Model()


def test_greedy_is_the_argmax_of_whole_passes(model):
    expected = [model.by_whole_passes(prompt) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 10  # not one word over and over
    assert model.write(PROMPTS)[0] == expected
    assert model.write(PROMPTS, count=4)[0] == expected  # in pieces
    for prompt, row in zip(PROMPTS, expected, strict=True):  # one by one
        assert model.write([prompt], slots=64)[0] == [row]


def test_a_drawn_answer_does_not_depend_on_the_batch(plain):
    hot = Sampling(1.2, 20, 0.95)
    every, _ = plain.write(PROMPTS, sampling=hot)
    assert every != plain.write(PROMPTS)[0]
    some, _ = plain.write([PROMPTS[3], PROMPTS[0]], sampling=hot, rows=[3, 0], count=5)
    assert some == [every[3], every[0]]
    assert plain.write([PROMPTS[3]], sampling=hot, rows=[4])[0] != [every[3]]  # another number


def test_rows_end_by_themselves(plain):
    whole, _ = plain.write(PROMPTS)
    stops = whole[0][4], whole[3][9]
    cut = [row[: min([row.index(stop) for stop in stops if stop in row] + [len(row) - 1]) + 1]
           for row in whole]  # fmt: skip
    assert len(set(map(len, cut))) > 2
    found, state = plain.write(PROMPTS, stops=stops)
    assert found == cut  # the stop token is the last
    assert np.asarray(state.left).tolist() == [0] * 8
    # As many as each may write.
    numbers = np.array([1, 7, 19, 2, 40])
    found, _ = plain.write(PROMPTS, numbers, slots=96)
    assert [len(row) for row in found] == numbers.tolist()
    assert [row[:19] for row in found] == [row[:n] for row, n in zip(whole, numbers, strict=True)]


def test_one_program_for_a_bucket():
    model = Model()
    model.write([[1, 2, 3], [4]], 16)
    # A prompt is read, and a token is written.
    assert model.traced == [(2, 16), (2, 1)]
    for prompts, number, more in (
        ([[5] * 16, [7, 8]], 3, {}),
        ([[1], [1, 2]], 12, {"sampling": Sampling(0.7, 3, 0.5)}),
        ([[1], [1, 2]], 12, {"stops": (3, 4), "count": 2, "rows": (7, 9)}),
        ([[1], [2]], 16, {"params": jax.tree.map(lambda x: x + 1, model.params)}),
    ):
        model.write(prompts, number, **more)
    assert len(model.traced) == 2
    model.write([[1] * 17, [2]], 16)  # a longer prompt
    assert model.traced[2:] == [(2, 32), (2, 1)]
    model.write([[1]], 16)  # another batch
    assert model.traced[4:] == [(1, 16), (1, 1)]


def test_the_cache_is_given_on(plain):
    tokens, positions = padded(PROMPTS)
    state = plain.programs.start(plain.params, tokens, positions, np.ones(8, np.int32), slots=64)
    after, _ = plain.programs.write(
        plain.params, state, row_keys(np.uint32(0), np.arange(8)), np.full(4, -2, np.int32),
        as_arguments(Sampling()), np.int32(1),
    )  # fmt: skip
    assert state.cache.full.key.is_deleted() and not after.cache.full.key.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(plain.params))


def test_logits_that_are_not_finite_end_a_row(plain):
    """One token's embedding is damaged; rows that meet it end there, others go on as they were."""
    whole, _ = plain.write(PROMPTS)
    bad = next(token for token in whole[1][6:] if token)  # 0 is in the padding of all rows
    params = jax.tree.map(lambda x: x, plain.params)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[bad].set(np.nan)
    found, state = plain.write(PROMPTS, params=params)
    met = [bad in prompt or bad in row[:-1] for prompt, row in zip(PROMPTS, whole, strict=True)]
    assert any(met) and not all(met)
    assert np.asarray(state.damaged).tolist() == [*met, False, False, False]
    for prompt, row, own, damaged in zip(PROMPTS, found, whole, met, strict=True):
        end = 0 if bad in prompt else own.index(bad) + 1 if damaged else len(own)
        assert row == own[:end]


def test_each_row_has_its_own_adapter():
    lora = rm.LoRA(rank=2, alpha=8, target=r"layers/.*|embed", train="norm")
    model = Model(lora=lora)
    adapted = rm.adapt(model.plain, lora)
    params = rm.attach(jax.random.key(2), adapted, model.params, jnp.ones((1, 2), jnp.int32))
    trees = []
    for seed in range(3):
        tree, frozen = rm.split(params, lora)
        rng = np.random.RandomState(seed)
        trees.append(jax.tree.map(
            lambda x, rng=rng: x + np.float32(rng.normal(0, 0.2, x.shape)), tree
        ))
    mixed = Model(rows=generate.with_adapters, lora=lora)
    which = [2, 0, 1, 1, 0]
    stacked = jax.tree.map(lambda *x: jnp.stack([x[i] for i in [*which, 0, 0, 0]]), *trees)
    found, _ = mixed.write(PROMPTS, params=(frozen, stacked))
    alone = [model.write([prompt], params=rm.join(trees[i], frozen), slots=64)[0][0]
             for prompt, i in zip(PROMPTS, which, strict=True)]  # fmt: skip
    assert found == alone
    merged = rm.merge(rm.join(trees[2], frozen), lora)
    assert found[0] == model.by_whole_passes(PROMPTS[0], params=merged)
    others = [model.write([prompt], params=rm.join(trees[i - 1], frozen), slots=64)[0][0]
              for prompt, i in zip(PROMPTS, which, strict=True)]  # fmt: skip
    assert all(own != other for own, other in zip(alone, others, strict=True))
