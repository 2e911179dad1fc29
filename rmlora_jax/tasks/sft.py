"""Fine-tuning of a language model on conversations, prompts with completions, or texts."""

import dataclasses
import functools
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax import data, hub, methods
from rmlora_jax.config import (
    FREE,
    LARGE,
    PLACE,
    Elements,
    Mistake,
    field,
    is_name,
    is_number,
    regex_problem,
)
from rmlora_jax.data.chat_tokens import TOO_LONG
from rmlora_jax.data.dataset import BadRecord
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import chat_template
from rmlora_jax.models.family import TOKENS
from rmlora_jax.tasks import places, targets, task

NAME = "sft"


def _is_named_file(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_name, value))


NAMED_FILES = Elements("pairs (name, path)", _is_named_file)
WEIGHTS = Elements("numbers above 0", lambda value: is_number(value) and value > 0)


@dataclasses.dataclass(frozen=True)
class Sft:
    """The fields of the task sft."""

    files: tuple = field(
        (), "for training, .jsonl, .json or .parquet, in place of data.name", resume=FREE
    )
    weights: tuple = field(
        (), "how often a pass has the rows of each file, such as (1, 0.5); (): once",
        elements=WEIGHTS,
    )
    validation_file: str | None = field(
        None, "None: a part of the training files is held out", resume=PLACE
    )
    test_file: str | None = field(
        None, "None: a part of the training files is held out", resume=PLACE
    )
    evaluate: tuple = field(
        (), "((name, path), ...): measured with each validation and reported as loss_NAME, so that "
        "forgetting can be watched", elements=NAMED_FILES, resume=FREE,
    )
    messages: str = field("", "column with conversations; '': the usual names of columns")
    prompt: str = field("", "column, or several joined by commas, with what is asked")
    completion: str = field("", "column with what is answered")
    text: str = field("", "column with texts that are learnt whole")
    template: str = field(
        "",
        f"chat template: {', '.join(chat_template.KNOWN)}, {chat_template.NONE}, or a file with "
        "Jinja; '': the tokenizer's own",
    )
    system: str = field("", "first message of conversations that have no system message")
    loss: str = field(
        "assistant", "over the tokens of all answers with their ends, of the last one, or over all",
        choices=chat_template.LOSSES,
    )
    length: int = field(1024, "tokens of a row", least=2, most=LARGE)
    pack: bool = field(True, "examples share a row and do not see each other; False: one a row")
    too_long: str = field(
        "cut", "an example of more than length tokens is cut from the left, left out, or an error",
        choices=TOO_LONG,
    )
    samples: int = field(
        3, "test questions answered before and after training, in samples.md", least=0, most=LARGE,
        resume=FREE,
    )
    answer: str = field(
        "",
        "regular expression with one group, such as '#### (.*)': the best model answers test "
        "questions, and is right where the last match is that of the right answer. '': it is not "
        "asked",
        problem=regex_problem, resume=FREE,
    )
    asked: int = field(
        256, "how many test questions sft.answer is measured on; 0: all", least=0, resume=FREE
    )
    longest_answer: int = field(256, "tokens of an answer", least=1, most=LARGE, resume=FREE)
    cache: str = field(
        "~/.cache/rmlora_jax/tokens", "folder for tokenised splits; '': no cache",
        resume=FREE, cache=True,
    )


