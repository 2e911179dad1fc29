"""Adapters in PEFT's format: what PEFT wrote, what we write, and every refusal by its words."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft import cases
from fixtures.text import cases as text
from flax.traverse_util import flatten_dict, unflatten_dict
from marks import every_other, slow
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax.errors import UserError
from rmlora_jax.hub import Info, load_peft, load_pretrained, save_peft, stored_labels
from rmlora_jax.hub.peft_config import endings, is_simple, read_config

NAMES = sorted(cases.CASES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """case of the other fixtures -> (model, base)."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for name in NAMES:
        case = cases.CASES[name].base
        if case not in found:
            base = load_pretrained(cases.write_base(root / case, name))
            found[case] = (base.family.model(base.config, base.num_labels), base)
    return found


def inputs_of(name):
    inputs = cases.inputs_of(name)
    if "pixel_values" in inputs:
        return (jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)),)
    return tuple(jnp.asarray(inputs[k]) for k in ("input_ids", "attention_mask", "token_type_ids"))


@functools.cache
def jitted(model):
    return jax.jit(lambda params, args: model.apply({"params": params}, *args))


def logits_of(model, params, args):
    return np.asarray(jitted(model)(params, args))


def adapted(model, base, lora, args, seed=0):
    """Parameters with factors that are all random, and the logits that they give."""
    whole = rm.adapt(model, lora)
    params = flatten_dict(rm.attach(jax.random.key(seed), whole, base.params, *args), sep="/")
    rng = np.random.default_rng(seed)
    for path, x in params.items():
        if path.endswith(("lora_a", "lora_b")) or lora.trains(path):
            params[path] = (0.3 * rng.standard_normal(x.shape)).astype(np.float32)
    params = unflatten_dict(params, sep="/")
    return params, logits_of(whole, params, args)


