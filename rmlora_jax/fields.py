"""The fields that every run has. Tasks and methods add sections of their own (`train.config`)."""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from rmlora_jax.config import (
    ALPHAS,
    FREE,
    GROWS,
    LARGE,
    MOST,
    PLACE,
    RANKS,
    Mistake,
    blank_problem,
    field,
    regex_problem,
    section,
)

S = TypeVar("S")

DTYPES = ("bfloat16", "float16", "float32")
LARGEST_IMAGE = 2**14  # pixels of a side


def _validation_problem(value: float) -> str | None:
    if value <= 0:
        return "must be above 0: the best step is chosen on it"
    if value >= 1 and value != value // 1:
        return "must be a fraction below 1, or a whole number"
    return None


@section
class Model:
    """Which pretrained model, and how it is computed."""

    source: str = field(
        "google/vit-base-patch16-224-in21k", "folder, bundled name or hub name (NAME@REVISION)",
        resume=PLACE,
    )
    adapter: str = field(
        "",
        "folder of a PEFT adapter of that model to go on from: rank, alpha and targets are then "
        "the adapter's, and its head is taken where it has as many classes; '' for new factors",
        resume=PLACE,
    )
    image_size: int = field(
        0, "pixels of a side; 0: the checkpoint's own. Positions are interpolated",
        least=0, most=LARGEST_IMAGE,
    )
    dtype: str = field("bfloat16", "of the computation", choices=DTYPES)
    base_dtype: str = field("float32", "in which the frozen base is held", choices=DTYPES)
    attention: str = field(
        "auto", "which attention; auto: cudnn where it runs", choices=("auto", "xla", "cudnn")
    )
    unroll: int = field(
        1, "layers a turn of the scan: 1 compiles fastest, all layers run fastest",
        least=1, most=LARGE,
    )
    remat: str = field(
        "none",
        "what is computed again in the backward pass, to save memory. dots keeps what linear "
        "layers give, attention what those in attention and cuDNN's kernel give, full what each "
        "layer begins with, none everything",
        choices=("none", "dots", "attention", "full"),
    )


@section
class Data:
    """Which data, which part of them, and how they are read."""

    name: str = field(
        "cifar100",
        "digits, folder (images in class folders in data_dir), datasets (parquet or save_to_disk "
        "in data_dir), glue/cola ..., or a name of TFDS; with text.train_file any",
        problem=blank_problem("a name"),
    )
    data_dir: str | None = field(None, "folder of the data; None: TFDS's own default", resume=FREE)
    train_split: str = field(
        "train", "a split or a slice, such as train[:80%]",
        problem=blank_problem("a split, such as train[:80%]"),
    )
    test_split: str | None = field(None, "None: test if it has labels, or validation")
    unlabelled_split: str | None = field(None, "predicted at the end; texts only")
    image_key: str = field("image", "name of the feature", problem=blank_problem("a name"))
    label_key: str = field("label", "name of the feature", problem=blank_problem("a name"))
    validation: float = field(
        0.1, "fraction (below 1) or number of training examples held out",
        problem=_validation_problem,
    )
    limit: int = field(0, "use this many training examples; 0: all", least=0)
    classes: int = field(
        0, "use the first classes of a fixed random order; 0: all; images only",
        problem=lambda v: None if v == 0 or v >= 2 else "must be 0 for all, or at least 2",
    )
    per_class: int = field(
        0, "use at most this many training images of each class; 0: all; images only", least=0
    )
    bad_records: int = field(
        0,
        "how many damaged, empty or wrongly labelled records, of all splits together, may be left "
        "out; images are then all checked before the run. 0: the first bad record ends the run",
        least=0, resume=FREE,
    )
    mode: str = field(
        "auto",
        "resident: all images on the device; auto: resident if they fit; stream, also for sft: "
        "read while the run trains",
        choices=("auto", "resident", "stream"),
    )
    cache: str = field(
        "~/.cache/rmlora_jax/images", "folder of decoded splits; '' for none",
        resume=FREE, cache=True,
    )
    workers: int = field(8, "threads that decode", least=1, most=LARGE, resume=FREE)
    processes: int = field(
        0, "processes that decode streamed training images; 0: threads of this one",
        least=0, most=LARGE, resume=FREE,
    )
    resize: str = field(
        "processor",
        "processor: images are resized and cropped as the model's preprocessor_config.json says; "
        "square, and without that file: the middle square, bilinear, with a margin for crops",
        choices=("processor", "square"), before="square",
    )
    flip: bool = field(True, "mirror training images at random")
    crop: str = field(
        "pad", "pad: shift by up to an eighth; resized: a random part, always bilinear",
        choices=("pad", "resized", "none"),
    )
    seed: int | None = field(
        None, "of order and augmentation; None: the run's seed", least=0, most=MOST
    )


@section
class Lora:
    """The factors beside the weights."""

    rank: int = field(4, "rank directions of a layer", least=1, most=LARGE)
    alpha: float = field(16.0, "the product A B is scaled by alpha / rank", above=0, sweep="alpha")
    target: str = field(
        r"encoder/layers/.*",
        "regex on module paths: every linear layer inside. The word all-linear in it stands for "
        "all those in the model's layers, as in 'all-linear|embed|head'",
        problem=regex_problem,
    )
    train: str = field(
        r"head", "regex on paths that are trained in full beside the factors; '': nothing else",
        problem=regex_problem,
    )
    dropout: float = field(0.0, "on the adapters' input, in training", least=0, below=1)
    init: str = field(
        "kaiming", "of A", choices=("kaiming", "normal", "gaussian", "orthogonal", "pissa")
    )
    rs: bool = field(False, "scale by alpha / sqrt(rank)")
    rank_pattern: tuple = field(
        (), "((regex, rank), ...): the first match wins", elements=RANKS, problem=regex_problem
    )
    alpha_pattern: tuple = field(
        (), "((regex, alpha), ...)", elements=ALPHAS, problem=regex_problem
    )
    execution: str = field(
        "auto",
        "how the layers compute: factored, (x A) B beside x W; merged, x (W + s A B); auto: "
        "factored. merged saves products where tokens are many times the width; use it with "
        "base_dtype float32",
        choices=("auto", "factored", "merged"),
    )


