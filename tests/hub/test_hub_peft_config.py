"""What adapter_config.json says is obeyed, known to be inert, or refused by name."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.peft import cases
from fixtures.text import cases as text
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import rmlora_jax as rm
from rmlora_jax import hub
from rmlora_jax.errors import UserError
from rmlora_jax.hub import load_peft, load_pretrained, save_peft
from rmlora_jax.hub.peft_config import FIELDS, INERT, find_base, read_config
from rmlora_jax.hub.source import find_folder, split_revision
from rmlora_jax.hub.weights import to_stored
from rmlora_jax.models.family import flat_params
from rmlora_jax.tasks.places import missing_adapter

BERT = "base_model.model.bert.encoder.layer"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: load_pretrained(cases.write_base(root / name, case))
            for name, case in (("plain", "vit"), ("bert", "bert"))}


def changed(name, folder, tensors=None, **config):
    """A copy of a stored adapter with some fields and some tensors changed."""
    shutil.copytree(cases.HERE / name, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors")
        tensors(found)
        save_file(found, folder / "adapter_model.safetensors")
    return folder


def without(*parts):
    """Takes out the tensors whose names have all these parts."""

    def take_out(tensors):
        for key in [key for key in tensors if all(part in key for part in parts)]:
            del tensors[key]

    return take_out


def merged_tensors(base, params, lora):
    """PyTorch's name -> weight after merging, of every parameter of the base."""
    flat = flat_params(rm.merge(params, lora))
    found = {}
    for entry in base.family.table:
        if entry.path in flat:
            value = np.asarray(flat[entry.path])
            for layer, one in enumerate(value if entry.stacked else [value]):
                found[entry.names[-1].format(layer)] = to_stored(one, entry.axes)
    return found


@pytest.mark.parametrize("name", list(cases.MOVED))
def test_what_an_init_took_out_of_the_base_is_taken_out_again(bases, name, tmp_path):
    """The merged weights are those of PEFT after loading. Its SVD is of float32, as ours: singular
    vectors whose values are near each other mix, by 4e-6 here."""
    base = bases[cases.MOVED[name].base]
    before = {path: np.array(x) for path, x in flat_params(base.params).items()}
    params, lora = load_peft(cases.HERE / name, base)
    expected = np.load(cases.HERE / name / "merged.npz")
    for again in (False, True):
        merged = merged_tensors(base, params, lora)
        for key in expected:
            np.testing.assert_allclose(merged[key], expected[key], atol=1e-5, err_msg=key)
        if not again:
            save_peft(tmp_path / "again", params, lora, base)
            params, lora = load_peft(tmp_path / "again", base)
    for path, x in flat_params(base.params).items():
        np.testing.assert_array_equal(x, before[path])
    assert flatten_dict(params, sep="/").keys() > before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases.MOVED))
def test_its_logits_are_those_of_peft(bases, name):
    base = bases[cases.MOVED[name].base]
    params, lora = load_peft(cases.HERE / name, base)
    model = rm.adapt(base.family.model(base.config, base.num_labels), lora)
    inputs = {k: jnp.asarray(v) for k, v in cases.inputs_of(name).items()}
    if "pixel_values" in inputs:
        args = [inputs["pixel_values"].transpose(0, 2, 3, 1)]
    else:
        args = [inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    logits = np.asarray(model.apply({"params": params}, *args))
    np.testing.assert_allclose(logits, np.load(cases.HERE / name / "logits.npy"), atol=2e-5)


def test_the_defaults_of_every_release_are_read(tmp_path):
    """Fields and defaults of PEFT 0.5 to 0.21, from its source (fixtures/make_peft_fields.py)."""
    releases = json.loads((cases.HERE / "fields.json").read_text())
    assert len(releases) == 17
    own = {"peft_type": "LORA", "target_modules": ["query"]}
    for fields in releases.values():
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields | own))
        config = read_config(tmp_path)
        assert (config.r, config.alpha, config.init, config.targets) == (8, 8, None, ("query",))
    known = set().union(*releases.values())
    assert known > INERT and known >= FIELDS.keys()


