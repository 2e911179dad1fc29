"""The checks of a config's fields, made before anything is loaded: all mistakes at once."""

import re
import types

import ml_collections

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.lora import EXECUTIONS
from rmlora_jax.train import grid
from rmlora_jax.train.config import (
    ADAPTED,
    ALSO,
    GATED,
    KINDS,
    METHODS,
    SPEECH,
    SWEEPABLE,
    TEXTS,
    data_seed,
    flatten,
    is_sweep,
    runs,
)
from rmlora_jax.train.scores import NAMES


def check_config(c: ml_collections.ConfigDict) -> None:
    """Raises one UserError that lists every mistake in the fields' values."""
    wrong = []

    def need(ok: bool, field: str, allowed: str):
        if not ok:
            wrong.append(f"config.{field}={flatten(c)[field]!r}: must be {allowed}")

    def one_of(field: str, *allowed: str):
        value = flatten(c)[field]
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            wrong.append(f"config.{field}={value!r}: must be one of {', '.join(allowed)}{hint}")

    flat = types.SimpleNamespace(**flatten(c))
    one_of("task", *KINDS)
    one_of("method", *METHODS)
    one_of("parallel", "mesh", "pmap")
    one_of("model.dtype", "bfloat16", "float16", "float32")
    one_of("model.base_dtype", "bfloat16", "float16", "float32")
    one_of("model.attention", "auto", "xla", "cudnn")
    one_of("model.remat", "none", "dots", "full")
    one_of("data.mode", "auto", "resident", "stream")
    one_of("data.crop", "pad", "resized", "none")
    one_of("lora.init", "kaiming", "normal", "gaussian", "orthogonal", "pissa")
    one_of("lora.execution", *EXECUTIONS)
    one_of("sora.proximal", "paper", "authors_exact")
    one_of("rm.kind", "norm", "squared", "cosine")
    one_of("rm.draw", "bernoulli", "exact")
    one_of("rm.unit", "rank", "element", "matrix")
    one_of("rm.coupling", "paired", "independent")
    one_of("rm.placement", "before", "after", "lazy")
    one_of("optimizer.schedule", "linear", "cosine", "constant")
    for field in ("batch_size", "accumulate", "eval_batch_size", "log_every", "lora.rank",
                  "model.unroll", "data.workers", "text.max_length", "rm.resample_every",
                  "adalora.initial_rank", "adalora.every", "sora.initial_rank",
                  "bottleneck.width", "prefix.length", "speech.width", "speech.layers",
                  "speech.heads"):
        need(vars(flat)[field] >= 1, field, "at least 1")
    for field in ("steps", "eval_every", "model.image_size", "data.limit", "data.per_class",
                  "data.processes", "data.bad_records", "sweep.seeds", "sweep.at_once",
                  "rm.penalty", "rm.start_step", "optimizer.weight_decay", "optimizer.clip",
                  "adalora.warmup",
                  "adalora.orthogonal", "adalora.target", "sora.sparsity", "sora.l1",
                  "speech.clusters"):
        need(vars(flat)[field] >= 0, field, "0 or more")
    need(c.data.classes == 0 or c.data.classes >= 2, "data.classes", "0 for all, or at least 2")
    need(c.steps > 0 or c.epochs > 0, "epochs", "above 0 where steps is 0")
    need(c.lora.alpha > 0, "lora.alpha", "above 0")
    need(c.optimizer.learning_rate > 0, "optimizer.learning_rate", "above 0")
    need(c.optimizer.lora_plus > 0, "optimizer.lora_plus", "above 0")
    if c.method not in ADAPTED:
        need(c.optimizer.lora_plus == 1, "optimizer.lora_plus", f"1: {c.method} has no lora_b")
    need(0 < c.adalora.final < 1 - c.adalora.warmup, "adalora.final",
         "above 0 and, with adalora.warmup, below 1")
    need(c.sora.gate_rate > 0, "sora.gate_rate", "above 0")
    if c.model.adapter:
        need(c.method in ADAPTED and c.method not in GATED, "model.adapter",
             f"empty for {c.method}; it is for {', '.join(m for m in ADAPTED if m not in GATED)}")
        need(c.task != SPEECH, "model.adapter", "empty for speech")
        need(not is_sweep(c), "model.adapter", "empty for sweep.*, whose runs begin apart")
    if c.method == "adalora":
        left = c.adalora.target or c.lora.rank
        need(c.adalora.initial_rank > left, "adalora.initial_rank",
             f"above adalora.target or lora.rank, {left}, which is what is left")
    if c.method == "sora":
        need(c.lora.init != "pissa", "lora.init", "another than pissa for sora")
    need(0 <= c.optimizer.warmup < 1, "optimizer.warmup", "a fraction of the steps in [0, 1)")
    need(0 <= c.optimizer.label_smoothing < 1, "optimizer.label_smoothing", "in [0, 1)")
    need(0 <= c.lora.dropout < 1, "lora.dropout", "in [0, 1)")
    need(c.data.validation > 0, "data.validation", "above 0: the best step is chosen on it")
    need(c.batch_size % c.accumulate == 0, "accumulate", f"a divisor of batch_size {c.batch_size}")
    need(0 <= c.seed < 2**31, "seed", "from 0 to 2147483647")
    need(0 <= data_seed(c) < 2**31, "data.seed", "from 0 to 2147483647")
    if c.task in TEXTS:
        for field, only in (("model.image_size", 0), ("model.attention", "auto")):
            need(vars(flat)[field] in (only, "xla"), field, f"{only!r} for text")
        for field in ("data.classes", "data.per_class"):
            need(vars(flat)[field] == 0, field, "0 for text")
        need(len(c.text.columns) <= 2, "text.columns", "at most two names")
        for name in c.text.metrics:
            need(name in NAMES, "text.metrics", f"names among {', '.join(NAMES)}")
    if c.task == SPEECH:
        need(c.data.name == "japanese_vowels", "data.name", "japanese_vowels for speech")
        need(c.speech.width % c.speech.heads == 0, "speech.heads",
             f"a divisor of speech.width {c.speech.width}")
    if c.rm.draw == "bernoulli":
        need(0 < c.rm.keep <= 1, "rm.keep", "a probability in (0, 1]")
    else:
        whole = c.rm.keep >= 1 and c.rm.keep == int(c.rm.keep)
        need(whole, "rm.keep", "a whole number with draw exact")
        need(c.rm.unit == "rank", "rm.unit", "rank with draw exact")
    if c.rm.also:
        need(c.method in ALSO, "rm.also", f"False for {c.method}; it is for {', '.join(ALSO)}")
        if c.method == "bitfit":
            need(c.rm.unit == "element", "rm.unit", "element to mask bitfit: a bias has no rank")
        if c.method == "prefix":
            need(c.rm.unit in ("element", "matrix"), "rm.unit",
                 "element or matrix to mask prefix: its vectors have no rank directions")
        if c.method == "bottleneck" and c.rm.draw == "exact":
            need(c.rm.keep <= c.bottleneck.width, "rm.keep",
                 f"at most bottleneck.width {c.bottleneck.width} with draw exact")
    for field in ("lora.target", "lora.train"):
        try:
            re.compile(vars(flat)[field])
        except re.error as e:
            wrong.append(f"config.{field}={vars(flat)[field]!r}: not a regular expression: {e}")
    if is_sweep(c):
        wrong += _mistakes_of_sweep(c, wrong)
    if wrong:
        raise UserError("\n".join(wrong))


