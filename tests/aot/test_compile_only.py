"""``run.py --compile_only``: the step of a real run, and the decision whether it fits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from fixtures.text.tiny import config_of, write_model, write_texts
from marks import slow

from rmlora_jax.aot import compile_only as module
from rmlora_jax.aot import topology
from rmlora_jax.aot.compile_only import (
    RunShapes,
    collective_rows,
    compile_only,
    open_shapes,
    refused,
)
from rmlora_jax.aot.counts import Collective
from rmlora_jax.aot.topology import CHIPS, chip_of, tpu_devices
from rmlora_jax.errors import UserError
from rmlora_jax.hub.pretrained import find_architecture
from rmlora_jax.hub.source import PUBLISHED
from rmlora_jax.parallel import memory
from rmlora_jax.parallel.mesh import all_devices, shard
from rmlora_jax.report.records import amount
from rmlora_jax.sweep import many
from rmlora_jax.sweep.grid import runs
from rmlora_jax.tasks.sft import use_sft
from rmlora_jax.train import setup
from rmlora_jax.train.config import default_config, resolve, use_glue
from rmlora_jax.train.shortage import smaller

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_model(folder / "model")
    write_texts(folder / "train.jsonl", 200, seed=0)
    return folder


def lowered(step, arguments):
    return step.lower(*arguments).as_text()


@pytest.mark.parametrize(
    "changes",
    [
        slow({}),
        slow({"data.mode": "stream", "accumulate": 2}),
        {"method": "adalora", "model.base_dtype": "bfloat16"},
        slow({"method": "bottleneck"}),
    ],
    ids=str,
)
def test_the_step_is_that_of_a_real_run(config, changes):
    config.update_from_flattened_dict(changes)
    devices = all_devices()
    job, run = setup.build(resolve(config), devices), open_shapes(resolve(config), devices)
    batch = shard(next(iter(job.feed.train(0))), devices)
    real = lowered(job.train_step, (job.state, job.constants, batch))
    assert lowered(run.step, run.arguments) == real
    assert run.base.trainable_parameters == job.base.trainable_parameters
    assert run.base.total_parameters == job.base.total_parameters
    assert run.task.outputs == 10 and run.runs == 1


def test_the_step_of_texts_has_their_greatest_length(texts):
    config = config_of(texts, 20)
    config.text.one_length = True
    devices = all_devices()
    job, run = setup.build(resolve(config), devices), open_shapes(resolve(config), devices)
    batch = shard(next(iter(job.feed.train(0))), devices)
    assert lowered(run.step, run.arguments) == lowered(
        job.train_step, (job.state, job.constants, batch)
    )
    config.text.one_length = False
    assert run.arguments[2]["input_ids"].shape == (16, 48)


def test_the_step_of_a_sweep_is_that_of_all_its_runs(config):
    config.sweep.seeds, config.sweep.grid = 2, "{'penalty': (0, .1)}"
    devices = all_devices(limit=1)
    config = resolve(config)
    base, every = setup.open_base(config, devices), runs(config)
    job, run = many.build(every, base), open_shapes(config, devices)
    assert run.runs == len(every) == 4
    batch = shard(next(iter(job.feed.train(0))), devices)
    assert lowered(run.step, run.arguments) == lowered(
        job.train_step, (job.state, job.constants, batch)
    )


def published(name, task=None, **changes):
    c = default_config()
    if task == "sft":
        use_sft(c)
    elif task:
        use_glue(c, task)
    c.model.source, c.model.attention = name, "auto"
    c.method = "full"
    c.update_from_flattened_dict(changes)
    return open_shapes(resolve(c), all_devices())


@pytest.mark.parametrize(
    ("name", "task", "changes", "parameters"),
    [
        # ViTForImageClassification with 1,000 classes has 86,567,656.
        ("google/vit-base-patch16-224-in21k", None, {}, 86_567_656 - 900 * 769),
        # DebertaV2ForSequenceClassification and RobertaForSequenceClassification of two labels.
        ("microsoft/deberta-v3-base", "cola", {}, 184_423_682),
        ("microsoft/deberta-v3-base", "mnli", {}, 184_423_682 + 769),
        ("FacebookAI/roberta-base", "stsb", {}, 124_647_170 - 769),
        # As their model cards and transformers have them.
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "sft", {}, 134_515_008),
        ("meta-llama/Llama-3.1-8B-Instruct", "sft", {}, 8_030_261_248),
        ("Qwen/Qwen3-8B", "sft", {}, 8_190_735_360),
        ("google/gemma-3-1b-it", "sft", {}, 999_885_952),
        ("mistralai/Mistral-7B-Instruct-v0.3", "sft", {}, 7_248_023_552),
    ],
)
def test_published_architectures_have_their_parameters(name, task, changes, parameters):
    run = published(name, task, **changes)
    assert run.base.total_parameters == run.base.trainable_parameters == parameters


def test_cifar_is_counted_without_being_there(tmp_path):
    c = default_config()
    c.data.data_dir = str(tmp_path)
    c.update_from_flattened_dict({"data.classes": 20, "data.per_class": 100, "batch_size": 32})
    run = open_shapes(resolve(c), all_devices())
    _, constants, batch = run.arguments
    assert run.task.outputs == 20
    assert constants.data["image"].shape == (20 * 100 + 20 * 100, 32, 32, 3)
    assert set(batch) == {"id"}
    c.data.mode = "stream"
    assert open_shapes(resolve(c), all_devices()).arguments[2]["image"].shape == (32, 32, 32, 3)
    c.data.name, c.data.mode = "food101", "auto"
    # As preprocessor_config.json of most ViTs says, or with a margin.
    assert open_shapes(resolve(c), all_devices()).arguments[2]["image"].shape == (32, 224, 224, 3)
    c.data.resize = "square"
    assert open_shapes(resolve(c), all_devices()).arguments[2]["image"].shape == (32, 256, 256, 3)
    c.data.classes = c.data.per_class = 0
    with pytest.raises(UserError, match=r"food101(.|\n)*--config.data.classes=N"):
        open_shapes(resolve(c), all_devices())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.source": "some/where"}, "hf download some/where config.json"),
        ({"model.source": "microsoft/deberta-v3-base"}, "does not fit config.task='image_"),
        ({"model.adapter": "x"}, "--config.model.adapter="),
        ({"parallel": "pmap"}, "--config.parallel=mesh"),
        ({"task": "speech_classification", "data.name": "japanese_vowels"}, "leave out"),
        ({"batch_size": 12}, "--config.batch_size="),
        ({"lora.target": "encoder/block.*"}, "encoder/layers"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_said(config, changes, words):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as raised:
        open_shapes(resolve(config), all_devices())
    assert words in str(raised.value)


def test_a_folder_needs_its_config_alone(tiny_vit, tmp_path):
    (tmp_path / "config.json").write_text((tiny_vit / "config.json").read_text())
    _, found = find_architecture(str(tmp_path), image_size=32)
    assert (found.hidden_size, found.image_size) == (32, 32)
    language = {"HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct",
                "Qwen/Qwen3-8B", "google/gemma-3-1b-it", "mistralai/Mistral-7B-Instruct-v0.3"}
    assert set(PUBLISHED) == language | {default_config().model.source, "microsoft/deberta-v3-base",
                                         "FacebookAI/roberta-base"}


@pytest.mark.slow
def test_memory_decides(config, monkeypatch, capsys):
    config.compilation_cache = ""
    monkeypatch.setattr(memory, "available", lambda: 2**40)
    compile_only(resolve(config))
    said = capsys.readouterr().out
    run = open_shapes(resolve(config), all_devices())
    need = memory.needed(run.step.lower(*run.arguments).compile())
    reduced = 4 * (run.base.trainable_parameters + 2)
    for words in ("8 x cpu", "16, 2 a device", amount(need), "1 all-reduce,",
                  f"{reduced:,} bytes; gradients are {reduced - 8:,}", "TFLOP"):
        assert words in said
    assert "of 1024.0 GiB" in said
    monkeypatch.setattr(memory, "available", lambda: need)
    compile_only(resolve(config))  # the last byte may be used
    monkeypatch.setattr(memory, "available", lambda: need - 1)
    with pytest.raises(UserError) as raised:
        compile_only(resolve(config))
    text = str(raised.value)
    assert amount(need) in text and "8 devices of this machine" in text
    assert len(text.splitlines()) == 2
    for words in ("model.remat=dots", "model.remat=full", "accumulate=2", "batch_size=8",
                  "model.base_dtype=bfloat16"):
        assert f"--config.{words}" in text


def test_advice_is_only_what_can_be_followed(config):
    devices = all_devices()
    config.batch_size, config.model.remat = 8, "full"
    config.model.base_dtype = "bfloat16"
    assert smaller(config, devices) == []
    config.batch_size, config.accumulate, config.model.remat = 32, 4, "attention"
    assert smaller(config, devices) == ["--config.model.remat=full"]
    config.accumulate = 2
    found = smaller(config, devices)
    assert found[1:] == ["--config.accumulate=4", "--config.batch_size=16"]
    for words in found:  # each passes the checks of a run
        other = config.copy_and_resolve_references()
        name, _, value = words.removeprefix("--config.").partition("=")
        other.update_from_flattened_dict({name: int(value) if value.isdigit() else value})
        setup.check_batches(other, devices)


def test_a_compiler_that_gives_up_is_too_large(config, monkeypatch):
    words = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
             "memory required for HLO temporaries (166.08G) exceeds available HBM (15.75G).")

    class Gives:
        def trace(self, *_):
            return self

        def lower(self):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(words)

    run = RunShapes(Gives(), (), None, None, 1)
    monkeypatch.setattr(module, "open_shapes", lambda *_: run)
    with pytest.raises(UserError, match=r"needs 166\.1 GiB on each .* have 15\.8 GiB"):
        compile_only(resolve(config))
    older = "Ran out of memory in memory space hbm. Used 20.50G of 512.0M hbm."
    assert refused(RuntimeError(older)) == (int(20.5 * 2**30), 2**29)
    assert refused(RuntimeError("RESOURCE_EXHAUSTED")) is None
    monkeypatch.setattr(memory, "is_short", lambda e: False)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_only(resolve(config))


def test_collectives_in_words():
    found = [Collective("all-reduce", 400, 1), Collective("all-reduce", 8, 1),
             Collective("all-gather", 2048, 12)]
    assert [words for _, words in collective_rows(found, 400)] == [
        "2 all-reduce, 408 bytes in all",
        "1 all-gather in a loop of 12 turns, 2.0 KiB in all",
        "a step 24,984 bytes; gradients are 400 bytes",
    ]
    assert "without a known end" in str(collective_rows([Collective("all-reduce", 4, None)], 4))


def test_chips():
    assert {name: chip.memory // 2**30 for name, chip in CHIPS.items()} == {
        "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    for example in topology.EXAMPLES.replace(" or", ",").split(", "):
        chip_of(example)
    for name, words in [("v5f:4x4", "did you mean v5"), ("v9", "there are v4"),
                        ("v4:4x4", "3 axes"), ("v5e", "2 axes"), ("v6e:0x4", "v6e:8x8"),
                        ("v5e:2x2x2", "as in v5e:4x4")]:
        with pytest.raises(UserError) as raised:
            chip_of(name)
        assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rmlora-jax\[tpu\]'"):
        tpu_devices("v5e:4x4")


def run(*flags, python=sys.executable, env=(), timeout=300):
    return subprocess.run([str(python), str(ROOT / "run.py"), *flags], capture_output=True,
                          text=True, timeout=timeout, env=os.environ | dict(env), cwd=ROOT)


@pytest.mark.slow
def test_the_command(tiny_vit, tmp_path):
    workdir = tmp_path / "new"
    given = [f"--workdir={workdir}", f"--config.model.source={tiny_vit}", "--compile_only",
             "--config.model.image_size=16", "--config.compilation_cache="]
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert "training step" in done.stdout and "all-reduce" in done.stdout
    assert not workdir.exists()
    for flags, words in [(["--topology=v5e:4x4"], "--compile_only"),
                         (["--compile_only", "--distributed"], "leave out --distributed"),
                         (["--compile_only", "--topology=v5e:4"], "v5e:4x4")]:
        done = run(*flags)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def tpu_python() -> Path | None:
    """A Python whose environment has libtpu."""
    python = Path(os.environ.get("RMLORA_TPU_PYTHON", ROOT / ".venv-tpu" / "bin" / "python"))
    if not python.exists():
        return None
    check = "import importlib.util as u; raise SystemExit(not u.find_spec('libtpu'))"
    return python if subprocess.run([str(python), "-c", check]).returncode == 0 else None


def tpu(*flags):
    python = tpu_python()
    if python is None:
        pytest.skip("no libtpu: set RMLORA_TPU_PYTHON, or make .venv-tpu with "
                    "pip install '.[train,tpu]'")
    return run(*flags, "--compile_only", python=python, timeout=3000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:4x4", "v4:2x2x2"])
@pytest.mark.parametrize(
    ("file", "gradients"),
    [
        # 12 layers of 4 (768 to 768) and 2 (768 to 3072, and back) at rank 4, and the head.
        ("vit_cifar100.py", 165_888 * 4 + 769 * 100),
        # and the pooler
        ("deberta_glue.py:cola", 165_888 * 4 + 769 * 2 + 769 * 768),
    ],
)
def test_on_a_tpu_that_is_not_there(name, file, gradients):
    done = tpu(f"--config=configs/{file}", f"--topology={name}", "--config.model.unroll=1")
    assert done.returncode == 0, done.stderr
    chips = {"v5e:4x4": "16 x TPU v5 lite", "v4:2x2x2": "8 x TPU v4"}[name]
    assert chips in done.stdout
    assert f"{4 * (gradients + 2):,} bytes; gradients are {4 * gradients:,}" in done.stdout
    assert "loop" not in done.stdout and "all-gather" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "flags", "trained"),
    [
        # Rank 16 on seven layers of every block. The package of SmolLM2 may be missing.
        ("smollm2", ["--config.model.source=HuggingFaceTB/SmolLM2-135M-Instruct"], 4_884_480),
        ("gemma3", ["--config.fsdp=16"], 13_045_760),
        ("llama3", ["--config.fsdp=16"], 41_943_040),
        ("qwen3", ["--config.fsdp=16"], 43_646_976),
        ("mistral", ["--config.fsdp=16"], 41_943_040),
    ],
)
def test_language_models_on_a_tpu_that_is_not_there(file, flags, trained):
    done = tpu(f"--config=configs/{file}_sft.py", "--topology=v5e:4x4", *flags)
    assert done.returncode == 0, done.stderr
    assert "16 x TPU v5 lite" in done.stdout and f"{trained:,} trained" in done.stdout
    assert "1 a device, rows of" in done.stdout


@pytest.mark.slow
def test_what_does_not_fit_on_a_tpu():
    done = tpu("--config=configs/vit_cifar100.py", "--topology=v5e:2x2", "--config.batch_size=4096",
               "--config.model.unroll=1")
    assert done.returncode == 1, done.stdout
    assert "4 devices of v5e:2x2, which have 15.8 GiB" in done.stderr
    assert "--config.model.remat=dots" in done.stderr and "Traceback" not in done.stderr
