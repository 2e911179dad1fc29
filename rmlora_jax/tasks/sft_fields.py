"""The fields of task sft, and what is wrong with them."""

import re
from collections.abc import Iterator
from typing import Any

from rmlora_jax import methods
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
    section,
)
from rmlora_jax.data.chat_tokens import TOO_LONG
from rmlora_jax.fields import Run
from rmlora_jax.hub import chat_template
from rmlora_jax.tasks import places


def _is_named_file(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_name, value))


NAMED_FILES = Elements("pairs (name, path)", _is_named_file)
WEIGHTS = Elements("numbers above 0", lambda value: is_number(value) and value > 0)


@section
class Sft:
    """The fields of the task sft."""

    files: tuple = field(
        (), "for training, .jsonl, .json or .parquet, in place of data.name; (): with data.name "
        "chats, the questions and answers on LoRA that come with this package", resume=FREE
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
    tokens: tuple = field(
        (), "special tokens that the tokenizer gains, such as ('<think>', '</think>'); their rows "
        "of embedding and head are trained",
    )
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


def streams(config: Run) -> bool:
    """Whether training examples are read while the run trains, and never all at once."""
    return config.data.mode == "stream"


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
    if streams(config) and not config.steps:
        yield "steps", "above 0 with data.mode stream: how many rows a pass has is not known"
    if methods.of(config).insert is not None:
        yield "method", f"another than {config.method} for sft, such as lora"
    named = [pair[0] for pair in t.evaluate if _is_named_file(pair)]
    if len(set(named)) < len(named) or not all(name.isidentifier() for name in named):
        yield "sft.evaluate", "pairs whose names differ and have letters, digits and _ alone"
    if t.answer and not regex_problem(t.answer) and re.compile(t.answer).groups != 1:
        yield "sft.answer", "a regular expression with one group, such as '#### (.*)'"
    if len(set(t.tokens)) < len(t.tokens) or not all(map(str.strip, map(str, t.tokens))):
        yield "sft.tokens", "different texts, each of more than spaces"
    if t.files:
        yield from places.unused(
            config, ("data.test_split", "data.unlabelled_split"), "with sft.files"
        )
    else:
        files = ("sft.validation_file", "sft.test_file", "sft.evaluate", "sft.weights")
        yield from places.unused(config, files, "without sft.files")