def _mistakes_of_sweep(c: ml_collections.ConfigDict, known: list[str]) -> list[str]:
    """What is wrong with ``sweep.*``, and with single runs beyond the mistakes ``known``."""
    wrong = []
    where = f"config.sweep.grid={c.sweep.grid!r}"
    try:
        settings = grid.parse(c.sweep.grid)
    except ValueError as e:
        return [f"{where}: {e}"]
    for name in dict.fromkeys(name for setting in settings for name in setting):
        if name not in SWEEPABLE:
            hint = did_you_mean(name, SWEEPABLE)
            if name == "seed":
                hint = "; type --config.sweep.seeds=5 for five seeds"
            wrong.append(f"{where}: no {name!r}, there are {', '.join(SWEEPABLE)}{hint}")
        elif c.method not in SWEEPABLE[name][1]:
            readers = SWEEPABLE[name][1]
            wrong.append(f"{where}: {name!r} changes nothing with method {c.method}, only with "
                         f"{', '.join(readers)}; drop it, or type --config.method={readers[0]}")
        elif name == "keep" and c.rm.draw == "exact":
            wrong.append(f"{where}: 'keep' is swept as a probability; type "
                         "--config.rm.draw=bernoulli")
    if wrong:
        return wrong
    singles = runs(c)
    names = [run.name for run in singles]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        wrong.append(f"{where}: the same run more than once: {', '.join(twice)}")
    if c.seed + max(c.sweep.seeds, 1) > 2**31:
        wrong.append(f"config.sweep.seeds={c.sweep.seeds!r}: seeds from {c.seed} would pass "
                     "2147483647; lower --config.seed")
        return wrong
    for run in singles:
        try:
            check_config(run.config)
        except UserError as e:
            wrong += [f"{where}: {line}" for line in str(e).splitlines() if line not in known]
    return list(dict.fromkeys(wrong))