def use_sft(c: Any) -> None:
    """Sets the fields that make a run of a config one of this task, with factors on every linear
    layer of the model's layers."""
    c.task, c.method = NAME, "lora"
    c.data.name = "chats"  # a word for the run's files
    c.lora.target, c.lora.train = methods.ALL_LINEAR, ""
    c.batch_size = c.eval_batch_size = 16


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for this task."""
    t = config.own(Sft)
    if not config.model.source:
        yield "model.source", "a folder, or a model's name"
    yield from places.unused(
        config, (*places.OF_TEXTS, "model.image_size", "data.classes", "data.per_class"), "for sft"
    )
    if config.optimizer.label_smoothing:
        yield "optimizer.label_smoothing", "0 for sft"
    if config.lora.train == "head":
        yield "lora.train", "'' for sft, or 'head/.*' to train the whole head beside the factors"
    if methods.of(config).adapts and config.lora.target.startswith("encoder/"):
        yield "lora.target", "all-linear for sft, or another regex on the model's paths"
    if methods.of(config).insert is not None:
        yield "method", f"another than {config.method} for sft, such as lora"
    named = [pair[0] for pair in t.evaluate if _is_named_file(pair)]
    if len(set(named)) < len(named) or not all(name.isidentifier() for name in named):
        yield "sft.evaluate", "pairs whose names differ and have letters, digits and _ alone"
    if t.answer and not regex_problem(t.answer) and re.compile(t.answer).groups != 1:
        yield "sft.answer", "a regular expression with one group, such as '#### (.*)'"
    if t.files:
        yield from places.unused(
            config, ("data.test_split", "data.unlabelled_split"), "with sft.files"
        )
    else:
        files = ("sft.validation_file", "sft.test_file", "sft.evaluate", "sft.weights")
        yield from places.unused(config, files, "without sft.files")


def request(config: Run, **options: Any) -> data.Request:
    """The chats that the config names."""
    t = config.own(Sft)
    files = {"test": t.test_file} if t.test_file else {}
    files |= {f"test_{name}": file for name, file in t.evaluate}
    prompt = tuple(name.strip() for name in t.prompt.split(","))
    return task.request(
        config,
        files=t.files,
        weights=t.weights,
        validation_file=t.validation_file,
        test_files=files,
        names={
            "messages": t.messages,
            "prompt": prompt if prompt[1:] else t.prompt,
            "completion": t.completion,
            "text": t.text,
        },
        **options,
    )


def open_problem(config: Run, opening: task.Opening) -> task.Problem:
    """The chats and the language model that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    t = config.own(Sft)
    folder = hub.find_folder(config.model.source)  # a mistyped name fails before data is fetched
    tokenizer = hub.load_tokenizer(folder, padding=False)
    template = chat_template.find_template(tokenizer, t.template)
    chats = data.open_chats(request(config))
    pretrained = hub.load_pretrained(config.model.source, inputs=TOKENS)
    check_model(config, tokenizer, pretrained.config)
    return task.of_pretrained(
        pretrained,
        chats.notes,
        model=build(config, pretrained.family, pretrained.config),
        example=example_of(config),
        open_feed=lambda: open_feed(config, chats, tokenizer, template),
        metrics=targets.METRICS,
        info=hub.Info(
            task=NAME,
            dtype=config.model.dtype,
            template=(template.text or "") if t.template else None,
            system=t.system,
        ),
        questions=questions_of(config, chats.tests),
        skipped=chats.skipped.records,  # tokenising adds to them
    )


def build(config: Run, family: Any, architecture: Any) -> Any:
    """The model of a run."""
    attention = config.model.attention
    outputs = architecture.vocab_size
    return task.build_model(config, family.model, architecture, outputs, attention=attention)


def check_model(config: Run, tokenizer: Any, architecture: Any) -> None:
    """Raises a UserError for rows that are longer than the model's positions, or a tokenizer of
    another model."""
    length, longest = config.own(Sft).length, architecture.max_position_embeddings
    if length > longest:
        raise UserError(
            f"config.sft.length={length}: {config.model.source} was trained on {longest:,} tokens "
            f"at most; type --config.sft.length={longest} or less"
        )
    rows, largest = architecture.vocab_size, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{config.model.source}: its tokenizer has the token "
            f"{tokenizer.convert_ids_to_tokens(largest)!r} of number {largest}, but the model's "
            f"vocab_size is {rows}; use the tokenizer that was trained with this model"
        )


def example_of(config: Run) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The model's argument for one row."""
    return (jax.ShapeDtypeStruct((1, config.own(Sft).length), jnp.int32),)