# Fields with an effect that factors do not show, of PEFT and of nobody yet.
@pytest.mark.parametrize(("field", "value"), [
    ("lora_bias", True), ("fan_in_fan_out", True), ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}), ("layer_replication", [[0, 2]]),
    ("target_parameters", ["weight"]),
    ("alora_invocation_tokens", [3]), ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 1}),
    ("monteclora_config", {"n": 4}), ("velora_config", {"scale": 1.0}),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("my_new_field", True), ("my_new_field", 0.5), ("my_new_field", 0), ("my_new_field", "mode2"),
    ("my_new_field", {"x": 1}),
])
def test_a_field_that_asks_for_more_is_refused(field, value, tmp_path):
    folder = changed("bert", tmp_path, **{field: value})
    with pytest.raises(UserError, match=rf"adapter_config.json: {field} is .*merge that adapter"):
        read_config(folder)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_asks_for_nothing_is_read(value, tmp_path):
    assert read_config(changed("bert", tmp_path, my_new_field=value)).r == 2


@pytest.mark.parametrize(("field", "value"), [
    ("init_lora_weights", "gaussian"), ("init_lora_weights", "eva"), ("init_lora_weights", False),
    ("init_lora_weights", "orthogonal"), ("init_lora_weights", "mica"), ("init_lora_weights", None),
    ("eva_config", {"rho": 2.0}), ("corda_config", {"x": 1}), ("loftq_config", {"loftq_bits": 4}),
    ("lora_ga_config", {"x": 1}), ("megatron_core", "megatron.core"), ("qalora_group_size", 8),
    ("peft_version", "0.99"), ("runtime_config", {"x": True}),
])
def test_an_inert_field_changes_nothing(bases, field, value, tmp_path):
    plain, other = (read_config(folder) for folder in (
        cases.HERE / "bert", changed("bert", tmp_path, **{field: value})))
    assert plain == other


@pytest.mark.parametrize("init", [
    "pissa_niter_4", "corda", "loftq", "lora_ga", "kasa", "something", 1, ["pissa"]])
def test_an_init_that_cannot_be_made_again_is_refused(init, tmp_path):
    with pytest.raises(UserError, match=r"init_lora_weights is .*path_initial_model_for_weight"):
        read_config(changed("bert", tmp_path, init_lora_weights=init))


def test_pissa_of_an_embedding_is_refused(bases, tmp_path):
    """PEFT has it for linear layers alone."""
    with pytest.raises(UserError, match=r"init_lora_weights is 'pissa', .* not for .*word_embed"):
        load_peft(changed("bert", tmp_path, init_lora_weights="pissa"), bases["bert"])


def test_targets_are_those_of_peft(bases, tmp_path):
    """PEFT's own answers for lists, patterns, excluded modules and numbers of layers."""
    answers = json.loads((cases.HERE / "targets.json").read_text())
    names = {name for answer in answers for name in answer}
    names |= {e.names[-1].format(layer).rpartition(".")[0] for e in bases["bert"].family.table
              for layer in range(3) if e.path.endswith(("/kernel", "/embedding"))}
    for one, answer in zip(cases.TARGETS, answers, strict=True):
        folder = changed("bert", tmp_path, **{"modules_to_save": None} | one)
        config = read_config(folder)
        assert {name for name in names if config.adapts(name)} == set(answer), one


LIST = ["query", "word_embeddings", "output.dense"]
PATTERN = r"bert\..*(query|word_embeddings|output\.dense)"


