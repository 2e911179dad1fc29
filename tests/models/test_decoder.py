"""Decoders equal transformers' on random weights, padded, packed, and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.decoders.cases import CASES, HERE, tokens_of, write_folder

from rmlora_jax import hub
from rmlora_jax.models import Decoder, DecoderConfig, new_cache
from rmlora_jax.models.rope import Rope

STORED = np.load(HERE / "decoder.npz")
LIMIT = 2e-4  # of the root mean square


def cases(*quick: str, without: tuple[str, ...] = ()):
    """All cases; those that share their code with ``quick`` ones are slow."""
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow)
        for name in CASES
        if name not in without
    ]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def load(name):
        base = hub.load_decoder(write_folder(name, tmp_path_factory.mktemp(name)))
        return base, base.family.model(base.config, base.num_labels)

    return load


def off(found, wanted) -> float:
    """The largest difference over the root mean square."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return np.abs(found - wanted).max() / np.sqrt(np.mean(wanted**2))


def examples(name):
    """Tokens, PyTorch's logits and PyTorch's hidden states of each example of a case."""
    tokens, mask = tokens_of(name)
    for row, length in enumerate(mask.sum(1)):
        stored = (STORED[f"{name}/{row}/{part}"] for part in ("logits", "states"))
        yield tokens[row, :length], *stored


@pytest.mark.parametrize(
    "name", cases("llama3", "qwen2_yarn", "mistral", "gemma2", "gemma3", "smollm3", "llama_new")
)
def test_a_padded_batch_equals_transformers(load, name):
    base, model = load(name)
    tokens, mask = tokens_of(name)
    run = jax.jit(functools.partial(model.apply, hidden_states=True))
    logits, states = run({"params": base.params}, tokens, None, mask.astype(np.int32))
    assert logits.dtype == jnp.float32
    for row, (own, wanted, wanted_states) in enumerate(examples(name)):
        assert off(logits[row, : len(own)], wanted) < LIMIT
        # PyTorch's last state is the normalised one; ours is compared through the logits.
        assert off(states[:2, row, : len(own)], wanted_states[:2]) < LIMIT


@pytest.mark.parametrize("name", cases("gemma3"))
def test_packed_examples_equal_transformers(load, name):
    base, model = load(name)
    parts = [*examples(name)]
    tokens = np.concatenate([own for own, *_ in parts] + [[0, 0, 0]])[None]
    segments = np.concatenate(
        [np.full(len(own), i + 1) for i, (own, *_) in enumerate(parts)] + [[0, 0, 0]]
    )[None]
    logits = jax.jit(model.apply)({"params": base.params}, tokens, None, segments)
    start = 0
    for own, wanted, _ in parts:
        assert off(logits[0, start : start + len(own)], wanted) < LIMIT
        start += len(own)


@pytest.mark.parametrize("name", cases("gemma3", "smollm3", without=("llama_dynamic",)))
def test_greedy_tokens_equal_transformers(load, name):
    """Prompts of different lengths in one batch, padded on the left; then token by token."""
    base, model = load(name)
    parts, wanted = [*examples(name)], STORED[f"{name}/greedy"]
    longest = max(len(own) for own, *_ in parts)
    tokens, positions = (np.full((len(parts), longest), fill) for fill in (0, -1))
    for row, (own, *_) in enumerate(parts):
        tokens[row, longest - len(own) :] = own
        positions[row, longest - len(own) :] = np.arange(len(own))
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache = new_cache(base.config, len(parts), longest + len(wanted))
    logits, cache = decode({"params": base.params}, tokens, positions, cache)
    for row, (own, of_torch, _) in enumerate(parts):
        assert off(logits[row, longest - len(own) :], of_torch) < LIMIT
    found, last = [], positions[:, -1:]
    for _ in wanted:
        made = jnp.argmax(logits[:, -1:], axis=-1)
        found.append(int(made[0, 0]))
        last = last + 1
        logits, cache = decode({"params": base.params}, made, last, cache)
    assert found == wanted.tolist()


def test_a_dynamic_rope_is_that_of_each_text(load):
    """What shares the batch changes nothing, though transformers stretches by the longest."""
    base, model = load("llama_dynamic")
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]] * 2)
    segments = np.array([[1] * 12, [1] * 5 + [0] * 7])
    run = jax.jit(model.apply)
    both = run({"params": base.params}, tokens, None, segments)
    alone = run({"params": base.params}, tokens[1:, :5])
    assert off(both[1, :5], alone[0]) < 1e-6
    assert off(both[0, :5], alone[0]) > 1e-2  # 12 tokens are more than 8