def shapes(config: Run) -> task.Shapes:
    """A run as shapes, for rows of ``sft.length`` tokens.

    Raises:
      UserError: the model's config is not known on this machine.
    """
    t, b = config.own(Sft), config.batch_size
    family, architecture = places.architecture(config, TOKENS)
    row = functools.partial(jax.ShapeDtypeStruct, (b, t.length))
    kinds = {"tokens": jnp.int32, "wanted": jnp.bool_, "segments": jnp.int32,
             "positions": jnp.int32}  # fmt: skip
    return task.Shapes(
        model=build(config, family, architecture),
        example=example_of(config),
        outputs=architecture.vocab_size,
        prepare_train=lambda key, positions, resident, batch: targets.shifted(batch, t.pack),
        resident={},
        batch={"id": jax.ShapeDtypeStruct((b,), jnp.int32)}
        | {name: row(dtype) for name, dtype in kinds.items()},
        words=f", rows of {t.length:,} tokens",
    )


class Split(NamedTuple):
    """A split in tokens.

    Attributes:
      tokens: of each example, once; ``types`` is 1 for a token that the loss is over.
      order: int64 (n,), the examples of a pass.
      rows: which of them share a row; None where each has one of its own.
    """

    tokens: data.Tokens
    order: np.ndarray
    rows: data.Rows | None


def open_feed(
    config: Run, chats: data.ChatDataset, tokenizer: Any, template: hub.Template
) -> task.Feed:
    """Tokenises each split, or reads its tokens from the cache, and packs them into rows."""
    t = config.own(Sft)
    notes: list[str] = []
    splits = {
        name: open_split(config, name, split, chats.skipped, tokenizer, template, notes)
        for name, split in {
            "train": chats.train, "validation": chats.validation, **chats.tests
        }.items()
    }
    notes.append(first_example(tokenizer, splits["train"]))
    train, watched = splits["train"], {f"test_{name}" for name, _ in t.evaluate}

    def prepare(resident, batch):
        return targets.shifted(batch, t.pack)

    return task.Feed(
        sizes={name: len(split.order) for name, split in splits.items()},
        train=lambda step: batches(config, train, tokenizer, step),
        evaluate=lambda name: eval_batches(config, splits[name], tokenizer),
        resident={},
        prepare_train=lambda key, positions, *given: prepare(*given),
        prepare_eval=prepare,
        tests=tuple(chats.tests),
        watched=tuple(name for name in chats.tests if name in watched),
        varies=not t.pack,
        epoch=len(train.order) if train.rows is None else len(train.rows),
        examples=lambda name, ids: examples_in(splits[name], ids),
        content={name: data.hash_of(*split.tokens, split.order) for name, split in splits.items()},
        notes=tuple(notes),
    )


def open_split(
    config: Run,
    name: str,
    chats: data.Chats,
    skipped: Any,
    tokenizer: Any,
    template: hub.Template,
    notes: list[str],
) -> Split:
    """A split in tokens; what a person should know is added to ``notes``."""
    t = config.own(Sft)
    how = {"loss": t.loss, "system": t.system or None}
    fitting = {"length": t.length, "too_long": t.too_long, "bos": tokenizer.bos_token_id}

    def encode(example):
        return hub.encode(tokenizer, example, template, **how)

    cache = None
    if t.cache:
        key = chat_template.fingerprint(tokenizer, template, **how)
        cache = data.cache_file(Path(t.cache).expanduser(), chats, key, **fitting)
    read = data.chat_reader(chats, encode, **fitting)
    encoded = data.encode_chats(chats, read, skipped, cache=cache, desc=f"tokenising {name}")
    tokens, order, counts = encoded
    notes += counted(name, counts)
    if not t.pack:
        return Split(tokens, order, None)
    lengths = tokens.lengths[order]
    rows = data.pack(lengths, t.length, seed=config.data_seed)
    notes.append(
        f"{name}: {len(order):,} examples in {len(rows):,} rows of {t.length:,} tokens, of which "
        f"{100 * rows.padding(lengths, t.length):.1f} % are padding"
    )
    return Split(tokens, order, data.Rows(order[rows.examples], rows.starts))


