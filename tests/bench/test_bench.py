"""The bench: what the floor is, what its figures follow from, what it refuses. No time is asserted.

    pytest tests/bench/test_bench.py
"""

import contextlib
import dataclasses
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow, slow_but

import rmlora_jax as rm
from rmlora_jax.bench import __main__ as run
from rmlora_jax.bench import measure, models, options, picture, table, variants
from rmlora_jax.bench.measure import Program
from rmlora_jax.bench.models import Entry
from rmlora_jax.bench.variants import compile_variant
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_json
from rmlora_jax.models import Bert, BertConfig, DebertaConfig, ViTConfig
from rmlora_jax.models import vit as vit_module
from rmlora_jax.models.blocks import Parts
from rmlora_jax.report.style import markdown_table, text_table

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24}
TEXT = SIZES | {"vocab_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEBERTA = TEXT | {
    "relative_attention": True,
    "pos_att_type": ("c2p", "p2c"),
    "position_buckets": 4,
    "max_position_embeddings": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
ROOT = Path(__file__).parent.parent.parent
ENTRIES = {
    "vit": Entry(ViTConfig(**SIZES, image_size=8, patch_size=4), 3),
    "bert": Entry(BertConfig(**TEXT), 3, 5),
    "deberta": Entry(DebertaConfig(**DEBERTA), 3, 5),
}


def built(entry, **fields):
    plain = {"dtype": jnp.float32, "base_dtype": jnp.float32, "unroll": 1, "remat": "none",
             "attention": "auto"}
    model = models.build(entry, **plain | fields)
    return model, models.random_params(model, entry)


def compiled(function, *arguments):
    """Compiled without the passes that take long."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*arguments).compile(compiler_options=quick)


def by_parts(model, params, inputs):
    """Embedding and all behind it as separate functions, composed by hand."""
    c, parts = model.config, Parts(model.config, model.dtype, model.param_dtype)
    cross = jnp.ones(inputs.shape[:2], bool)
    if isinstance(c, ViTConfig):
        embed, encoder = vit_module.Embed(parts), vit_module.Encoder(parts)
        x = embed.apply({"params": params["embed"]}, inputs)
        extra = ()
    else:
        embed, encoder = type(model).embed_type(parts), type(model).encoder_type(parts)
        x = embed.apply({"params": params["embed"]}, inputs, jnp.zeros_like(inputs), cross)
        extra = (cross,)

    def after(x):
        out, _ = encoder.apply({"params": params["encoder"]}, x, *extra)
        if isinstance(c, ViTConfig):
            first = out
        else:
            pooler = params["pooler"]
            act = jnp.tanh if isinstance(c, BertConfig) else lambda y: nn.gelu(y, False)
            first = act(out[:, 0] @ pooler["kernel"] + pooler["bias"])
        return first @ params["head"]["kernel"] + params["head"]["bias"]

    return x, after


@pytest.mark.parametrize("kind", slow_but(list(ENTRIES), "vit"))
def test_the_floor_is_the_gradient_at_the_encoders_input(kind):
    entry = ENTRIES[kind]
    model, params = built(entry)
    (inputs, labels), = models.random_batches(entry, 3, 1, model.dtype)
    floor = variants.make_variant("floor", model, entry)

    arguments = jnp.float32(2), params, (inputs, labels)
    total, gradient = compiled(floor.step, *arguments)(*arguments)

    def independent(params):
        x, after = by_parts(model, params, inputs)

        def loss(x):
            return -jnp.mean(jax.nn.log_softmax(after(x))[jnp.arange(len(labels)), labels])

        return jax.value_and_grad(loss)(x)

    value, expected = compiled(independent, params)(params)
    np.testing.assert_allclose(total, 2 + value, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 0


def test_the_floor_has_nothing_to_train_and_reads_the_whole_base():
    entry = ENTRIES["vit"]
    model, params = built(entry)
    floor = variants.make_variant("floor", model, entry)
    assert floor.start(params, None).shape == ()
    assert jax.tree.structure(floor.frozen(params)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "name", slow_but([n for n in variants.VARIANTS if n != "floor"], "rm_lora")
)
def test_a_step_moves_what_it_trains(name):
    entry = ENTRIES["vit"]
    model, params = built(entry)
    (inputs, labels), = models.random_batches(entry, 3, 1, model.dtype)
    variant = variants.make_variant(name, model, entry, rank=2)
    frozen = variant.frozen(params)
    before = variant.start(params, inputs)
    arguments = before, frozen, (inputs, labels)
    after, loss = compiled(variant.step, *arguments)(*arguments)
    moved = {
        "/".join(str(k.key) for k in path)
        for (path, old), new in zip(
            jax.tree.leaves_with_path(before[0]), jax.tree.leaves(after[0]), strict=True
        )
        if np.any(old != new)
    }
    assert np.isfinite(loss)
    if name == "full":
        assert frozen == {} and "embed/patch/kernel" in moved
        assert "encoder/layers/mlp/fc1/kernel" in moved
    elif name == "head":
        assert moved == {"head/kernel", "head/bias"} and "encoder" in frozen
    else:
        linears = {f"encoder/layers/{'mlp' if n[:2] == 'fc' else 'attention'}/{n}"
                   for n in models.LINEARS}
        begins = "lora_e" if name == "adalora" else "lora_b"  # what is not 0 times something
        assert {f"{path}/{begins}" for path in linears} <= moved
        assert {"head/kernel", "head/bias"} <= moved
        assert "head" not in frozen and "embed" in frozen
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(after[0]))


def test_which_methods_mask_and_which_add_the_penalty():
    zeros = {"query": {"lora_a": jnp.zeros((4, 8)), "lora_b": jnp.zeros((8, 4))}}
    params = {"query": {"lora_a": jnp.ones((4, 8)), "lora_b": jnp.ones((8, 4))}}
    for name, masks, penalised in (("lora", False, False), ("reg_only", False, True),
                                   ("mask_only", True, False), ("rm_lora", True, True)):
        _, tx = variants._method(name, 8, variants.MODULES["all"], "auto")
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(zeros, state, params)
        kept = 1.0 if name == "lora" else float(rm.kept_fraction(state))
        assert (0 < kept < 1) if masks else kept == 1
        # Where the loss moves nothing, the penalty alone does.
        assert (optax.tree.norm(updates) > 0) == penalised


@pytest.mark.slow
def test_variants_with_flags_of_their_own():
    spec = "lora:execution=merged:unroll=1:remat=dots"
    given = options.parse(["--model=tiny", f"--variants=floor,lora,{spec}", "--repeats=2"])
    assert given.of("lora") == ("lora", given) and given.unroll == 2
    method, own = given.of(spec)
    assert method == "lora"
    assert (own.execution, own.unroll, own.remat) == ("merged", 1, "dots")
    rows = {row["name"]: row for row in run.bench(given, say=str)["programs"]}
    assert list(rows) == ["floor", "lora", spec]
    assert [rows[name]["execution"] for name in rows] == [None, "factored", "merged"]
    assert all(len(row["ms"]) == 2 for row in rows.values())


def test_the_state_is_donated_and_the_base_survives():
    entry = ENTRIES["vit"]
    model, params = built(entry)
    batches = models.random_batches(entry, 3, 2, model.dtype)
    program = compile_variant(variants.make_variant("full", model, entry), params, batches)
    assert program.stretch(2) > 0
    assert program.stretch(1) > 0  # begins anew: the base was copied, not given away
    assert np.isfinite(jax.tree.leaves(params)[0]).all()
    parts = program.facts["memory_parts"]
    assert parts["alias"] > 0
    assert program.facts["memory_bytes"] == (
        parts["arguments"] + parts["temp"] + parts["output"] - parts["alias"]
    )
    assert program.facts["trained_parameters"] == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("execution", ["auto", "factored", "merged"])
def test_the_execution_is_told(execution):
    entry = ENTRIES["vit"]
    model, params = built(entry)
    batches = models.random_batches(entry, 3, 1, model.dtype)
    variant = variants.make_variant("lora", model, entry, execution=execution)
    told = compile_variant(variant, params, batches).facts["execution"]
    assert told == ("merged" if execution == "merged" else "factored")


COUNTED = {
    "vit": Entry(ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=320, hidden_act="relu", image_size=28,
                           patch_size=4), 4),
    "deberta": Entry(DebertaConfig(**DEBERTA | {
        "hidden_size": 128, "intermediate_size": 320, "hidden_act": "relu"}), 8, 16),
    "bert": Entry(BertConfig(**TEXT | {
        "hidden_size": 128, "intermediate_size": 320, "hidden_act": "relu"}), 4, 48),
}


@pytest.mark.parametrize(
    "kind, name, modules",
    [slow("vit", "floor", "all"), ("vit", "lora", "all"), slow("vit", "lora", "query+value"),
     slow("vit", "lora", "mlp"), slow("vit", "full", "all"), slow("vit", "head", "all"),
     slow("bert", "head", "all"), slow("bert", "lora", "attention"),
     slow("deberta", "floor", "all"), ("deberta", "lora", "all"), slow("deberta", "full", "all")],
)
def test_the_flops_of_a_step_are_what_xla_counts(kind, name, modules):
    entry, rank = COUNTED[kind], 16
    model, params = built(entry, unroll=2)
    variant = variants.make_variant(name, model, entry, rank=rank, modules=modules,
                                    execution="factored")
    (batch,) = models.random_batches(entry, entry.batch, 1, model.dtype)
    state = jax.eval_shape(variant.start, params, batch[0])
    program = compiled(variant.step, state, variant.frozen(params), batch)
    counted = program.cost_analysis()["flops"]
    needed = variants.step_flops(entry, entry.batch, name, rank, modules)
    # XLA also counts norms, softmax, activations and the optimizer.
    assert 1 <= counted / needed < 1.06


RESULTS = {
    "options": {"model": "vit-tiny", "batch": 32, "length": None, "image_size": 32, "rank": 4,
                "modules": "all", "dtype": "float32", "base_dtype": "float32", "unroll": 12,
                "remat": "none", "sweep": ""},
    "device": "some device",
    "versions": {"jax": "0.10"},
    "tokens": 17,
    "product": {"side": 1024, "flops": 2 * 1024**3, "ms": [30.0, 20.0, 25.0], "error": None},
    "programs": [
        {"name": "floor", "flops": 4e9, "ms": [100.0, 110.0, 104.0], "memory_bytes": 2**28,
         "compile_seconds": 3.0, "error": None, "execution": None},
        {"name": "lora", "flops": 4e9, "ms": [120.0, 121.0, 130.0], "memory_bytes": 2**29,
         "compile_seconds": 4.0, "error": None, "execution": "factored"},
        {"name": "rm_lora", "flops": 4e9, "ms": [126.0, 121.0, 143.0], "memory_bytes": 2**29,
         "compile_seconds": 4.0, "error": None, "execution": "factored"},
        {"name": "full", "flops": 6e9, "ms": [], "error": "out of memory"},
    ],
}


def test_the_tables_figures_follow_from_the_repeats():
    rows = {row.name: row for row in table.table_rows(RESULTS)}
    floor, lora, own = (np.array(RESULTS["programs"][i]["ms"]) for i in range(3))
    row = rows["rm_lora"]
    assert row.ms == (np.median(own), np.quantile(own, 0.25), np.quantile(own, 0.75))
    for name, other in (("floor", floor), ("lora", lora)):
        paired = own / other
        np.testing.assert_allclose(
            row.ratios[name],
            (np.median(paired), np.quantile(paired, 0.25), np.quantile(paired, 0.75)),
        )
    # Paired: not the ratio of the medians.
    assert row.ratios["floor"].median != np.median(own) / np.median(floor)
    assert row.rate == 32 / (np.median(own) / 1000)
    np.testing.assert_allclose(row.share, (4e9 / 0.126) / (2 * 1024**3 / 0.020))
    assert (row.memory, row.compile_seconds) == (2**29, 4.0)
    assert rows["full"].ms is None and rows["full"].note == "out of memory"


def test_terminal_and_markdown_hold_the_same_figures():
    lines = table.cells(table.table_rows(RESULTS))
    text, markdown = text_table(lines), markdown_table(lines)
    for shown in ("126", "1.260 (1.180 - 1.317)", "254", "512.0 MiB", "out of memory"):
        assert shown in text and shown in markdown
    assert len({len(line.split("|")) for line in markdown.splitlines()}) == 1
    head, *body = text.splitlines()
    end = head.index("ms") + 2
    assert [line[:end].split()[-1] for line in body[:3]] == ["104", "121", "126"]


def test_results_survive_json_and_are_drawn(tmp_path):
    shown = run.write(RESULTS, tmp_path)
    assert read_json(tmp_path / "bench.json") == RESULTS
    assert "bench.png" in shown and "| rm_lora | 126 |" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    rows = table.table_rows(RESULTS)
    time, memory = picture.bench_figure(RESULTS, rows).axes
    assert [bar.get_width() for bar in time.patches] == [104.0, 121.0, 126.0, 0]
    assert [bar.get_width() for bar in memory.patches] == [256, 512, 512, 0]
    assert any(text.get_text() == "out of memory" for text in time.texts)


def test_a_sweep_is_drawn_with_its_gaps(tmp_path):
    without = json.loads(json.dumps(RESULTS))
    without["programs"][2] |= {"ms": [], "error": "out of memory"}
    benches = [json.loads(json.dumps(b)) for b in (RESULTS, RESULTS, without)]
    for bench in benches:
        bench["options"]["sweep"] = "rank"
    found = {"sweep": "rank", "values": [1, 4, 16], "benches": benches}
    run.write_sweep(found, tmp_path)
    assert read_json(tmp_path / "bench_sweep.json") == found
    lines = (tmp_path / "bench_sweep.md").read_text().splitlines()
    assert sum(line.startswith("| 16 |") for line in lines) == 4
    _, ratio = picture.sweep_figure(found).axes
    drawn = {line.get_label(): line for line in ratio.get_lines()}
    assert drawn["lora"].get_xdata().tolist() == [1, 4, 16]
    assert drawn["rm_lora"].get_xdata().tolist() == [1, 4]
    np.testing.assert_allclose(drawn["rm_lora"].get_ydata(), [1.26, 1.26], rtol=0.1)


def test_programs_take_turns():
    calls = []

    def program(name, seconds):
        def stretch(steps):
            calls.append((name, steps))
            return seconds * steps
        return Program(name, stretch, {})

    found = measure.measure([program("a", 0.03), program("b", 0.5)], repeats=3, say=str)
    assert [name for name, _ in calls[-6:]] == ["a", "b", "b", "a", "a", "b"]
    assert found["a"]["steps"] * 0.03 >= 0.2 and found["b"]["steps"] == 1
    np.testing.assert_allclose(found["a"]["ms"], [30] * 3)
    assert measure.measure([program("a", 0.03)], repeats=1, steps=2, say=str)["a"]["steps"] == 2


def test_lack_of_memory_is_a_row():
    def short(steps):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    def broken(steps):
        raise RuntimeError("something else")

    fine = Program("fine", lambda steps: float(steps), {})
    found = measure.measure([Program("short", short, {}), fine], repeats=2, say=str)
    assert found["short"] == {"steps": None, "ms": [], "error": "out of memory"}
    assert found["fine"]["ms"] == [1000.0, 1000.0]
    with pytest.raises(RuntimeError, match="something else"):
        measure.measure([Program("broken", broken, {})], repeats=1, say=str)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model=vit-bse"], "no model 'vit-bse'; did you mean vit-base"),
        (["--batchs=3"], "no argument --batchs; did you mean --batch"),
        (["--model=vit-base", "--length=64"], "reads images, which have no --length"),
        (["--model=minilm", "--image_size=64"], "reads texts, which have no --image_size"),
        (["--model=minilm", "--length=600"], "type --length=512"),
        (["--model=vit-base", "--image_size=8"], "type --image_size=16"),
        (["--variants=floor,rm_lore"], "--variants=rm_lore must be one of .*did you mean rm_lora"),
        (["--variants=lora:unrol=1"], "own flag=unrol must be one of .*did you mean unroll"),
        (["--variants=lora:unroll=13"], "--unroll=13 must be all"),
        (["--variants=lora:remat=dot"], "--remat='dot': must be .*did you mean dots"),
        (["--remat=dot"], "must be one of none, dots, attention, full; did you mean dots"),
        (["--execution=both"], "--execution='both': must be one of auto, factored, merged"),
        (["--attention=flash"], "--attention='flash': must be one of auto, xla, cudnn"),
        (["--dtype=bf16"], "--dtype='bf16': must be one of bfloat16"),
        (["--base_dtype=int8"], "--base_dtype='int8': must be one of"),
        (["--unroll=13"], "--unroll=13 must be all, or a number of layers from 1 to 12"),
        (["--batch=0"], "--batch=0: must be at least 1"),
        (["--rank=0"], "--rank=0: must be"),
        (["--repeats=0"], "--repeats=0: must be"),
        (["--steps=0"], "--steps=0: must be"),
        (["--batch=many"], "--batch: invalid int value"),
        (["--sweep=ranks"], "--sweep='ranks': must be one of rank, .*did you mean rank"),
        (["--values=1,2"], "--values belong to a sweep"),
        (["--sweep=rank", "--values=1,x"], "--values=1,x must be whole numbers"),
        (["--sweep=modules", "--values=mpl"], "--values=mpl must be one of .*did you mean mlp"),
        (["--sweep=length"], "vit-base reads images, which have no length to sweep"),
        (["--sweep=rank", "--variants=lora"], "type --variants=floor,lora"),
        (["--sweep=rank", "--peft"], "--peft does not go with --sweep"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(UserError, match=words):
        options.parse(arguments)


def test_refusals_that_need_the_machine(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*file: .*type another folder"):
        options.check_folder(str(tmp_path / "file"))
    given = options.parse(["--model=minilm", "--attention=cudnn", "--variants=floor"])
    fields = {field.name for field in dataclasses.fields(Bert)}
    if "attention" not in fields:
        with pytest.raises(UserError, match="--attention=cudnn does not fit Bert"):
            run.bench(given, say=str)
    given = options.parse(["--model=tiny", "--attention=cudnn", "--variants=floor"])
    with pytest.raises(UserError, match=r"--attention=cudnn does not run here.*\n.*attention=xla"):
        run.bench(given, say=str)


MISSING = [n for n in ("torch", "transformers", "peft") if not importlib.util.find_spec(n)]


@pytest.mark.skipif(not MISSING, reason="all is there")
def test_peft_says_what_to_install():
    words = f"--peft needs {', '.join(MISSING)}(.|\\n)*pip install {' '.join(MISSING)}"
    with pytest.raises(UserError, match=words):
        run.bench(options.parse(["--model=tiny", "--peft"]), say=str)


def test_defaults_are_the_models_and_the_devices():
    given = options.parse(["--model=vit-base"])
    assert (given.batch, given.unroll, given.dtype, given.base_dtype) == (
        256, 12, "float32", "float32")
    assert given.variants == variants.USUAL and given.values == ()
    swept = options.parse(["--model=minilm", "--sweep=length", "--dtype=bfloat16", "--unroll=2"])
    assert swept.variants == ("floor", "lora", "rm_lora") and max(swept.values) == 512
    assert (swept.base_dtype, swept.unroll, swept.batch) == ("bfloat16", 2, 32)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_has_its_shapes(name):
    entry = models.find_model(name)
    model = models.build(entry, dtype=jnp.bfloat16, base_dtype=jnp.bfloat16, unroll=1,
                         remat="dots", attention="auto")
    shapes = jax.eval_shape(lambda: models.random_params(model, entry))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    published = {"vit-base": 86e6, "vit-large": 304e6, "bert-base": 109e6, "roberta-base": 125e6,
                 "deberta-v3-base": 184e6, "minilm": 22.7e6, "vit-tiny": 5.4e6,
                 "tiny": 32170, "decoder": 960e6}
    assert abs(count / published[name] - 1) < 0.03
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(shapes))


def test_the_command(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rmlora_jax.bench", "--model=tiny", "--variants=floor,rm_lora",
               "--unroll=1", "--repeats=3", "--steps=2", f"--out={out}"]
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert "compiling rm_lora" in done.stdout and "limit: " in done.stdout
    results = read_json(out / "bench.json")
    assert [p["name"] for p in results["programs"]] == ["floor", "rm_lora"]
    assert all(len(p["ms"]) == 3 and min(p["ms"]) > 0 for p in results["programs"])
    assert results["programs"][1]["execution"] == "factored"
    shown = table.cells(table.table_rows(results))
    assert text_table(shown) in done.stdout
    assert (out / "bench.png").exists() and (out / "bench.md").exists()

    refused = subprocess.run([*command[:3], "--model=vit"], cwd=tmp_path, env=environment,
                             capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: there is no model 'vit'")
    assert "Traceback" not in refused.stderr


def test_the_kernels_of_a_trace(monkeypatch):
    """Two steps on one stream; what the host and the other lanes of the device say is left out."""
    names = [
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 7, "tid": 1, "args": {"name": "Stream #13"}},
        {"ph": "M", "name": "thread_name", "pid": 7, "tid": 2, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 9, "tid": 1, "args": {"name": "Stream #13"}},
    ]
    took = [("nvjet_tst_64", 3000), ("loop_add_fusion_2", 500), ("loop_add_fusion_11", 700)]
    spans = [{"ph": "X", "pid": 7, "tid": 1, "name": n, "dur": d} for n, d in took] * 2
    others = [{"ph": "X", "pid": p, "tid": t, "name": "nvjet_tst_64", "dur": 9e9}
              for p, t in ((7, 2), (9, 1))]
    found = measure.kernels(names + spans + others, steps=2)
    assert found == [{"kernel": "nvjet_tst", "ms": 3.0, "calls": 1.0},
                     {"kernel": "loop_add_fusion", "ms": 1.2, "calls": 2.0}]
    text = table.kernel_table(found)
    assert "| **matrix products** | 3.00 | 71 % |" in text and "| **element by element** |" in text

    def trace_written(folder):
        @contextlib.contextmanager
        def trace():
            yield
            events = gzip.compress(json.dumps({"traceEvents": names + spans}).encode())
            (Path(folder) / "plugins").mkdir()
            (Path(folder) / "plugins" / "x.trace.json.gz").write_bytes(events)

        return trace()

    monkeypatch.setattr(jax.profiler, "trace", trace_written)
    given = options.parse(["--model=tiny", "--variants=floor", "--repeats=1", "--profile"])
    results = run.bench(given, say=str)
    (row,) = results["programs"]
    assert row["profile"][0] == {"kernel": "nvjet_tst", "ms": 1.5, "calls": 0.5}
    assert "`loop_add_fusion`" in table.markdown(results)


def stored(name):
    return read_json(ROOT / "tests" / "results" / f"bench_{name}.json")


@pytest.mark.parametrize("name", [
    "h100_vit_base", "h100_minilm", "h100_roberta_base", "h100_deberta_v3_base", "h200_decoder",
    "h200_vit_tiny",
])
def test_a_table_of_a_gpu_is_that_of_the_stored_repeats(name):
    text = (ROOT / "rmlora_jax" / "bench" / "README.md").read_text()
    assert markdown_table(table.cells(table.table_rows(stored(name)))) in text


def test_what_is_stored_names_no_folder_of_the_machine_that_made_it():
    files = list((ROOT / "tests" / "results").glob("bench_*.json"))
    texts = {file.name: file.read_text() for file in files}
    assert files and not [name for name, text in texts.items() if '"out": "/' in text]


@pytest.mark.parametrize("name", ["rank", "length", "modules", "batch"])
def test_a_stored_sweep_is_drawn_with_a_stroke_for_each_form_of_a_method(name):
    figure = picture.sweep_figure(stored(f"h200_sweep_{name}"))
    strokes = {line.get_label(): line.get_linestyle() for line in figure.axes[0].get_lines()}
    assert strokes["rm_lora:execution=factored"] == "-"
    assert strokes["rm_lora:execution=merged"] == "--"
