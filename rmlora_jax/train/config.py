"""Every field of a run, with its meaning; check.py says what values they may have."""

from typing import NamedTuple

import ml_collections
from ml_collections import config_dict

from rmlora_jax.errors import UserError, did_you_mean
from rmlora_jax.sweep import grid

REGRESSION = "text_regression"
SPEECH = "speech_classification"
TEXTS = ("text_classification", REGRESSION)
KINDS = ("image_classification", *TEXTS, SPEECH)
GATED = ("adalora", "sora")  # methods with a diagonal between their factors
ADAPTED = ("rm_lora", "lora", "reg_only", "mask_only", *GATED)  # methods with factors
PENALISED = ("rm_lora", "reg_only")  # of these, those with the penalty
MASKED = ("rm_lora", "mask_only")  # and those with the mask
INSERTED = ("bottleneck", "prefix")  # methods with modules of their own in the layers
ALSO = ("bitfit", *INSERTED)  # methods that rm.also masks
METHODS = (*ADAPTED, *ALSO, "head", "full")

# What a sweep can vary: its name in sweep.grid -> the field, and the methods that read the field.
SWEEPABLE = {
    "learning_rate": ("optimizer.learning_rate", METHODS),
    "weight_decay": ("optimizer.weight_decay", METHODS),
    "penalty": ("rm.penalty", PENALISED),
    "keep": ("rm.keep", MASKED),
    "alpha": ("lora.alpha", ADAPTED),
    "orthogonal": ("adalora.orthogonal", ("adalora",)),
    "sparsity": ("sora.sparsity", ("sora",)),
    "shrink": ("sora.shrink", ("sora",)),
    "l1": ("sora.l1", ("sora",)),
}

# Fields that may differ between a run and its continuation: they change where things are, or
# what is written, and no number; and the one that lets a run go on that met a damaged record.
FREE_ON_RESUME = frozenset(
    {"data.data_dir", "data.cache", "data.workers", "data.processes", "text.cache"}
    | {"log_every", "nonfinite_limit", "data.bad_records", "compilation_cache", "sweep.at_once"}
)
# Of these a run can have more where no step depends on how many there are.
LENGTH = ("steps", "epochs")


