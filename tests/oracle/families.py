"""What works for each family of language models, as a table, measured against PyTorch.

python tests/oracle/families.py            prints the table of rmlora_jax/models/README.md
python tests/oracle/families.py --write    writes it there

Every cell is run on tiny random models: the largest difference of logits, relative to their root
mean square. Needs the python with PyTorch of ``oracle.py``.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[0] = str(Path(__file__).parents[1])  # where `oracle` is this folder

import jax
import jax.numpy as jnp
import numpy as np
from fixtures.peft_decoders import cases
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import oracle

import rmlora_jax as rm
from rmlora_jax.hub import Info, adapter_base, load_peft, load_pretrained, save_model, save_peft
from rmlora_jax.models import new_cache

README = Path(__file__).parents[2] / "rmlora_jax" / "models" / "README.md"
BEGIN, END = "<!-- made by tests/oracle/families.py -->", "<!-- end -->"
LINEAR = r"layers/(attention|mlp)/.*"
NEW = 24  # tokens that are generated

# Case -> what it stands for.
TITLES = {
    "llama": "Llama 2, 3, 3.1, 3.3 (scaled rope)",
    "llama_tied": "SmolLM2, Llama 3.2 (tied head)",
    "mistral": "Mistral (window)",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 (tied head)",
    "gemma2": "Gemma 2 (tied head, window, soft caps)",
    "gemma3": "Gemma 3 (tied head, windows, two ropes)",
    "smollm3": "SmolLM3 (tied head, layers without rope)",
}


class Row(NamedTuple):
    """The cells of a family: differences relative to a root mean square, or of a loss."""

    logits: float
    greedy: int  # tokens that agree, of 3 * NEW
    sft: float
    peft_out: float
    peft_in: float
    merged_out: float


def model_of(base, lora=None):
    model = base.family.model(base.config, base.num_labels)
    return model if lora is None else rm.adapt(model, lora)


def logits_of(base, params, ids, lora=None):
    model = model_of(base, lora)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, ids))(params))


def drawn(base, lora, ids, seed):
    """Parameters with random factors."""
    params = rm.attach(jax.random.key(seed), model_of(base, lora), base.params, ids)
    flat, rng = flatten_dict(params, sep="/"), np.random.default_rng(seed)
    for path, x in flat.items():
        if path.endswith(("lora_a", "lora_b")):
            flat[path] = (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def step_of(base, params, lora, ids, targets):
    """Mean loss, and the norm of its gradient for the factors."""
    model = model_of(base, lora)
    trainable, frozen = rm.split(params, lora)

    def loss(trainable):
        weights = jnp.full(targets.shape, 1 / targets.size)
        variables = {"params": rm.join(trainable, frozen)}
        return model.apply(variables, ids, targets, weights, method="losses")[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    return float(value), float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))


def greedy_of(base, ids):
    """NEW more tokens, by the key-value cache."""
    model, rows = model_of(base), ids.shape[0]
    decode = jax.jit(lambda *args: model.apply({"params": base.params}, *args, method="decode"))
    cache = new_cache(base.config, rows, ids.shape[1] + NEW)
    tokens, places = jnp.asarray(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    found = []
    for _ in range(NEW):
        logits, cache = decode(tokens, places, cache)
        tokens, places = jnp.argmax(logits[:, -1:], -1), places[:, -1:] + 1
        found.append(tokens)
    return np.concatenate(found, axis=1)


def apart(ours, theirs) -> float:
    return float(np.abs(ours - theirs).max() / np.sqrt(np.mean(np.square(theirs))))


def rows(names, work: Path) -> dict[str, Row]:
    """Runs every cell of these cases; PyTorch in one process."""
    oracle.python()
    jobs, ours, bases = {}, {}, {}
    for name in names:
        base = bases[name] = load_pretrained(cases.write_base(work / name, name))
        ids = jnp.asarray(cases.inputs_of(name)["input_ids"])
        targets = np.roll(np.asarray(ids), -1, 1)
        np.savez(work / f"{name}.npz", input_ids=ids)
        np.savez(work / f"{name}.targets.npz", input_ids=ids, targets=targets)
        ends = "embed" if base.config.tie_word_embeddings else "embed|head"
        lora = rm.LoRA(rank=3, alpha=6, target=LINEAR)
        every = rm.LoRA(rank=3, alpha=6, target=f"{LINEAR}|{ends}", rs=True)
        params, more = drawn(base, lora, ids, 0), drawn(base, every, ids, 1)
        save_peft(work / f"{name}.step", params, lora, base)
        save_peft(work / f"{name}.out", more, every, base)
        save_model(work / f"{name}.merged", more, base, info=Info("sft"), lora=every)
        out = logits_of(base, more, ids, every)
        ours[name] = {
            "logits": logits_of(base, base.params, ids), "out": out, "merged": out,
            "greedy": greedy_of(base, ids), "step": step_of(base, params, lora, ids, targets),
        }
        config = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
        jobs |= {(name, what): {
            "base": str(work / (f"{name}.merged" if what == "merged" else name)),
            "inputs": str(work / f"{name}{'.targets' * (what == 'step')}.npz"),
            "made": str(work / f"{name}.{what}.npz"), **extra,
        } for what, extra in {
            "logits": {"new": NEW},
            "step": {"adapter": str(work / f"{name}.step")},
            "out": {"adapter": str(work / f"{name}.out")},
            "in": {"config": config, "out": str(work / f"{name}.in")},
            "merged": {},
        }.items()}
    (work / "jobs.json").write_text(json.dumps(list(jobs.values())))
    oracle.run("decoders.py", work / "jobs.json")
    found = {}
    for name, own in ours.items():
        theirs = {what: dict(np.load(jobs[name, what]["made"])) for what in
                  ("logits", "step", "out", "in", "merged")}
        base = adapter_base(work / f"{name}.in", bases[name])
        params, lora = load_peft(work / f"{name}.in", base)
        inside = logits_of(base, params, jnp.asarray(cases.inputs_of(name)["input_ids"]), lora)
        step = [float(theirs["step"][key]) for key in ("loss", "norm")]
        found[name] = Row(
            logits=apart(own["logits"], theirs["logits"]["logits"]),
            greedy=int((own["greedy"] == theirs["logits"]["tokens"]).sum()),
            sft=max(abs(a / b - 1) for a, b in zip(own["step"], step, strict=True)),
            peft_out=apart(own["out"], theirs["out"]["logits"]),
            peft_in=apart(inside, theirs["in"]["logits"]),
            merged_out=apart(own["merged"], theirs["merged"]["logits"]),
        )
    return found


def table(found: dict[str, Row]) -> str:
    lines = ["| family | load | logits | greedy | SFT step | PEFT out | PEFT in | merged out |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in found.items():
        cells = [f"{x:.0e}" for x in (row.logits, row.sft, *row[3:])]
        cells.insert(1, f"{row.greedy} of {3 * NEW}")
        lines.append(f"| {TITLES[name]} | yes | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = table(rows(list(TITLES), Path(folder)))
    print(made)
    if "--write" in sys.argv[1:]:
        text = README.read_text()
        head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
        README.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}")