@pytest.mark.parametrize(("config", "tensors", "words"), [
    ({"target_modules": PATTERN}, without("layer.1.", "query.lora"),
     r"lacks what adapter_config.json says of 'bert.encoder.layer.1.attention.self.query.weight'"),
    ({"exclude_modules": ["layer.0.output.dense"]},
     lambda t: [without("layer.0.output", "lora")(t), without("layer.2.output", "lora")(t)],
     "lacks what .* of 'bert.encoder.layer.2.output.dense.weight'"),
    ({"layers_to_transform": [0, 1], "target_modules": LIST[::2]},
     lambda t: [without("layer.2", "lora")(t), without("embedding", "lora")(t),
                without("layer.1", "query", "lora")(t)],
     "lacks what .* of 'bert.encoder.layer.1.attention.self.query.weight'"),
    ({}, without("word_embeddings", "lora"), "lacks what .*'bert.embeddings.word_embeddings.wei"),
    ({"layers_to_transform": [0, 1]}, None,
     "has factors of .*'bert.encoder.layer.2.* adapter_config.json does not target and PEFT"),
    ({"target_modules": ["qery", *LIST[1:]]}, None, "has factors of 'bert.*0.*query'.* and PEFT"),
    ({"target_modules": "all-linear"}, None, "lacks what .*layer.0.attention.self.key.weight'"),
    ({"trainable_token_indices": [1]}, None, "lacks what .*'trainable_token_indices'"),
    ({"trainable_token_indices": [1, 1]}, None, r"indices is \[1, 1\]; it must be a list of diff"),
    ({"trainable_token_indices": {"x": [-1]}}, None, "indices is .*an object of names and such"),
    ({"ensure_weight_tying": 1}, None, "ensure_weight_tying is 1; it must be true or false"),
    ({"target_modules": "(a+)+$"}, None, r"target_modules has '\(a\+\)\+\$', which is not a sim"),
    ({"layers_pattern": ["(a|a)*"]}, None, "layers_pattern has .*, which is not a simple"),
    ({"layers_to_transform": "all"}, None, "layers_to_transform is 'all'; it must be a number"),
    ({"alpha_pattern": {"^query": 100}}, None,
     r"adapter_config.json: alpha_pattern has '\^query', which matches no adapted layer; correct"),
    ({"rank_pattern": {"qery": 5}}, None, "rank_pattern has 'qery', which matches no adapted"),
    ({"alpha_pattern": {"key": 5}}, None, "alpha_pattern has 'key', which matches no adapted"),
    ({"modules_to_save": ["dense", "classifier"]}, None, "lacks what .*output.dense.bias'"),
    ({"task_type": "TOKEN_CLS"}, None, "holds the head of a model for TokenClassification, not"),
    ({"task_type": None, "auto_mapping": {"base_model_class": "BertForMultipleChoice"}}, None,
     "holds the head of a model for MultipleChoice, not for SequenceClassification"),
    ({"task_type": "SORT"}, None, "task_type is 'SORT'; it must be SEQ_CLS, "),
    ({"revision": "../../main"}, None, "revision is '../../main'; it must be a branch, a tag"),
])
def test_a_config_that_contradicts_its_tensors_is_refused(bases, config, tensors, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_peft(changed("bert", tmp_path, tensors, **config), bases["bert"])


def test_what_fits_the_tensors_is_read(bases, tmp_path):
    """Patterns with the whole name and with its end, and a target that no layer has, as in PEFT."""
    known = {"bert.encoder.layer.1.attention.self.query": 3, "output.dense": 5}
    folder = changed("bert", tmp_path, alpha_pattern=known, target_modules=[*LIST, "q_proj"])
    _, lora = load_peft(folder, bases["bert"])
    assert {lora.scale_of(m) for m in ("encoder/layers/mlp/fc2", "embed/word")} == {2.5, 4}
    load_peft(changed("bert", tmp_path, target_modules=PATTERN, alpha_pattern={}), bases["bert"])


def new_pooler(folder):
    """A base without its pooler and head, as DeBERTa's and many BERTs are published."""
    text.write_folder(folder, "bert")
    tensors = load_file(folder / "model.safetensors")
    without("pooler")(tensors)
    without("classifier")(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_layer_that_adapter_and_base_lack_is_refused(bases, tmp_path):
    base = load_pretrained(new_pooler(tmp_path / "base"), num_labels=3)
    folder = changed("bert", tmp_path / "a", without("pooler"), base_model_name_or_path="base",
                     modules_to_save=["classifier"])
    for read in (lambda: load_peft(folder, base),
                 lambda: hub.load(folder)):
        with pytest.raises(UserError, match="has no trained pooler/kernel, pooler/bias, nor has"):
            read()
    params, lora = load_peft(folder, base, saved=False)
    assert not lora.train and "lora_a" in params["embed"]["word"]
    whole, _ = load_peft(cases.HERE / "bert", base)
    stored = load_file(cases.HERE / "bert" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        whole["pooler"]["kernel"].T, stored["base_model.model.bert.pooler.dense.weight"])


def test_a_relative_base_is_looked_for_here_in_the_adapter_and_beside_it(tmp_path, monkeypatch):
    folder = changed("bert", tmp_path / "a" / "adapter", base_model_name_or_path="base",
                     revision="v2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_base(folder, read_config(folder)) == "base@v2"  # of the hub
    for place in (tmp_path / "a", folder):
        (place / "base").mkdir()
        (place / "base" / "config.json").write_text("{}")
        assert find_base(folder, read_config(folder)) == str(place / "base")
    (tmp_path / "elsewhere" / "base").mkdir()
    assert find_base(folder, read_config(folder)) == "base"
    config = changed("bert", tmp_path / "b", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not say its base_model_name_or_path; add it"):
        hub.load(config)


def cached(cache, name, revisions):
    """A cache of the hub's client, as it lays it out: revision -> scale of the embedding."""
    repo = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, scale) in enumerate(revisions.items()):
        commit = str(number) * 40
        folder = text.write_folder(repo / "snapshots" / commit, "bert")
        tensors = load_file(folder / "model.safetensors")
        tensors["bert.embeddings.word_embeddings.weight"] *= scale
        save_file(tensors, folder / "model.safetensors")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)


def test_the_revision_of_the_base_is_loaded_and_kept(bases, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached(tmp_path / "cache", "owner/bert", {"main": 1, "v2": 2})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = changed("bert", tmp_path / "a", base_model_name_or_path="owner/bert", revision="v2")
    source = find_base(folder, read_config(folder))
    base = load_pretrained(source)
    word = bases["bert"].params["embed"]["word"]["embedding"]
    np.testing.assert_array_equal(base.params["embed"]["word"]["embedding"], 2 * word)
    assert base.source == load_pretrained("owner/bert", revision="v2").source == "owner/bert@v2"
    assert load_pretrained("owner/bert").source == "owner/bert"
    with pytest.raises(UserError, match="hf download owner/bert --revision v3"):
        find_folder("owner/bert@v3")

    info = hub.Info("text_classification", ("x", "y", "z"))
    params, lora = load_peft(folder, base)
    again = save_peft(tmp_path / "again", params, lora, base, info=info)
    raw = json.loads((again / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("owner/bert", "v2")
    assert hub.read_info(again) == info
    card = (again / "README.md").read_text()
    assert 'base_model: "owner/bert"\n' in card and '"owner/bert", revision="v2", num_' in card

    for source, wrong in (("owner/bert", True), ("owner/bert@main", True), ("owner/bert@v2", False),
                          ("/data/bert", False)):
        c: Any = SimpleNamespace(model=SimpleNamespace(adapter=str(folder), source=source))
        said = list(missing_adapter(c))
        assert bool(said) is wrong
        assert not wrong or said[0].endswith("t@v2; type --config.model.source=owner/bert@v2")


def test_a_folder_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_revision("bert@v2") == ("bert", "v2")
    (tmp_path / "bert@v2").mkdir()
    assert split_revision("bert@v2") == ("bert@v2", None)
    assert split_revision("bert@../../x") == ("bert@../../x", None)
    assert load_pretrained(
        text.write_folder(tmp_path / "m@n", "bert"), revision="v3").source == str(tmp_path / "m@n")
    assert jax.tree.leaves(load_pretrained("m@n").params)