def default_config() -> ml_collections.ConfigDict:
    """The fields of a run. A file in ``configs/`` starts from these and changes what it needs."""
    c = ml_collections.ConfigDict()
    c.task = "image_classification"  # text_classification, text_regression, speech_classification
    # rm_lora; its halves reg_only (penalty, no mask) and mask_only (mask, no penalty); lora;
    # adalora and sora, which share out or close rank directions while they train;
    # bottleneck (adapters behind attention and MLP) and prefix (trained keys and values), both
    # with what lora.train matches;
    # bitfit (every bias, and what lora.train matches); head (what lora.train matches); full
    c.method = "rm_lora"
    c.seed = 0  # of factors, head, masks and dropout; where data.seed is None, of the data too
    c.epochs = 8.0  # passes over the training split; ignored where steps is set
    c.steps = 0  # optimizer steps; 0: from epochs
    c.batch_size = 64  # examples an optimizer step, over all devices of all processes
    c.accumulate = 1  # micro-batches a step: memory of batch_size / accumulate
    c.eval_batch_size = 256  # examples an evaluation step, over all devices
    c.eval_every = 0  # steps between evaluations (each is a checkpoint); 0: once an epoch
    c.snapshots = False  # keep the factors of each evaluation, for what training explored
    c.log_every = 20  # steps between lines of metrics.jsonl
    # A step whose loss or gradient is not finite changes nothing; after so many in a row a run
    # ends, and says where the first number came from that is none. 0: it goes on
    c.nonfinite_limit = 10
    c.parallel = "mesh"  # mesh: jit(shard_map); pmap: jax.pmap
    # Devices that share one copy of the base (FSDP, with parallel=mesh); 1: a copy on each
    c.fsdp = 1
    c.compilation_cache = "~/.cache/rmlora_jax/xla"  # folder of compiled programs; "": none

    c.model = ml_collections.ConfigDict()
    c.model.source = "google/vit-base-patch16-224-in21k"  # folder, bundled name, or hub name
    # A PEFT adapter of that model to go on from; its rank, alpha and targets are then lora.*'s, and
    # its head is taken where it has as many classes. "": new factors
    c.model.adapter = ""
    c.model.image_size = 0  # pixels; 0: the checkpoint's own. Positions are interpolated
    c.model.dtype = "bfloat16"  # of the computation: bfloat16, float16, float32
    c.model.base_dtype = "float32"  # in which the frozen base is held; as dtype
    c.model.attention = "auto"  # xla, cudnn, or auto: cudnn where it runs
    c.model.unroll = 1  # layers a turn of the scan: 1 compiles fastest, all layers run fastest
    # Less memory, more time: dots keeps for the backward pass what linear layers give; attention
    # what those in attention and cuDNN's kernel give; full what each layer begins with; none all
    c.model.remat = "none"

    c.data = ml_collections.ConfigDict()
    c.data.name = "cifar100"  # digits, glue/cola ..., or a name of TFDS; for text.train_file any
    c.data.data_dir = config_dict.placeholder(str)  # of TFDS; None: its own default
    c.data.train_split = "train"  # a split or a slice, such as train[:80%]
    c.data.test_split = config_dict.placeholder(str)  # None: test if labelled, or validation
    c.data.unlabelled_split = config_dict.placeholder(str)  # predicted at the end; text only
    c.data.image_key = "image"  # names of the features
    c.data.label_key = "label"
    c.data.validation = 0.1  # fraction (below 1) or number of training examples held out
    c.data.limit = 0  # use this many training examples only; 0: all
    c.data.classes = 0  # use the first so many classes of a fixed random order; 0: all; images only
    c.data.per_class = 0  # use at most so many training images of each class; 0: all; images only
    # How many damaged, empty or wrongly labelled records, of all splits together, may be left out;
    # images are then all looked at before the run. 0: none, the first that is met ends the run
    c.data.bad_records = 0
    c.data.mode = "auto"  # resident: all on the device; stream; auto: resident if it fits
    c.data.cache = "~/.cache/rmlora_jax/images"  # folder of decoded splits; "": none
    c.data.workers = 8  # threads that decode
    c.data.processes = 0  # processes that decode streamed training images; 0: threads of this one
    c.data.flip = True  # mirror training images at random
    c.data.crop = "pad"  # pad: shift by up to an eighth; resized: random part; none
    c.data.seed = config_dict.placeholder(int)  # of order and augmentation; None: seed

    c.text = ml_collections.ConfigDict()  # read by the tasks of text alone
    c.text.columns = ()  # one or two names of features with text; (): those of the GLUE task
    c.text.max_length = 128  # tokens of an example; what is longer is cut
    c.text.metrics = ()  # the first picks the best step; (): GLUE's, else accuracy, or pearson
    c.text.train_file = config_dict.placeholder(str)  # CSV, TSV or JSON lines, in place of TFDS
    c.text.test_file = config_dict.placeholder(str)  # None: a part of train_file is held out
    c.text.predict_file = config_dict.placeholder(str)  # without labels; predicted at the end
    c.text.group_by_length = False  # batches of similar lengths: less padding, another order
    c.text.one_length = False  # pad all to max_length: more padding, but one program to compile
    c.text.cache = "~/.cache/rmlora_jax/tokens"  # folder of tokenised splits; "": none

    c.speech = ml_collections.ConfigDict()  # read by the task of speech alone
    c.speech.speakers = ()  # numbers from 1 to 9 of those who are told apart; (): all
    c.speech.clusters = 0  # above 0: no speakers; tell the cluster, of so many, of a hidden frame
    c.speech.width = 64  # of a new model (model.source="", not a run's folder)
    c.speech.layers = 4
    c.speech.heads = 4

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 4
    c.lora.alpha = 16.0  # the low-rank product is scaled by alpha / rank
    c.lora.target = r"encoder/layers/.*"  # regex on module paths: every linear layer inside
    c.lora.train = r"head"  # regex on paths trained in full beside the factors
    c.lora.dropout = 0.0  # on the adapters' input, in training
    c.lora.init = "kaiming"  # kaiming, normal, gaussian, orthogonal, pissa
    c.lora.rs = False  # scale by alpha / sqrt(rank)
    c.lora.rank_pattern = ()  # ((regex, rank), ...): first match wins
    c.lora.alpha_pattern = ()  # ((regex, alpha), ...)
    # How the layers compute: factored, (x A) B beside x W; merged, x (W + s A B); auto: factored.
    # merged saves products where tokens are many times the width; base_dtype float32 goes with it
    c.lora.execution = "auto"

    c.adalora = ml_collections.ConfigDict()  # read by method adalora alone; its init is N(0, .02^2)
    c.adalora.initial_rank = 6  # that a layer begins with
    c.adalora.target = 0.0  # directions that a layer has left on average; 0: lora.rank
    c.adalora.warmup = 0.15  # fraction of the steps before the budget falls
    c.adalora.final = 0.5  # fraction of the steps, at the end, with what is left
    c.adalora.every = 10  # steps between two allocations
    c.adalora.orthogonal = 0.1  # weight of its penalty on P and Q

    c.sora = ml_collections.ConfigDict()  # read by method sora alone
    c.sora.initial_rank = 8  # that a layer begins with
    c.sora.sparsity = 0.5  # lambda_2: each step moves a gate towards 0 by this times the rate
    # In place of sparsity: what a gate loses over the whole run, so that a value fits any rate and
    # length; gates begin as N(0, 1). None: sparsity
    c.sora.shrink = config_dict.placeholder(float)
    c.sora.l1 = 0.0  # lambda_1: weight of the mean |gate| in the loss
    c.sora.gate_rate = 1.0  # learning rate of the gates over that of all else
    c.sora.proximal = "paper"  # paper, authors_exact

    c.bottleneck = ml_collections.ConfigDict()  # read by method bottleneck alone
    c.bottleneck.width = 8  # of the adapters: y + up(gelu(down(y))), up begins at 0

    c.prefix = ml_collections.ConfigDict()  # read by method prefix alone; not for DeBERTa
    c.prefix.length = 8  # trained keys and values in front of every layer's own

    c.rm = ml_collections.ConfigDict()  # the two parts of RM-LoRA; only method rm_lora reads them
    c.rm.penalty = 0.1  # weight of the orthogonality penalty
    c.rm.kind = "norm"  # norm, squared, cosine
    c.rm.keep = 0.5  # probability that a rank direction moves (draw exact: how many)
    c.rm.draw = "bernoulli"  # bernoulli, exact
    c.rm.unit = "rank"  # rank, element, matrix
    c.rm.coupling = "paired"  # paired: A and B share a draw; independent
    c.rm.start_step = 1  # first step that is masked
    c.rm.resample_every = 1  # steps between draws
    c.rm.rescale = False  # divide what is kept by keep
    c.rm.placement = "before"  # mask before the optimizer, after it, or lazy
    # Mask bitfit, bottleneck or prefix too, but never what lora.train matches. rm.unit says what
    # is drawn. bitfit: element (an entry of a bias); prefix: element, or matrix (all keys of a
    # layer, all its values); bottleneck: rank (a column of down and its row of up), element, matrix
    c.rm.also = False

    c.optimizer = ml_collections.ConfigDict()  # AdamW
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "linear"  # linear or cosine to 0, constant
    c.optimizer.warmup = 0.0  # fraction of the steps in which the rate rises from 0
    c.optimizer.weight_decay = 0.0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.clip = 1.0  # global norm of the gradient; 0: no clipping
    c.optimizer.label_smoothing = 0.0
    c.optimizer.lora_plus = 1.0  # LoRA+: learning rate of lora_b over that of all else, such as 16

    c.sweep = ml_collections.ConfigDict()  # many runs in one program, on the same batches
    c.sweep.seeds = 0  # this many seeds: seed, seed + 1, ...; 0: seed alone
    # "{'penalty': (0, .1), 'keep': (.5, 1)}": every combination; "[{'penalty': .1}, ...]": these
    c.sweep.grid = ""
    c.sweep.at_once = 0  # runs in a program; 0: as many as fit in memory
    return c