def equal(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize("name", every_other(NAMES))
def test_adapters_of_peft_give_its_logits(bases, name):
    model, base = bases[cases.CASES[name].base]
    folder = cases.HERE / name
    params, lora = load_peft(folder, base)
    assert stored_labels(folder) == base.num_labels
    logits = logits_of(rm.adapt(model, lora), params, inputs_of(name))
    expected = np.load(folder / "logits.npy")
    assert np.abs(expected - logits_of(model, base.params, inputs_of(name))).max() > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert lora.dropout == cases.CASES[name].lora.get("lora_dropout", 0)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_peft_come_back_as_they_were(bases, name, tmp_path):
    """From PEFT's file to ours: the same tensors, and a config that means the same."""
    _, base = bases[cases.CASES[name].base]
    params, lora = load_peft(cases.HERE / name, base)
    old = name == "vit_old"
    save_peft(tmp_path / "again", params, lora, base, old_names=old)
    theirs = load_file(cases.HERE / name / "adapter_model.safetensors")
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    was, now = read_config(cases.HERE / name), read_config(tmp_path / "again")
    for key, value in theirs.items():
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        if ".lora_" in key:
            rank = was.rank_of(module)
            assert now.rank_of(module) == rank
            ratio = was.scale_of(module, rank) / now.scale_of(module, rank)
            if not key.endswith(("B.weight", "embedding_B")):
                ratio = 1
            np.testing.assert_allclose(ours[key], ratio * value, rtol=2e-7)
            assert ratio == 1 or name in ("vit", "roberta")  # scales that differ in a stack
        else:
            np.testing.assert_array_equal(ours[key], value)


def test_a_linear_layer_a_convolution_and_an_embedding_lie_as_in_pytorch(bases, tmp_path):
    model, base = bases["plain"]
    lora = rm.LoRA(rank=2, alpha=3, target=r"embed/patch|encoder/layers/mlp/fc1", train="head")
    params, _ = adapted(model, base, lora, inputs_of("vit"))
    save_peft(tmp_path / "a", params, lora, base)
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix, patch = "base_model.model.vit.", params["embed"]["patch"]
    for layer in range(3):
        fc1 = params["encoder"]["layers"]["mlp"]["fc1"]
        a, b = (found[f"{prefix}layers.{layer}.mlp.fc1.lora_{s}.weight"] for s in "AB")
        assert a.shape == (2, 24) and b.shape == (40, 2)
        for row in range(2):
            np.testing.assert_array_equal(a[row], fc1["lora_a"][layer, :, row])
            np.testing.assert_array_equal(b[:, row], fc1["lora_b"][layer, row])
    a, b = (found[f"{prefix}embeddings.patch_embeddings.projection.lora_{s}.weight"] for s in "AB")
    assert a.shape == (2, 3, 5, 5) and b.shape == (24, 2, 1, 1)
    for channel in range(3):
        for i in range(5):
            for j in range(5):
                np.testing.assert_array_equal(
                    a[:, channel, i, j], patch["lora_a"][(i * 5 + j) * 3 + channel]
                )
    np.testing.assert_array_equal(b[:, :, 0, 0].T, patch["lora_b"])
    np.testing.assert_array_equal(
        found["base_model.model.classifier.weight"].T, params["head"]["kernel"]
    )
    assert len(found) == 2 + 2 + 6
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {} == {
        "auto_mapping": None,
        "base_model_name_or_path": base.source,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "modules_to_save": ["classifier"],
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": ["fc1", "projection"],
        "task_type": None,
        "use_rslora": False,
    }
    model, base = bases["bert"]
    lora = rm.LoRA(rank=2, target=r"embed/word", train="head|pooler")
    params, _ = adapted(model, base, lora, inputs_of("bert"))
    save_peft(tmp_path / "b", params, lora, base)
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    word = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_"
    np.testing.assert_array_equal(found[f"{word}A"].T, params["embed"]["word"]["lora_a"])
    np.testing.assert_array_equal(found[f"{word}B"].T, params["embed"]["word"]["lora_b"])
    assert "base_model.model.bert.pooler.dense.weight" in found


EVERYTHING = (
    ("plain", "vit", "head", r".*mlp/fc1", False, False),
    ("plain", "vit", "head", r".*mlp/fc1", True, True),
    ("bert", "bert", "head|pooler", r".*value", False, False),
    ("roberta", "roberta", "head", r".*value", False, True),
    ("deberta_v3", "deberta", "head|pooler", r".*value", False, False),
)


@pytest.mark.parametrize(("case", "name", "train", "special", "old", "rs"),
                         [EVERYTHING[0], *(slow(*case) for case in EVERYTHING[1:])])
def test_from_here_to_the_file_and_back_is_exact(bases, case, name, train, special, old, rs,
                                                 tmp_path):
    model, base = bases[case]
    lora = rm.LoRA(rank=3, alpha=10, target=r"encoder/layers/.*|embed/(patch|word)", train=train,
                   rank_pattern=((special, 5), (r"embed/.*", 1)), rs=rs,
                   alpha_pattern=((r".*/attention/query", 2.5),))
    params, logits = adapted(model, base, lora, inputs_of(name))
    save_peft(tmp_path / "a", params, lora, base, old_names=old)
    again, description = load_peft(tmp_path / "a", base)
    equal(params, again)
    whole = rm.adapt(model, description)
    np.testing.assert_array_equal(logits_of(whole, again, inputs_of(name)), logits)
    for path in flatten_dict(params, sep="/"):
        if path.endswith("lora_a"):
            module = path.removesuffix("/lora_a")
            assert description.targets(module)
            assert description.scale_of(module) == lora.scale_of(module)
    # What is trained goes on with the same leaves, RoBERTa's whole classifier included.
    trained = set(flatten_dict(rm.split(again, description)[0]))
    assert trained >= set(flatten_dict(rm.split(params, lora)[0]))
    assert ("pooler", "kernel") in trained or name == "vit"


@pytest.mark.parametrize("kind", [rm.AdaLoRA, slow(rm.SoRA)])
def test_adalora_and_sora_are_written_as_plain_lora(bases, kind, tmp_path):
    model, base = bases["plain"]
    lora = kind(rank=4, alpha=6, target=r"encoder/layers/(attention/query|mlp/fc1)", train="head")
    args = inputs_of("vit")
    params, _ = adapted(model, base, lora, args)
    e = np.array([[1.5, 0, 0, -2], [0, 0, 0, 0], [0, 0.5, 1, 0]], np.float32)
    params["encoder"]["layers"]["mlp"]["fc1"]["lora_e"] = e
    params["encoder"]["layers"]["attention"]["query"]["lora_e"] = np.ones((3, 4), np.float32)
    logits = logits_of(rm.adapt(model, lora), params, args)
    save_peft(tmp_path / "a", params, lora, base)
    config = read_config(tmp_path / "a")
    names = [f"vit.layers.{i}.mlp.fc1" for i in range(3)]
    assert [config.rank_of(name) for name in names] == [2, config.r, 2]
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    scale = 6 / 4 if kind is rm.SoRA else 6 / (4 + 1e-5)
    assert not any(".1.mlp.fc1" in key for key in found)  # all closed
    for layer, name in ((0, names[0]), (2, names[2])):
        a, b = (found[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB")
        assert config.scale_of(name, len(a)) == scale
        fc1 = {k: v[layer].astype(np.float64)
               for k, v in params["encoder"]["layers"]["mlp"]["fc1"].items()}
        dense = fc1["lora_a"] @ np.diag(fc1["lora_e"]) @ fc1["lora_b"]
        np.testing.assert_allclose((b.astype(np.float64) @ a).T, dense, atol=1e-7)
        # Exact: every direction is a stored one with e multiplied in.
        kept = [i for i in range(4) if e[layer, i]]
        np.testing.assert_array_equal(a[: len(kept)].T, (fc1["lora_a"] * fc1["lora_e"])[:, kept]
                                      .astype(np.float32))
    again, description = load_peft(tmp_path / "a", base)
    assert type(description) is rm.LoRA
    out = logits_of(rm.adapt(model, description), again, args)
    np.testing.assert_allclose(out, logits, atol=2e-6)


def test_pissa_is_written_as_the_change_to_the_untouched_base(bases, tmp_path):
    model, base = bases["plain"]
    lora = rm.LoRA(rank=2, alpha=4, target=r"encoder/layers/attention/.*", train="head",
                   init="pissa")
    args, whole = inputs_of("vit"), rm.adapt(model, lora)
    params = rm.attach(jax.random.key(0), whole, base.params, *args)
    query = params["encoder"]["layers"]["attention"]["query"]
    moved = query["lora_a"] + 0.1 * np.random.RandomState(0).randn(3, 24, 2).astype(np.float32)
    params["encoder"]["layers"]["attention"]["query"] = query | {"lora_a": moved}
    assert np.abs(query["kernel"] - base.params["encoder"]["layers"]["attention"]["query"]
                  ["kernel"]).max() > 0.1
    logits = logits_of(whole, params, args)
    save_peft(tmp_path / "a", params, lora, base)
    again, description = load_peft(tmp_path / "a", base)
    assert description.rank == 4
    out = logits_of(rm.adapt(model, description), again, args)
    np.testing.assert_allclose(out, logits, atol=2e-5)


def test_magnitudes_are_stored_as_peft_does(bases, tmp_path):
    for case, name, target in (("plain", "vit", r"embed/patch|encoder/layers/mlp/fc1"),
                               ("bert", "bert", "embed/word")):
        model, base = bases[case]
        lora = rm.DoRA(rank=2, alpha=3, target=target, train="head")
        params, logits = adapted(model, base, lora, inputs_of(name))
        save_peft(tmp_path / case, params, lora, base)
        assert json.loads((tmp_path / case / "adapter_config.json").read_text())["use_dora"] is True
        found = load_file(tmp_path / case / "adapter_model.safetensors")
        stored = {key.removeprefix("base_model.model."): x for key, x in found.items()
                  if key.endswith(".lora_magnitude_vector")}
        if case == "bert":
            (key, word), = stored.items()
            assert key == "bert.embeddings.word_embeddings.lora_magnitude_vector"
            np.testing.assert_array_equal(word, params["embed"]["word"]["lora_m"])
        else:
            patch = stored.pop("vit.embeddings.patch_embeddings.projection.lora_magnitude_vector")
            assert patch.shape == (1, 24, 1, 1)
            np.testing.assert_array_equal(patch.ravel(), params["embed"]["patch"]["lora_m"])
            fc1 = params["encoder"]["layers"]["mlp"]["fc1"]["lora_m"]
            assert fc1.shape == (3, 40) and len(stored) == 3
            for layer, magnitudes in enumerate(fc1):
                key = f"vit.layers.{layer}.mlp.fc1.lora_magnitude_vector"
                np.testing.assert_array_equal(stored[key], magnitudes)
        again, description = load_peft(tmp_path / case, base)
        assert type(description) is rm.DoRA
        equal(params, again)
        whole = rm.adapt(model, description)
        np.testing.assert_array_equal(logits_of(whole, again, inputs_of(name)), logits)


def test_a_layer_that_an_adapter_with_magnitudes_leaves_out_is_the_bases(bases, tmp_path):
    _, base = bases["bert"]

    def without_layer_1(tensors):
        for key in [key for key in tensors if ".layer.1." in key]:
            del tensors[key]

    folder = rewritten(cases.HERE / "dora_bert", tmp_path,
                       {"exclude_modules": r".*\.layer\.1\..*"}, without_layer_1)
    params, lora = load_peft(folder, base)
    merged, kernel = (p["encoder"]["layers"]["attention"]["value"]["kernel"]
                      for p in (rm.merge(params, lora), base.params))
    np.testing.assert_allclose(merged[1], kernel[1], rtol=1e-6)
    assert np.abs(merged[0] - kernel[0]).max() > 0.01
    save_peft(tmp_path / "again", params, lora, base)
    equal(params, load_peft(tmp_path / "again", base)[0])


def test_what_is_trained_beside_the_factors_is_saved_whole(bases, tmp_path):
    model, base = bases["plain"]
    train = r"head|encoder/layers/norm1|encoder/layers/mlp/fc2|embed"
    lora = rm.LoRA(rank=2, target=r"encoder/layers/mlp/.*", train=train)
    params, logits = adapted(model, base, lora, inputs_of("vit"))
    save_peft(tmp_path / "a", params, lora, base)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [
        "classifier", "embeddings", "fc2", "layernorm_before", "projection"
    ]
    assert config["target_modules"] == ["fc1"]  # fc2 is saved with its factors merged
    again, description = load_peft(tmp_path / "a", base)
    out = logits_of(rm.adapt(model, description), again, inputs_of("vit"))
    np.testing.assert_allclose(out, logits, atol=1e-5)
    fc2 = params["encoder"]["layers"]["mlp"]["fc2"]
    merged = fc2["kernel"] + np.einsum("lir,lro->lio", fc2["lora_a"], fc2["lora_b"])
    np.testing.assert_allclose(
        again["encoder"]["layers"]["mlp"]["fc2"]["kernel"], merged, atol=1e-6)


def test_a_new_pooler_is_saved_though_it_is_not_trained(bases, tmp_path):
    folder = text.write_folder(tmp_path / "base", "bert")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "pooler" not in k and "classifier" not in k},
              folder / "model.safetensors")
    base = load_pretrained(folder, num_labels=3, key=jax.random.key(5))
    model = base.family.model(base.config, 3)
    lora = rm.LoRA(rank=2, target=r"encoder/layers/.*", train="head")
    params, _ = adapted(model, base, lora, inputs_of("bert"))
    save_peft(tmp_path / "a", params, lora, base)
    other = load_pretrained(folder, num_labels=3, key=jax.random.key(6))
    again, _ = load_peft(tmp_path / "a", other)
    equal(params, again)


def test_training_goes_on_from_an_adapter_of_peft(bases):
    model, base = bases["plain"]
    params, lora = load_peft(cases.HERE / "vit", base)
    whole, (images,) = rm.adapt(model, lora), inputs_of("vit")
    trainable, frozen = rm.split(params, lora)
    tx = rm.rm_lora(3e-3, penalty=0.1, keep=0.5)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            logits = whole.apply({"params": rm.join(trainable, frozen)}, images)
            return -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([3, 4])].mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state, value

    losses = []
    for _ in range(20):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    # A direction that one layer lacks never moves: PEFT gave fc2 rank 5 in layer 1 alone.
    fc2 = trainable["encoder"]["layers"]["mlp"]["fc2"]
    assert fc2["lora_a"].shape == (3, 40, 5)
    for layer in (0, 2):
        assert not np.any(fc2["lora_a"][layer, :, 3:]) and not np.any(fc2["lora_b"][layer, 3:])
    assert np.all(np.any(fc2["lora_b"][1] != 0, -1))