@section
class Optimizer:
    """AdamW."""

    learning_rate: float = field(1e-3, "at its highest", above=0, sweep="learning_rate")
    schedule: str = field(
        "linear", "linear or cosine to 0, or constant", choices=("linear", "cosine", "constant")
    )
    warmup: float = field(
        0.0, "fraction of the steps in which the rate rises from 0", least=0, below=1
    )
    weight_decay: float = field(0.0, "decoupled", least=0, sweep="weight_decay")
    decay_all: bool = field(
        False, "weight_decay moves biases and norms, too. False: neither, as transformers' Trainer",
        before=True,
    )
    b1: float = field(0.9, "decay of the first moment", least=0, below=1)
    b2: float = field(0.999, "decay of the second moment", least=0, below=1)
    eps: float = field(1e-8, "added to the root of the second moment", above=0)
    clip: float = field(1.0, "global norm of the gradient; 0: no clipping", least=0)
    label_smoothing: float = field(
        0.0, "weight of the uniform distribution in the targets", least=0, below=1
    )
    lora_plus: float = field(
        1.0, "LoRA+: learning rate of lora_b over that of all else, such as 16", above=0
    )


@section
class Sweep:
    """Many runs in one program, on the same batches."""

    seeds: int = field(0, "this many seeds: seed, seed + 1, ...; 0: seed alone", least=0)
    grid: str = field(
        "",
        "\"{'penalty': (0, .1), 'keep': (.5, 1)}\": every combination; "
        "\"[{'penalty': .1}, ...]\": these",
    )
    at_once: int = field(
        0, "runs in a program; 0: as many as fit in memory", least=0, most=MOST, resume=FREE
    )


@section
class Run:
    """The config of a run without the sections that tasks and methods add."""

    task: str = field("image_classification", "what is learnt")
    method: str = field("rm_lora", "how it is learnt")
    seed: int = field(
        0, "of factors, head, masks and dropout; where data.seed is None, of the data too",
        least=0, most=MOST,
    )
    epochs: float = field(8.0, "passes over the training split, if steps is 0", resume=GROWS)
    steps: int = field(0, "optimizer steps; 0: from epochs", least=0, most=MOST, resume=GROWS)
    batch_size: int = field(
        64, "examples an optimizer step, over all devices of all processes", least=1, most=MOST
    )
    accumulate: int = field(1, "micro-batches a step: memory of batch_size / accumulate", least=1)
    eval_batch_size: int = field(256, "examples an evaluation step", least=1, most=MOST)
    eval_every: int = field(
        0, "steps between evaluations (each is a checkpoint); 0: once an epoch", least=0, most=MOST
    )
    patience: int = field(
        0,
        "evaluations in a row without a better validation metric after which the run ends; it "
        "keeps its best step. 0: never",
        least=0, most=MOST, resume=FREE,
    )
    snapshots: bool = field(False, "keep the factors of each evaluation, to measure them later")
    log_every: int = field(20, "steps per line of metrics.jsonl", least=1, most=MOST, resume=FREE)
    logger: str = field("tensorboard", "where curves are shown, beside metrics.jsonl", resume=FREE)
    nonfinite_limit: int = field(
        10,
        "a step whose loss or gradient is not finite changes nothing; after this many in a row "
        "the run ends and names the first layer with such a value. 0: it goes on",
        least=0, resume=FREE,
    )
    parallel: str = field("mesh", "mesh: jit(shard_map); pmap: jax.pmap", choices=("mesh", "pmap"))
    fsdp: int = field(
        1, "devices that share one copy of the base, with parallel=mesh; 1: a copy on each", least=1
    )
    compilation_cache: str = field(
        "~/.cache/rmlora_jax/xla", "folder of compiled programs; '' for none",
        resume=FREE, cache=True,
    )
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    lora: Lora = dataclasses.field(default_factory=Lora)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    def own(self, kind: type[S]) -> S:
        """The section of this kind, which a task or a method has added."""
        return next(value for value in vars(self).values() if isinstance(value, kind))

    @property
    def data_seed(self) -> int:
        """What the order of the examples and their augmentation are drawn from."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def is_sweep(self) -> bool:
        return bool(self.sweep.seeds or self.sweep.grid)

    def check(self) -> Iterator[Mistake]:
        """What is wrong between the fields of every run, as (field, what it must be)."""
        if self.parallel == "pmap" and self.fsdp != 1:
            yield "fsdp", "1 where parallel is pmap; type --config.parallel=mesh"
        if self.steps <= 0 and not 0 < self.epochs <= MOST:
            yield "epochs", f"above 0 and at most {MOST} where steps is 0"
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            yield "accumulate", f"a divisor of batch_size {self.batch_size}"
        if self.patience and self.is_sweep:
            yield "patience", "0 for sweep.*, whose runs share one program to the last step"
        if self.model.adapter and self.is_sweep:
            yield "model.adapter", "empty for sweep.*, whose runs begin with factors of their own"


def under(regex: str, own: str) -> str:
    """A regex of parameters: ``own``, but not below what ``regex`` matches.

    >>> import re
    >>> bool(re.fullmatch(under("head", "(?:.*/)?bias"), "head/bias"))
    False
    """
    return rf"(?!(?:{regex})(?:/|$)){own}"