def use_glue(c: ml_collections.ConfigDict, task: str) -> None:
    """Sets the fields that make a run one of the nine GLUE tasks, such as ``"cola"``.

    Raises:
      UserError: no such task.
    """
    from rmlora_jax.data.glue import TASKS

    if task not in TASKS:
        hint = did_you_mean(task, TASKS)
        raise UserError(f"no GLUE task {task!r}: there are {', '.join(TASKS)}{hint}")
    c.task = REGRESSION if TASKS[task].regression else "text_classification"
    c.data.name = f"glue/{task}"
    c.lora.train = r"head|pooler"


def flatten(config) -> dict:
    """``{"optimizer.learning_rate": 0.001, ...}``."""
    flat = {}
    for name, value in dict(config).items():
        if hasattr(value, "items"):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def data_seed(c: ml_collections.ConfigDict) -> int:
    """What the order of the examples and their augmentation are drawn from."""
    return c.seed if c.data.seed is None else c.data.seed


def is_sweep(c: ml_collections.ConfigDict) -> bool:
    return bool(c.sweep.seeds or c.sweep.grid)


class Run(NamedTuple):
    """One of the runs of a sweep."""

    name: str  # of its folder: seed=3,penalty=0.1
    setting: dict[str, float]  # its values of what is swept, by the names of SWEEPABLE
    config: ml_collections.ConfigDict  # of the single run that it equals