def rewritten(folder, tmp_path, config=None, tensors=None):
    """A copy of an adapter with some fields of its config and some tensors changed."""
    new = tmp_path / "changed"
    shutil.copytree(folder, new, dirs_exist_ok=True)
    if config is not None:
        path = new / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        path = new / "adapter_model.safetensors"
        found = load_file(path)
        tensors(found)
        save_file(found, path)
    return new


LAYER0 = "base_model.model.vit.layers.0.mlp.fc1"
REFUSED_CONFIGS = [
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; it must be 'LORA'"),
    ({"lora_bias": True}, "lora_bias is True, which is more than low-rank factors; merge that"),
    ({"use_dora": True}, r"lacks 'base_model.*projection.lora_magnitude_vector', '.*Is it an"),
    ({"bias": "all"}, "bias is 'all'; it must be 'none'"),
    ({"r": 0}, "r is 0; it must be a whole number from 1"),
    ({"r": 2.0}, "r is 2.0; it must be a whole number"),
    ({"lora_alpha": 0}, "lora_alpha is 0; it must be a number above 0"),
    ({"lora_alpha": "1"}, "lora_alpha is '1'"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be a number in"),
    ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must be an object"),
    ({"rank_pattern": {"fc1": 0}}, "rank_pattern is"),
    ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern has '\(a\+\)\+\$', which is not a simple"),
    ({"target_modules": 3}, "target_modules is 3; it must be a list of names or one pattern"),
    ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"r": 4}, "the factors of 'vit.embeddings.patch_.*' have shapes .* rank 4 of"),
    ({"target_modules": ["q_proj", "fc1", "fc2", "projection", "k_proj"]},
     r"lacks what adapter_config.json says of 'vit.layers.0.attention.k_proj.weight', 'vit.l"),
    ({"modules_to_save": ["classifier", "layernorm"]}, "lacks what .* 'vit.layernorm.weight'"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED_CONFIGS)
