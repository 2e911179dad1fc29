"""Fine-tuning of a language model on conversations, prompts with completions, or texts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax import data, hub
from rmlora_jax.config import FREE, LARGE, PLACE, Elements, Mistake, field, is_name, is_number
from rmlora_jax.data.rows import Examples, eval_row_batches, row_batches
from rmlora_jax.data.tokens import buckets
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.tasks import places, targets, task

NAME = "sft"


def _is_file(value: Any) -> bool:
    """A path, or a path and how often a pass has each of its examples."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return is_name(value[0]) and is_number(value[1]) and 0 < value[1] <= 1000
    return is_name(value)


def _is_named_file(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_name, value))


FILES = Elements("paths, or pairs (path, weight) with weights above 0", _is_file)
NAMED_FILES = Elements("pairs (name, path)", _is_named_file)


@dataclasses.dataclass(frozen=True)
class Sft:
    """The fields of the task sft."""

    files: tuple = field(
        (),
        "JSON lines or parquet for training, in place of data.name. (path, 2) has each example "
        "twice in a pass, (path, 0.5) half of them",
        elements=FILES,
    )
    test_file: str | None = field(
        None, "None: a part of the files is held out", resume=PLACE
    )
    evaluate: tuple = field(
        (), "((name, path), ...): measured with each validation and reported as loss_NAME, so that "
        "forgetting can be watched", elements=NAMED_FILES,
    )
    columns: tuple = field(
        (), "one name (of messages or of a text) or two (of prompt and completion); (): messages, "
        "prompt and completion, or text, whichever there is"
    )
    length: int = field(1024, "tokens of a row", least=2, most=LARGE)
    pack: bool = field(True, "examples share a row and do not see each other; False: one a row")
    too_long: str = field(
        "cut", "an example of more tokens is cut from the left, left out, or an error",
        choices=("cut", "skip", "refuse"),
    )
    loss: str = field(
        "assistant", "over the tokens of answers with their end, or over all tokens",
        choices=("assistant", "all"),
    )
    template: str | None = field(
        None, "file of a Jinja chat template; None: the tokenizer's own", resume=PLACE
    )
    system: str = field("", "first message of a conversation that has none with role system")
    cache: str = field(
        "~/.cache/rmlora_jax/tokens", "folder for tokenised splits; '': no cache",
        resume=FREE, cache=True,
    )


def use_sft(c: Any) -> None:
    """Sets the fields that make a run of a config one of this task, with factors on every linear
    layer of the model's layers."""
    c.task, c.method = NAME, "lora"
    c.data.name = "chats"  # a word for the run's files
    c.lora.target, c.lora.train = "all-linear", ""
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
    if config.lora.target == r"encoder/layers/.*":
        yield "lora.target", "all-linear for sft, or another regex on the model's paths"
    if len(t.columns) > 2:
        yield "sft.columns", "at most two names"
    names = [name for name, _ in t.evaluate] if all(map(_is_named_file, t.evaluate)) else []
    if len(set(names)) < len(names):
        yield "sft.evaluate", "pairs with different names"
    if any(not name.isidentifier() for name in names):
        yield "sft.evaluate", "names of letters, digits and _ alone"
    if t.files:
        yield from places.unused(
            config, ("data.test_split", "data.unlabelled_split"), "with sft.files"
        )
    elif t.test_file:
        yield "sft.test_file", "None without sft.files"
    if methods.of(config).insert is not None:
        yield "method", f"another than {config.method} for sft, such as lora"