# What transformers 5.24 generates greedily after `PROMPT` with its cache, on "llama_dynamic". The
# prompt has 5 tokens, and the rope is stretched from the ninth on.
PROMPT = [3, 1, 4, 1, 5]
GENERATED = [39, 28, 28, 17, 1, 15, 6, 25, 38, 34, 28, 28, 28, 28, 20, 28, 20, 15, 20, 5, 1, 15, 20,
             15, 20, 5, 20, 38, 20, 20]  # fmt: skip


def test_a_dynamic_rope_grows_in_generation_as_in_transformers(load):
    """Each new token turns by the length so far; keys in the cache stay as they were turned."""
    base, model = load("llama_dynamic")
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    last = np.arange(len(PROMPT))[None]
    cache, made, found = new_cache(base.config, 1, 40), np.array([PROMPT]), list[int]()
    for _ in GENERATED:
        logits, cache = decode({"params": base.params}, made, last, cache)
        made, last = jnp.argmax(logits[:, -1:], axis=-1), last[:, -1:] + 1
        found.append(int(made[0, 0]))
    assert found == GENERATED
    # A pass over the whole text, where all keys turn by its length, ends otherwise: there, too.
    run, tokens = jax.jit(model.apply), [*PROMPT, *GENERATED[:-1]]
    whole = run({"params": base.params}, np.array([tokens]))[0]
    assert np.argmax(whole, axis=-1)[len(PROMPT) - 1 :].tolist() != GENERATED


TINY = DecoderConfig(
    vocab_size=30, hidden_size=16, intermediate_size=20, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=3, qk_norm=True,
    layer_types=("sliding_attention", "full_attention") * 2, local_rope=Rope(theta=100.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    model = Decoder(TINY, 30)
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, 30)
    params = model.init(jax.random.key(0), tokens)["params"]
    noise = jax.random.normal(jax.random.key(2), (10_000,))
    return model, jax.tree.map(lambda x: x + 0.3 * noise[: x.size].reshape(x.shape), params), tokens


@pytest.mark.parametrize("parts", [(11,), (5, 1, 1, 4)])
def test_a_cache_may_be_filled_in_any_parts(tiny, parts):
    model, params, tokens = tiny
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache, found, start = new_cache(TINY, 2, 11), [], 0
    assert cache.full.key.shape == (2, 2, 11, 2, 4) and cache.ring.key.shape == (2, 2, 3, 2, 4)
    for size in parts:
        own = tokens[:, start : start + size]
        places = jnp.broadcast_to(jnp.arange(start, start + size), own.shape)
        logits, cache = decode({"params": params}, own, places, cache)
        found.append(logits)
        start += size
    assert off(jnp.concatenate(found, axis=1), model.apply({"params": params}, tokens)) < 1e-5
    assert int(cache.written) == 11
    assert cache.full.position[0].tolist() == [*range(11)]
    assert sorted(cache.ring.position[0].tolist()) == [8, 9, 10]


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_the_logits(tiny, remat):
    model, params, tokens = tiny
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.linspace(0, 2, 22).reshape(2, 11)
    segments = jnp.array([[1] * 4 + [2] * 6 + [0], [1] * 11])

    def plain(params):
        logits = model.apply({"params": params}, tokens, segments=segments)
        own = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.sum(weights * own), own

    def own(params):
        changed = model.clone(remat=remat)
        return changed.apply({"params": params}, tokens, targets, weights, segments=segments,
                             method="losses")  # fmt: skip

    (total, each), grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    (found, of_tokens), found_grads = jax.jit(jax.value_and_grad(own, has_aux=True))(params)
    assert abs(found - total) < 1e-6 * total
    assert off(of_tokens["loss"][weights > 0], each[weights > 0]) < 1e-5
    for a, b in zip(jax.tree.leaves(found_grads), jax.tree.leaves(grads), strict=True):
        assert off(a, b) < 1e-4


def test_what_does_not_fit_is_refused(tiny):
    model, params, tokens = tiny
    with pytest.raises(TypeError, match="input_ids are float32"):
        model.apply({"params": params}, tokens.astype(float))
    with pytest.raises(ValueError, match=r"expected \(batch, tokens\)"):
        model.apply({"params": params}, tokens[0])
    with pytest.raises(ValueError, match=r"segments have shape \(2, 3\)"):
        model.apply({"params": params}, tokens, segments=tokens[:, :3])
    with pytest.raises(ValueError, match="outputs is 0"):
        model.clone(outputs=0).apply({"params": params}, tokens)
