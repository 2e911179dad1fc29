"""Fine-tuning of a language model on conversations, prompts with completions, or texts."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax import data, hub, methods
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.hub import chat_template
from rmlora_jax.models.family import TOKENS
from rmlora_jax.tasks import places, targets, task
from rmlora_jax.tasks.sft_feed import open_feed, questions_of
from rmlora_jax.tasks.sft_fields import Sft, check, streams

NAME = "sft"


def use_sft(c: Any) -> None:
    """Sets the fields that make a run of a config one of this task, with factors on every linear
    layer of the model's layers."""
    c.task, c.method = NAME, "lora"
    c.data.name = "chats"  # a word for the run's files
    c.lora.target, c.lora.train = methods.ALL_LINEAR, ""
    c.batch_size = c.eval_batch_size = 16


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
        **({"apart": not streams(config)} | options),
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
    pretrained = hub.load_pretrained(config.model.source, inputs=TOKENS, on_disk=True)
    if config.model.adapter:
        adapter = Path(config.model.adapter).expanduser()
        pretrained = hub.adapter_base(adapter, pretrained, rows=True)
        tokenizer = hub.tokenizer_of(pretrained)
    check_model(config, tokenizer, pretrained.config)
    if t.tokens or pretrained.tokenizer:
        pretrained = hub.with_tokens(pretrained, t.tokens)
        tokenizer = hub.tokenizer_of(pretrained)
        template = chat_template.find_template(tokenizer, t.template)
    return task.of_pretrained(
        pretrained,
        chats.notes,
        model=build(config, pretrained.family, pretrained.config, pretrained.rows),
        example=example_of(config),
        open_feed=lambda: open_feed(config, chats, tokenizer, template, pretrained.config),
        metrics=targets.METRICS,
        info=hub.Info(
            task=NAME,
            dtype=config.model.dtype,
            template=str(template.text or "") if t.template else None,
            system=t.system,
            tokens=tuple(t.tokens),
        ),
        questions=questions_of(config, chats.tests),
        skipped=chats.skipped.records,  # tokenising adds to them
    )


def build(config: Run, family: Any, architecture: Any, rows: tuple[int, ...]) -> Any:
    """The model of a run, which trains these rows of embedding and head by themselves."""
    own = {"attention": config.model.attention, "new_tokens": rows}
    return task.build_model(config, family.model, architecture, architecture.vocab_size, **own)


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
    # Without a tokenizer nobody knows whether tables have rows to spare: they grow.
    old, size = architecture.vocab_size, architecture.vocab_size + len(t.tokens)
    architecture = dataclasses.replace(architecture, vocab_size=size)
    row = functools.partial(jax.ShapeDtypeStruct, (b, t.length))
    kinds = {"tokens": jnp.int32, "wanted": jnp.bool_, "segments": jnp.int32,
             "positions": jnp.int32}  # fmt: skip
    return task.Shapes(
        model=build(config, family, architecture, tuple(range(old, size))),
        example=example_of(config),
        outputs=architecture.vocab_size,
        prepare_train=lambda key, positions, resident, batch: targets.shifted(batch, t.pack),
        resident={},
        batch={"id": jax.ShapeDtypeStruct((b,), jnp.int32)}
        | {name: row(dtype) for name, dtype in kinds.items()},
        words=f", rows of {t.length:,} tokens",
    )


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    own = config.get("sft", {})
    if "length" not in own:
        return {}
    return {"rows": f"{own['length']:,} tokens" + ", packed" * bool(own.get("pack"))}


def training_examples(config: Run) -> int:
    """How many there are where each is a row.

    Raises:
      UserError: the data are not here, or the examples share rows.
    """
    if config.own(Sft).pack:
        raise UserError("how many rows examples share is known when they are tokenised")
    return len(data.open_chats(request(config, download=False)).train)


TASK = task.Task(
    NAME,
    "to continue text: chats, prompts with completions, or plain text",
    "chats",
    request,
    check,
    open_problem,
    shapes,
    training_examples,
    Sft,
    objective=lambda config: targets.objective(),
    unit="nats per token",
    facts=facts,
)
