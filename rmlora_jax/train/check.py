"""The checks of a config's fields, made before anything is loaded: all mistakes at once."""

import re
import types

import ml_collections

from rmlora_jax.adapt.lora import EXECUTIONS
from rmlora_jax.data.packaged import SPEAKERS
from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.sweep import grid
from rmlora_jax.tasks.scores import NAMES
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
    default_config,
    flatten,
    is_sweep,
    runs,
)
from rmlora_jax.train.kinds import mistakes_of_kind, with_defaults
from rmlora_jax.train.places import missing

MOST = 2**31 - 1  # steps, seeds
LARGEST_IMAGE = 2**14  # pixels of a side


def check_run(c: ml_collections.ConfigDict) -> None:
    """Raises one UserError that lists every mistake in the fields' values, and every file and
    folder they name that is not as it should be: what can be told before a run is loaded."""
    wrong, sound = _told(c)
    wrong += [line for line in missing(sound) if line.partition("=")[0] not in _fields(wrong)]
    if wrong:
        raise UserError("\n".join(wrong))


def check_config(c: ml_collections.ConfigDict) -> None:
    """Raises one UserError that lists every mistake in the fields' values."""
    wrong, _ = _told(c)
    if wrong:
        raise UserError("\n".join(wrong))


def _told(c: ml_collections.ConfigDict) -> tuple[list[str], ml_collections.ConfigDict]:
    """Every mistake, and the config with the fields that are of another kind, which cannot be
    compared with anything, at their defaults."""
    default = default_config()
    kinds = mistakes_of_kind(c, default)
    sound = with_defaults(c, kinds, default) if kinds else c
    return [*kinds.values(), *mistakes(sound)], sound


def _fields(wrong: list[str]) -> set[str]:
    return {line.partition("=")[0] for line in wrong}