def counted(name: str, counts: Any) -> Iterator[str]:
    """What became of examples that are too long."""
    if counts.cut:
        targets_too = f" ({counts.cut_targets:,} of them also tokens of the loss)"
        yield (f"{name}: {counts.cut:,} of {counts.examples:,} examples are longer than "
               f"sft.length and lost their first tokens" + targets_too * bool(counts.cut_targets))
    if counts.skipped:
        yield f"{name}: {counts.skipped:,} examples are longer than sft.length and were left out"


def first_example(tokenizer: Any, split: Split) -> str:
    """The first training example, with what the loss covers marked."""
    first = int(split.order[0])
    own = slice(*split.tokens.offsets[first : first + 2])
    wanted = split.tokens.types[own] > 0
    wanted[0] = False  # nothing predicts the first token
    text = hub.describe(split.tokens.ids[own], wanted, tokenizer)
    return "the first example, with what the loss covers marked:\n" + textwrap.indent(text, "  ")


def batches(config: Run, split: Split, tokenizer: Any, step: int) -> Iterator[dict]:
    """The training batches from a step on."""
    t = config.own(Sft)
    own = {"seed": config.data_seed, "start_step": step, "pad_id": filler(tokenizer)}
    if split.rows is None:
        return data.single_batches(
            split.tokens, split.order, config.batch_size, max_length=t.length, **own,
            **task.process(),
        )
    return data.packed_batches(
        split.tokens, split.rows, config.batch_size, length=t.length, **own, **task.process()
    )


def eval_batches(config: Run, split: Split, tokenizer: Any) -> Iterator[dict]:
    """The batches of an evaluated split."""
    t = config.own(Sft)
    own = {"pad_id": filler(tokenizer), **task.process()}
    if split.rows is None:
        return data.eval_single_batches(
            split.tokens, config.eval_batch_size, max_length=t.length, **own
        )
    return data.eval_packed_batches(
        split.tokens, split.rows, config.eval_batch_size, length=t.length, **own
    )


def filler(tokenizer: Any) -> int:
    """The token that fills rows up. Nothing attends to it or predicts it: any will do."""
    return tokenizer.pad_token_id or 0


def examples_in(split: Split, ids: np.ndarray) -> np.ndarray:
    """The numbers of the examples in rows."""
    if split.rows is None:
        return split.order[ids]
    return np.concatenate([split.rows[i] for i in ids])


def questions_of(config: Run, tests: Mapping[str, data.Chats]) -> task.Questions | None:
    """What the trained model is asked: the first questions of the test split."""
    t, chats = config.own(Sft), tests["test"]
    exam = (t.asked or len(chats)) if t.answer else 0
    found = tuple(itertools.islice(asked(chats), max(t.samples, exam)))
    if not found:
        return None
    return task.Questions(found[: t.samples], found[:exam], t.answer, t.longest_answer)


def asked(chats: data.Chats) -> Iterator[task.Question]:
    """The examples that ask something, with the right answer."""
    for i in range(len(chats)):
        try:
            example = chats[i]
        except BadRecord:  # tokenising tells of it
            continue
        if "completion" in example:
            yield task.Question({"prompt": example["prompt"]}, example["completion"])
        elif "messages" in example:
            *before, last = example["messages"]
            if before and last["role"] == "assistant":
                given = {"messages": before} | {k: example[k] for k in ("tools",) if k in example}
                yield task.Question(given, str(last.get("content") or ""))


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    own = config.get("sft", {})
    if "length" not in own:
        return {}
    return {"rows": f"{own['length']:,} tokens" + ", packed" * bool(own.get("pack"))}


TASK = task.Task(
    NAME,
    "to continue text: chats, prompts with completions, or plain text",
    "chats",
    request,
    check,
    open_problem,
    shapes,
    lambda config: len(data.open_chats(request(config, download=False)).train),
    Sft,
    objective=lambda config: targets.objective(),
    unit="nats per token",
    facts=facts,
)
