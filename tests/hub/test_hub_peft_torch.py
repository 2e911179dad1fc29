"""Adapters there and back again, with PyTorch and PEFT themselves (tests/oracle/README.md)."""

import json

import jax
import numpy as np
import pytest
from fixtures.peft import cases
from oracle import oracle
from test_hub_peft import adapted, inputs_of, logits_of

import rmlora_jax as rm
from rmlora_jax.hub import load_peft, load_pretrained, save_peft

FAMILIES = [
    # case, name of inputs, what is adapted, what is trained beside it
    ("plain", "vit", r"encoder/layers/.*|embed/patch", "head"),
    ("bert", "bert", r"encoder/layers/(attention/query|mlp/.*)|embed/word", "head|pooler"),
    ("roberta", "roberta", r"encoder/layers/.*", "head"),
    ("deberta_v3", "deberta", r"encoder/layers/.*", "head|pooler"),
]

TARGETS = {
    "ViTForImageClassification": ["q_proj", "fc2", "projection"],
    "DebertaV2ForSequenceClassification": ["query_proj", "value_proj"],
}

pytestmark = pytest.mark.slow


@pytest.fixture(params=FAMILIES, ids=[family[0] for family in FAMILIES])
def family(request, tmp_path):
    oracle.python()
    _, name, target, train = request.param
    folder = cases.write_base(tmp_path / "base", name)
    base = load_pretrained(folder)
    np.savez(tmp_path / "in.npz", **cases.inputs_of(name))
    model = base.family.model(base.config, base.num_labels)
    return model, base, inputs_of(name), target, train


def torch_logits(tmp_path, what, base, *arguments):
    oracle.run("adapters.py", what, base.folder, *arguments[:1], base.num_labels,
               tmp_path / "in.npz", tmp_path / "out.npz", *arguments[1:])
    found = np.load(tmp_path / "out.npz")
    return found["logits"], found["base"]


def close(ours, theirs, base_ours, base_theirs):
    """2e-4, and no more than the base's own difference between the frameworks + 1e-5."""
    difference = np.abs(ours - theirs).max()
    assert difference <= min(2e-4, np.abs(base_ours - base_theirs).max() + 1e-5), difference
    assert np.abs(theirs - base_theirs).max() > 0.1  # and the adapter does something


@pytest.mark.parametrize("kind", [rm.LoRA, rm.SoRA, rm.DoRA])
def test_peft_opens_our_adapters(family, kind, tmp_path):
    model, base, args, target, train = family
    lora = kind(rank=3, alpha=6, target=target, train=train, rs=kind is rm.LoRA,
                rank_pattern=((r".*/mlp/fc1", 5),))
    params, _ = adapted(model, base, lora, args)
    if kind is rm.SoRA:  # a layer with one gate open, one with none
        gates = np.zeros((base.config.num_hidden_layers, 5), np.float32)
        gates[0, 3] = -1.5
        params["encoder"]["layers"]["mlp"]["fc1"]["lora_e"] = gates
    logits = logits_of(rm.adapt(model, lora), params, args)
    save_peft(tmp_path / "adapter", params, lora, base)
    theirs, base_theirs = torch_logits(tmp_path, "open", base, tmp_path / "adapter")
    close(logits, theirs, logits_of(model, base.params, args), base_theirs)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_go_on_there_and_here(family, dora, tmp_path):
    """PEFT trains one, we open it and train it, PEFT opens that and trains it, we open that."""
    model, base, args, *_ = family
    names = TARGETS.get(base.family.classifier, ["query", "value"])
    config = {"r": 3, "lora_alpha": 6, "target_modules": names, "modules_to_save": ["classifier"],
              "use_dora": dora}
    theirs, base_theirs = torch_logits(
        tmp_path, "train", base, "-", tmp_path / "first", json.dumps(config))
    base_ours = logits_of(model, base.params, args)
    params, lora = load_peft(tmp_path / "first", base)
    assert type(lora) is (rm.DoRA if dora else rm.LoRA)
    whole = rm.adapt(model, lora)
    close(logits_of(whole, params, args), theirs, base_ours, base_theirs)

    trainable, frozen = rm.split(params, lora)
    labels = np.arange(len(args[0])) % base.num_labels

    @jax.jit
    def step(trainable):
        def loss(trainable):
            logits = whole.apply({"params": rm.join(trainable, frozen)}, *args)
            return -jax.nn.log_softmax(logits)[np.arange(len(labels)), labels].mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        return jax.tree.map(lambda p, g: p - 0.05 * g, trainable, grads), value

    losses = []
    for _ in range(5):
        trainable, value = step(trainable)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    params = rm.join(trainable, frozen)
    save_peft(tmp_path / "second", params, lora, base)
    opened, base_theirs = torch_logits(tmp_path, "open", base, tmp_path / "second")
    close(logits_of(whole, params, args), opened, base_ours, base_theirs)
    assert np.abs(opened - theirs).max() > 1e-3

    theirs, base_theirs = torch_logits(
        tmp_path, "train", base, tmp_path / "second", tmp_path / "third")
    params, again = load_peft(tmp_path / "third", base)
    assert again == lora
    close(logits_of(whole, params, args), theirs, base_ours, base_theirs)
    assert np.abs(opened - theirs).max() > 1e-3