def mistakes(c: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with the values of a config whose fields are of their kinds."""
    wrong = []

    def need(ok: bool, field: str, allowed: str):
        if not ok:
            wrong.append(f"config.{field}={repr(flatten(c)[field])[:200]}: must be {allowed}")

    def one_of(field: str, *allowed: str):
        value = flatten(c)[field]
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            shown = repr(value)[:200]
            wrong.append(f"config.{field}={shown}: must be one of {', '.join(allowed)}{hint}")

    flat = types.SimpleNamespace(**flatten(c))
    one_of("task", *KINDS)
    one_of("method", *METHODS)
    one_of("parallel", "mesh", "pmap")
    one_of("model.dtype", "bfloat16", "float16", "float32")
    one_of("model.base_dtype", "bfloat16", "float16", "float32")
    one_of("model.attention", "auto", "xla", "cudnn")
    one_of("model.remat", "none", "dots", "attention", "full")
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
    if c.parallel == "pmap":
        need(c.fsdp == 1, "fsdp", "1 where parallel is pmap; type --config.parallel=mesh")
    for field in ("fsdp", "batch_size", "accumulate", "eval_batch_size", "log_every", "lora.rank",
                  "model.unroll", "data.workers", "text.max_length", "rm.resample_every",
                  "adalora.initial_rank", "adalora.every", "sora.initial_rank",
                  "bottleneck.width", "prefix.length", "speech.width", "speech.layers",
                  "speech.heads"):
        need(vars(flat)[field] >= 1, field, "at least 1")
    for field in ("steps", "eval_every", "nonfinite_limit", "model.image_size", "data.limit",
                  "data.per_class", "data.processes", "data.bad_records", "sweep.seeds",
                  "sweep.at_once", "rm.penalty", "rm.start_step", "optimizer.weight_decay",
                  "optimizer.clip", "adalora.warmup", "adalora.orthogonal", "adalora.target",
                  "sora.sparsity", "sora.l1", "speech.clusters"):
        need(vars(flat)[field] >= 0, field, "0 or more")
    need(c.data.classes == 0 or c.data.classes >= 2, "data.classes", "0 for all, or at least 2")
    need(c.steps > 0 or c.epochs > 0, "epochs", "above 0 where steps is 0")
    need(c.steps > 0 or c.epochs <= MOST, "epochs", f"at most {MOST}")
    for field in ("steps", "eval_every", "log_every", "batch_size", "eval_batch_size",
                  "rm.start_step", "rm.resample_every", "sweep.at_once"):
        need(vars(flat)[field] <= MOST, field, f"at most {MOST}")
    for field in ("model.unroll", "data.workers", "data.processes", "text.max_length",
                  "bottleneck.width", "prefix.length", "lora.rank", "adalora.initial_rank",
                  "sora.initial_rank", "speech.width", "speech.layers", "speech.clusters"):
        need(vars(flat)[field] <= 2**20, field, f"at most {2**20}")
    need(c.model.image_size <= LARGEST_IMAGE, "model.image_size", f"at most {LARGEST_IMAGE}")
    need(c.model.source or c.task == SPEECH, "model.source", "a folder, or a model's name")
    for field in ("data.name", "data.image_key", "data.label_key"):
        need(bool(vars(flat)[field].strip()), field, "a name")
    need(bool(c.data.train_split.strip()), "data.train_split", "a split, such as train[:80%]")
    for field in ("b1", "b2"):
        need(0 <= c.optimizer[field] < 1, f"optimizer.{field}", "in [0, 1)")
    need(c.optimizer.eps > 0, "optimizer.eps", "above 0")
    need(c.lora.alpha > 0, "lora.alpha", "above 0")
    need(c.optimizer.learning_rate > 0, "optimizer.learning_rate", "above 0")
    need(c.optimizer.lora_plus > 0, "optimizer.lora_plus", "above 0")
    if c.method not in ADAPTED:
        need(c.optimizer.lora_plus == 1, "optimizer.lora_plus", f"1: {c.method} has no lora_b")
    need(0 < c.adalora.final < 1 - c.adalora.warmup, "adalora.final",
         "above 0 and, with adalora.warmup, below 1")
    need(c.sora.gate_rate > 0, "sora.gate_rate", "above 0")
    if c.sora.shrink is not None:
        need(c.sora.shrink >= 0, "sora.shrink", "0 or more, or None for sora.sparsity")
        need(c.sora.proximal == "paper", "sora.shrink", "None where sora.proximal is not paper")
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
    need(c.data.validation < 1 or c.data.validation == c.data.validation // 1, "data.validation",
         "a fraction below 1, or a whole number")
    need(c.accumulate < 1 or c.batch_size % c.accumulate == 0, "accumulate",
         f"a divisor of batch_size {c.batch_size}")
    need(0 <= c.seed < 2**31, "seed", "from 0 to 2147483647")
    need(0 <= data_seed(c) < 2**31, "data.seed", "from 0 to 2147483647")
    if c.task in TEXTS:
        for field, only in (("model.image_size", 0), ("model.attention", "auto")):
            need(vars(flat)[field] in (only, "xla"), field, f"{only!r} for text")
        for field in ("data.classes", "data.per_class"):
            need(vars(flat)[field] == 0, field, "0 for text")
        need(len(c.text.columns) <= 2, "text.columns", "at most two names")
        if c.text.train_file:
            need(len(c.text.columns) > 0, "text.columns",
                 "the columns of text.train_file with text: --config.text.columns=\"('text',)\"")
            for field in ("data.test_split", "data.unlabelled_split"):
                need(vars(flat)[field] is None, field, "None with text.train_file")
        for field in ("text.test_file", "text.predict_file"):
            need(c.text.train_file or not vars(flat)[field], field, "None without text.train_file")
        for name in c.text.metrics:
            need(name in NAMES, "text.metrics", f"names among {', '.join(NAMES)}")
    elif c.task in KINDS:
        for field in ("text.train_file", "text.test_file", "text.predict_file",
                      "data.unlabelled_split"):
            need(not vars(flat)[field], field, f"None for {c.task}")
    if c.task == SPEECH:
        chosen = c.speech.speakers
        need(not chosen or (len(set(chosen)) == len(chosen) > 1 and set(chosen) <= set(SPEAKERS)),
             "speech.speakers", "two or more different numbers from 1 to 9, or () for all")
        need(c.data.name == "japanese_vowels", "data.name", "japanese_vowels for speech")
        need(c.speech.heads < 1 or c.speech.width % c.speech.heads == 0, "speech.heads",
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
    patterns = [(field, vars(flat)[field]) for field in ("lora.target", "lora.train")]
    for field in ("lora.rank_pattern", "lora.alpha_pattern"):
        patterns += [(field, regex) for regex, _ in vars(flat)[field]]
    for field, regex in patterns:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as e:
            wrong.append(f"config.{field}={regex[:200]!r}: not a regular expression: {e}")
    return wrong + _mistakes_of_sweep(c, wrong) if is_sweep(c) else wrong


def _mistakes_of_sweep(c: ml_collections.ConfigDict, known: list[str]) -> list[str]:
    """What is wrong with ``sweep.*``, and with single runs beyond the mistakes ``known``."""
    wrong = []
    if c.sweep.seeds > grid.MOST_RUNS:
        return [f"config.sweep.seeds={c.sweep.seeds!r}: must be at most {grid.MOST_RUNS}"]
    where = f"config.sweep.grid={repr(c.sweep.grid)[:200]}"
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