def runs(c: ml_collections.ConfigDict) -> list[Run]:
    """The runs of a sweep: every setting of ``sweep.grid``, each with every seed.

    Raises:
      ValueError: ``sweep.grid`` is not as it should be; `check_config` says all that is wrong.
    """
    settings = grid.parse(c.sweep.grid)
    swept = dict.fromkeys(name for setting in settings for name in setting)
    off = default_config().sweep
    found = []
    for setting in settings:
        values = {name: SWEEPABLE[name][0] for name in swept}
        values = {name: setting.get(name, flatten(c)[path]) for name, path in values.items()}
        for seed in range(c.seed, c.seed + max(c.sweep.seeds, 1)):
            own = with_values(c, values)
            own.seed, own.data.seed, own.sweep = seed, data_seed(c), off
            found.append(Run(grid.name({"seed": seed} | values), values, own))
    return found


def with_values(c: ml_collections.ConfigDict, values: dict) -> ml_collections.ConfigDict:
    """A copy with the fields of ``SWEEPABLE`` at these values, which may be traced."""
    own = c.copy_and_resolve_references()
    with own.ignore_type():
        for name, value in values.items():
            section, _, field = SWEEPABLE[name][0].partition(".")
            own[section][field] = value
    return own


def changes(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """The fields that a continuation must share and does not, as ``field: old -> new``, and those
    that differ and may.

    A field that is younger than the run has its default there.
    """
    old, new = flatten(default_config()) | flatten(old), flatten(new)
    refused, free = [], []
    for k in sorted(old.keys() | new.keys()):
        if _plain(old.get(k)) == _plain(new.get(k)):
            continue
        words = f"{k}: {old.get(k)!r} -> {new.get(k)!r}"
        why = needs_length(new) if k in LENGTH else None
        if k in FREE_ON_RESUME or (k in LENGTH and why is None):
            free.append(words)
        else:
            refused.append(words + (f" ({why})" if why else ""))
    return refused, free


def needs_length(flat: dict) -> str | None:
    """Why a run of this flat config with more steps is another from its first step on, if it is."""
    if flat["optimizer.schedule"] != "constant":
        return f"the rates of optimizer.schedule={flat['optimizer.schedule']} depend on it"
    if flat["optimizer.warmup"]:
        return "optimizer.warmup is a fraction of it"
    if flat["method"] == "adalora":
        return "the budget of adalora depends on it"
    if flat["sweep.seeds"] or flat["sweep.grid"]:
        return "a sweep is of one length"
    return None


def _plain(value):
    """JSON has no tuples."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