def test_configs_that_are_refused(bases, config, words, tmp_path):
    folder = rewritten(cases.HERE / "vit", tmp_path, config)
    with pytest.raises(UserError, match=words):
        load_peft(folder, bases["plain"][1])


def moved(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


REFUSED_TENSORS = [
    (lambda t: t.pop(f"{LAYER0}.lora_A.weight"), f"lacks '{LAYER0}.lora_A.weight'. Is it an"),
    (lambda t: t.pop(f"{LAYER0}.lora_B.weight"), f"lacks '{LAYER0}.lora_B.weight'. Is it an"),
    (lambda t: [t.pop(f"{LAYER0}.lora_{s}.weight") for s in "AB"], "lacks what .*rs.0.mlp.fc1"),
    (lambda t: t.pop("base_model.model.classifier.bias"), "lacks what .*'classifier.bias'"),
    (moved(f"{LAYER0}.lora_A.weight", f"{LAYER0}.lora_C.weight"), "has unexpected '.*lora_C"),
    (moved("base_model.model.classifier.bias", "classifier.bias"), "has unexpected 'classifier"),
    (moved(f"{LAYER0}.lora_A.weight", "base_model.model.vit.layers.7.mlp.fc1.lora_A.weight"),
     r"lacks .*; has unexpected 'base_model.model.vit.layers.7"),
    (moved(f"{LAYER0}.lora_A.weight", f"{LAYER0}.lora_embedding_A"), "has unexpected '.*embedding"),
    (lambda t: t.__setitem__("base_model.model.vit.encoder.layer.0.intermediate.dense.lora_A."
                             "weight", t[f"{LAYER0}.lora_A.weight"]), "are the same tensor"),
    (lambda t: t.__setitem__(f"{LAYER0}.lora_A.weight", t[f"{LAYER0}.lora_A.weight"].T.copy()),
     r"have shapes \(24, 2\) and \(40, 2\); the base, and rank 2 .* ask for \(2, 24\) and \(40"),
    (lambda t: t.__setitem__(f"{LAYER0}.lora_A.weight",
                             t[f"{LAYER0}.lora_A.weight"].astype(np.int32)), "is int32; it must"),
    (lambda t: t.__setitem__("base_model.model.classifier.weight", np.zeros((9, 24), np.float32)),
     r"'base_model.model.classifier.weight' has shape \(9, 24\), the base's is \(7, 24\); load"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_TENSORS)
def test_tensors_that_are_refused(bases, change, words, tmp_path):
    folder = rewritten(cases.HERE / "vit", tmp_path, tensors=change)
    with pytest.raises(UserError, match=words):
        load_peft(folder, bases["plain"][1])


def test_folders_that_are_refused(bases, tmp_path):
    base = bases["plain"][1]
    with pytest.raises(UserError, match=r"has no adapter_config.json; is it the right folder"):
        load_peft(tmp_path, base)
    folder = rewritten(cases.HERE / "vit", tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    for read in (lambda: load_peft(folder, base), lambda: stored_labels(folder)):
        with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
            read()
    (folder / "adapter_model.safetensors").write_bytes(
        (cases.HERE / "vit" / "adapter_model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged or cut short"):
        load_peft(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read as JSON"):
        load_peft(folder, base)
    with pytest.raises(UserError, match=r"has unexpected .*Is it an adapter of .*, a BertForSeq"):
        load_peft(cases.HERE / "vit", bases["bert"][1])


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(bases, tmp_path):
    model, base = bases["plain"]
    lora = rm.LoRA(rank=2, target=r"encoder/layers/mlp/fc1", train="head")
    params, _ = adapted(model, base, lora, inputs_of("vit"))
    more = params | {"extra": {"kernel": np.ones((2, 2), np.float32)}}
    other = rm.LoRA(rank=2, target=r"encoder/layers/mlp/fc1", train="head|extra")
    with pytest.raises(UserError, match=r"'extra/kernel' is trained, but has no name in ViTFor"):
        save_peft(tmp_path / "a", more, other, base)
    more["extra"] |= {"lora_a": np.ones((2, 2)), "lora_b": np.ones((2, 2))}
    other = rm.LoRA(rank=2, target=r"encoder/layers/mlp/fc1|extra", train="head")
    with pytest.raises(UserError, match=r"'extra' has factors, but no name in ViTFor"):
        save_peft(tmp_path / "a", more, other, base)
    assert not list(tmp_path.iterdir())
    save_peft(tmp_path / "a", params, lora, base)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "a"))):
        save_peft(tmp_path / "a", params, lora, base)
    save_peft(tmp_path / "a", params, lora, base, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_card_says_how_to_open_it(bases, tmp_path):
    base = load_pretrained("vit-tiny-patch8-64-tinyimagenet", num_labels=2, image_size=32)
    lora = rm.LoRA(rank=2, target=r"encoder/layers/mlp/fc1", train="head")
    model = rm.adapt(base.family.model(base.config, 2), lora)
    params = rm.attach(jax.random.key(0), model, base.params, jnp.ones((1, 32, 32, 3)))
    info = Info("image_classification", ("cat", "dog"), 32, about={
        "data": "pets", "method": "lora", "metrics": {"accuracy": 0.75}, "config": {"seed": 3}})
    card = (save_peft(tmp_path / "a", params, lora, base, info=info) / "README.md").read_text()
    for words in ('library_name: "peft"', 'base_model: "vit-tiny-patch8-64-tinyimagenet"',
                  "* data: pets", "* classes: cat, dog", "| accuracy | 0.7500 |", '"seed": 3',
                  'rmlora_jax.hub.load("FOLDER")', 'PeftModel.from_pretrained(base, "FOLDER")',
                  "num_labels=2", "images of 32 pixels", "interpolate_pos_encoding=True",
                  "transformers 5.9 or later", "find_folder('vit-tiny-patch8-64-tinyimagenet')"):
        assert words in card, words
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        compile(code, "card", "exec")
    card = (save_peft(tmp_path / "b", params, lora, base, old_names=True) / "README.md").read_text()
    assert "transformers up to 5.8" in card and "classes" not in card


def test_endings_match_what_is_chosen_and_nothing_else():
    known = [f"l.{i}.{m}" for i in range(12) for m in ("a.dense", "b.dense", "b.out.dense", "q")]
    for chosen in (["l.1.q"], [n for n in known if n.endswith(".b.dense")],
                   [n for n in known if "dense" in n], known[:3], known):
        found = endings(chosen, known)
        matched = {n for n in known if any(n == e or n.endswith(f".{e}") for e in found)}
        assert matched == set(chosen)
    assert endings(known, known) == ["dense", "q"]


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(.*)*", "a{1,9}{2}(b)+", ".*.*.*.*x", "(", "x" * 501]
)
def test_patterns_that_could_run_for_ever_are_not_simple(pattern):
    assert not is_simple(pattern)


def test_damaged_folders_give_clear_errors_and_nothing_else(bases, tmp_path):
    """Bytes of both files changed, cut off or doubled at random: refused by name, or read whole."""
    _, base = bases["plain"]
    rng, refused = np.random.default_rng(0), 0
    for number in range(400):
        folder = rewritten(cases.HERE / "vit", tmp_path / str(number % 8))
        file = folder / ("adapter_config.json", "adapter_model.safetensors")[number % 2]
        data = bytearray(file.read_bytes())
        header = 2000 if number % 2 else len(data)  # where damage means something
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(min(header, len(data))))
            kind = rng.integers(3)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            else:
                data[at:at] = data[at : at + int(rng.integers(1, 40))]
        file.write_bytes(bytes(data))
        try:
            params, _ = load_peft(folder, base)
        except UserError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            assert flatten_dict(params).keys() >= flatten_dict(base.params).keys()
    assert refused > 300