def open_problem(config: Run, opening: task.Opening) -> task.Problem:
    """The conversations and the language model that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    t = config.own(Sft)
    folder = hub.find_folder(config.model.source)  # a mistyped name fails before data is fetched
    tokenizer = hub.load_tokenizer(folder)
    template = template_of(config, tokenizer)
    chats = open_chats(config)
    pretrained = hub.load_decoder(config.model.source)
    check_model(config, tokenizer, pretrained.config)
    kind, vocabulary = pretrained.family.model, pretrained.config.vocab_size
    return task.of_pretrained(
        pretrained,
        chats.notes,
        model=task.build_model(config, kind, pretrained.config, vocabulary),
        example=example_of(config),
        open_feed=lambda: open_feed(config, chats, tokenizer, template),
        metrics=targets.METRICS,
        info=hub.Info(
            task=NAME,
            max_length=t.length,
            dtype=config.model.dtype,
            template=template,
            system=t.system,
        ),
        skipped=chats.skipped,
    )


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
    family, architecture = places.architecture(config, PROMPTS)
    row = functools.partial(jax.ShapeDtypeStruct, (b, t.length))
    kinds = {"tokens": jnp.int32, "wanted": jnp.bool_, "segments": jnp.int32,
             "positions": jnp.int32}
    return task.Shapes(
        model=task.build_model(config, family.model, architecture, architecture.vocab_size),
        example=example_of(config),
        outputs=architecture.vocab_size,
        prepare_train=lambda key, positions, resident, batch: targets.shifted(batch, t.pack),
        resident={},
        batch={name: row(dtype) for name, dtype in kinds.items()}
        | {"id": jax.ShapeDtypeStruct((b,), jnp.int32)},
        words=f" rows of {t.length} tokens",
    )


def open_feed(config: Run, chats: Any, tokenizer: Any, template: str) -> task.Feed:
    """Tokenises each split, or reads its tokens from the cache, and packs them into rows."""
    t = config.own(Sft)
    splits, notes = {}, []
    for name, split in chats.splits.items():
        found, told = open_split(config, name, split, tokenizer, template)
        splits[name], notes = found, [*notes, *told]
    train = splits["train"]
    lengths = (t.length,) if t.pack else buckets(t.length)
    options = {"pad_id": tokenizer.pad_token_id, **task.process()}
    notes += [f"first example, with the loss over what is between {OPEN} and {CLOSE}:\n"
              + marked(tokenizer, *first_of(train))]

    def prepare(resident, batch):
        return targets.shifted(batch, t.pack)

    return task.Feed(
        sizes={name: len(split.examples.lengths) for name, split in splits.items()},
        train=lambda step: row_batches(
            train.examples, train.rows, config.batch_size, lengths, seed=config.data_seed,
            start_step=step, group_by_length=not t.pack, **options,
        ),
        evaluate=lambda name: eval_row_batches(
            splits[name].examples, splits[name].rows, config.eval_batch_size, lengths, **options
        ),
        resident={},
        prepare_train=lambda key, positions, *given: prepare(*given),
        prepare_eval=prepare,
        tests=tuple(name for name in splits if name.startswith("test")),
        watched=tuple(name for name in splits if name.startswith("test_")),
        varies=not t.pack,
        epoch=len(train.rows),
        examples=lambda name, ids: np.concatenate(
            [splits[name].numbers[splits[name].rows[i]] for i in ids]
        ),
        content={name: data.hash_of(*split.examples) for name, split in splits.items()},
        notes=tuple(notes),
    )


class Split(NamedTuple):
    """A split as rows of tokens.

    Attributes:
      examples: those that fit and have a target.
      numbers: int64 (n,), their numbers in the files.
      rows: the examples in each row.
    """

    examples: Examples
    numbers: np.ndarray
    rows: list[np.ndarray]


OPEN, CLOSE = "\u27e6", "\u27e7"  # white square brackets: no text of ours has them
LONGEST = 1500  # letters of the first example that are shown


def first_of(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the first example, and which of them are wanted."""
    first = slice(*split.examples.offsets[:2])
    return split.examples.tokens[first], split.examples.wanted[first]


def marked(tokenizer: Any, tokens: np.ndarray, wanted: np.ndarray) -> str:
    """The text of an example, with what the loss covers between marks."""
    wanted = np.concatenate([[False], wanted[1:]])  # nothing predicts the first token
    edges = np.flatnonzero(np.diff(wanted, prepend=wanted[:1])).tolist()
    parts = []
    for start, end in zip([0, *edges], [*edges, len(tokens)], strict=True):
        text = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if wanted[start] else text)
    text = "".join(parts)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "\n".join(f"  {line}" for line in text.splitlines())
