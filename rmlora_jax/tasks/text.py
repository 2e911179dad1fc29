"""Text classification and regression: an encoder, and tokenised examples in batches by length."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmlora_jax import data, hub
from rmlora_jax.config import FREE, LARGE, PLACE, Mistake, field, section
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.models.family import TEXTS
from rmlora_jax.tasks import places, task
from rmlora_jax.tasks.scores import names_of

CLASSES, VALUES = "text_classification", "text_regression"
SECOND = "#1"  # the class of number 1, which f1 always was of once


@section
class Text:
    """The fields of the two tasks on texts."""

    columns: tuple = field(
        (), "names of the one or two features with text; (): those of the GLUE task"
    )
    max_length: int = field(128, "tokens of an example; longer ones are cut", least=1, most=LARGE)
    metrics: tuple = field(
        (), "the first picks the best step; (): GLUE's, else accuracy, or pearson"
    )
    positive_label: str = field(
        "", "class that metric f1 is of, '#1': the second; '': that for GLUE, else the rarer one",
        before=SECOND,
    )
    train_file: str | None = field(
        None, "CSV, TSV or JSON lines, in place of TFDS", resume=PLACE
    )
    test_file: str | None = field(
        None, "None: a part of train_file is held out", resume=PLACE
    )
    predict_file: str | None = field(
        None, "rows without labels, predicted at the end", resume=PLACE
    )
    apart: bool = field(
        True, "equal texts stay together when a part is held out, except GLUE's; False: rows alone",
        before=False,
    )
    group_by_length: bool = field(
        False, "batches of similar lengths: less padding, another order"
    )
    one_length: bool = field(
        False, "pad all to max_length: more padding, but one program to compile"
    )
    cache: str = field(
        "~/.cache/rmlora_jax/tokens", "folder for tokenised splits; '': no cache",
        resume=FREE, cache=True,
    )


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for texts."""
    t = config.own(Text)
    if not config.model.source:
        yield "model.source", "a folder, or a model's name"
    yield from places.unused(
        config, ("model.image_size", "data.classes", "data.per_class"), "for text"
    )
    if config.model.attention not in ("auto", "xla"):
        yield "model.attention", "'auto' for text"
    if len(t.columns) > 2:
        yield "text.columns", "at most two names"
    if t.train_file:
        if not t.columns:
            yield "text.columns", (
                "the columns of text.train_file with text: "
                "--config.text.columns=\"('text',)\""
            )
        splits = ("data.test_split", "data.unlabelled_split")
        yield from places.unused(config, splits, "with text.train_file")
    else:
        files = ("text.test_file", "text.predict_file")
        yield from places.unused(config, files, "without text.train_file")
    glue = data.glue_task(config.data.name)
    fit = names_of(config.task == CLASSES)
    if any(name not in fit for name in t.metrics):
        yield "text.metrics", f"names among {', '.join(fit)} for {config.task}"
    elif any(name not in fit for name in metrics(config, glue)):
        yield "task", f"{VALUES if config.task == CLASSES else CLASSES} for {config.data.name}"
    elif t.positive_label not in ("", SECOND) and "f1" not in metrics(config, glue):
        yield "text.positive_label", "'' unless text.metrics has f1"


def open_problem(config: Run, opening: task.Opening) -> task.Problem:
    """The data set and the encoder that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    folder = hub.find_folder(config.model.source)  # a mistyped name fails before data is fetched
    tokenizer = hub.load_tokenizer(folder)
    glue = data.glue_task(config.data.name)
    texts = data.open_texts(request(config))
    measures = metrics(config, glue)
    positive, notes = positive_class(config, glue, texts) if "f1" in measures else (1, ())
    pretrained = hub.load_text(
        config.model.source,
        num_labels=1 if texts.label_names is None else None,
        labels=texts.label_names,
        key=opening.key,
    )
    kind, outputs = pretrained.family.model, pretrained.num_labels
    model = task.build_model(config, kind, pretrained.config, outputs)
    example = example_of(config)
    with task.fields("text.max_length"):  # more tokens than the model has positions
        jax.eval_shape(model.init, opening.key, *example)

    def write_predictions(workdir: Path, split: str, ids, predictions) -> Path:
        rows = texts.unlabelled[split].ids[ids]
        folder = workdir / "predictions"
        return data.write_predictions(folder, split, rows, predictions, texts.label_names, glue)

    return task.of_pretrained(
        pretrained,
        (*texts.notes, *notes),
        model=model,
        example=example,
        open_feed=lambda: open_feed(config, texts, tokenizer, pretrained.config),
        metrics=measures,
        positive=positive,
        write_predictions=write_predictions,
        info=hub.Info(
            task=config.task,
            labels=texts.label_names,
            max_length=config.own(Text).max_length,
            columns=tuple(texts.columns),
            dtype=config.model.dtype,
        ),
        skipped=texts.skipped,
    )


def shapes(config: Run) -> task.Shapes:
    """A run as shapes, for texts of ``text.max_length``.

    Raises:
      UserError: the model's config or the number of classes is not known on this machine.
    """
    family, architecture = places.architecture(config, TEXTS)
    outputs, example = count_labels(config), example_of(config)
    b, length, struct = config.batch_size, config.own(Text).max_length, jax.ShapeDtypeStruct
    batch = {n: struct((b, length), x.dtype) for n, x in zip(INPUTS, example, strict=True)}
    kind = jnp.float32 if config.task == VALUES else jnp.int32
    batch |= {"id": struct((b,), jnp.int32), "label": struct((b,), kind)}
    return task.Shapes(
        model=task.build_model(config, family.model, architecture, outputs),
        example=example,
        outputs=outputs,
        prepare_train=lambda key, positions, *given: prepare(*given),
        resident={},
        batch=batch,
        words=f", of {length} tokens",
    )


def count_labels(config: Run) -> int:
    if config.task == VALUES:
        return 1
    if found := data.known("texts", request(config)):
        return found.classes
    return len(data.open_texts(request(config, download=False)).label_names or ())


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def example_of(config: Run) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The model's arguments for one text of ``text.max_length``."""
    tokens = functools.partial(jax.ShapeDtypeStruct, (1, config.own(Text).max_length))
    return tokens(jnp.int32), tokens(jnp.bool_), tokens(jnp.int32)


def prepare(resident: dict, batch: dict) -> tuple[tuple, jax.Array]:
    """The model's arguments and the labels of a batch."""
    return tuple(batch[name] for name in INPUTS), batch["label"]


def request(config: Run, **options) -> data.Request:
    """The texts that the config names."""
    c, t = config.data, config.own(Text)
    glue = data.glue_task(c.name)
    tests = {"test": c.test_split} if glue is None or c.test_split else glue.tests
    unlabelled = glue.unlabelled if glue else {}
    if c.unlabelled_split:
        unlabelled = {"predict": c.unlabelled_split}
    return task.request(
        config,
        columns=tuple(t.columns) or (glue.columns if glue else ()),
        regression=config.task == VALUES,
        apart=t.apart,
        test_splits=tests,
        unlabelled_splits=unlabelled,
        train_file=t.train_file,
        test_file=t.test_file,
        predict_file=t.predict_file,
        **options,
    )


def metrics(config: Run, glue: data.GlueTask | None) -> tuple[str, ...]:
    if config.own(Text).metrics:
        return tuple(config.own(Text).metrics)
    if glue:
        return glue.metrics
    return ("pearson", "spearman") if config.task == VALUES else ("accuracy",)


def positive_class(
    config: Run, glue: data.GlueTask | None, texts: data.TextDataset
) -> tuple[int, tuple[str, ...]]:
    """The class that f1 is of, and what to tell about it.

    Raises:
      UserError: there are more than two classes, or none of the name that the config gives.
    """
    names, given = texts.label_names or (), config.own(Text).positive_label
    if len(names) != 2:
        raise UserError(
            f"f1 is of two classes, and the data has {len(names)}; type "
            "--config.text.metrics=\"('f1_macro',)\", the mean over the classes, or f1_micro"
        )
    if given not in ("", SECOND, *names):
        raise UserError(
            f"config.text.positive_label={given!r}: it must be a class, one of "
            f"{', '.join(map(repr, names))}"
        )
    counts = np.bincount(texts.train.labels, minlength=2)
    if given:
        positive = names.index(given) if given in names else 1
        why = "as config.text.positive_label says"
    elif glue:
        positive, why = 1, "as GLUE has it"
    else:
        positive = int(counts[1] <= counts[0])
        why = (f"the rarer of the training examples ({counts[positive]:,} of {counts.sum():,}); "
               "config.text.positive_label names another")
    return positive, (f"f1 is of class {names[positive]!r}, {why}",)


def open_feed(config: Run, texts: data.TextDataset, tokenizer, model: Any) -> task.Feed:
    """Tokenises each split, or reads its tokens from the cache."""
    t = config.own(Text)
    splits = {"train": texts.train, "validation": texts.validation}
    splits |= texts.tests | texts.unlabelled
    tokens = {
        name: data.tokenise(
            split.texts,
            tokenizer,
            t.max_length,
            cache_dir=Path(t.cache).expanduser() if t.cache else None,
            desc=f"tokenising {texts.name} {name}",
            model=model,
            name=_named(config, name, split),
        )
        for name, split in splits.items()
    }
    for name in ("train", "validation", *texts.tests):
        task.check_labels(splits[name].labels, texts.label_names, f"{texts.name}, split {name}")
    options = {
        "pad_id": tokenizer.pad_token_id,
        "max_length": t.max_length,
        "one_length": t.one_length,
        **task.process(),
    }

    learnt = [name for name in splits if name not in texts.unlabelled]
    content = {name: data.content_of(splits[name]) for name in learnt}
    content["tokens"] = data.hash_of(*(x for name in learnt for x in tokens[name]))

    def train(step: int):
        return data.text_batches(
            tokens["train"],
            texts.train.labels,
            config.batch_size,
            seed=config.data_seed,
            start_step=step,
            group_by_length=t.group_by_length,
            **options,
        )

    def evaluate(split: str):
        return data.eval_text_batches(
            tokens[split], splits[split].labels, config.eval_batch_size, **options
        )

    return task.Feed(
        sizes={name: len(split.ids) for name, split in splits.items()},
        train=train,
        evaluate=evaluate,
        resident={},
        prepare_train=lambda key, positions, *given: prepare(*given),
        prepare_eval=prepare,
        tests=tuple(texts.tests),
        unlabelled=tuple(texts.unlabelled),
        absent=task.absent_classes(texts.train.labels, texts.label_names or ()),
        varies=True,
        content=content,
    )


def _named(config: Run, split: str, rows: data.TextSplit) -> Callable[[int], str]:
    """What an error calls a row of a split."""
    t = config.own(Text)
    file = {"test": t.test_file, "predict": t.predict_file}.get(split) or t.train_file
    place = file or f"{config.data.name} {split}"
    return lambda i: f"{place}, row {rows.ids[i] + 1} ({rows.texts[0][i][:40]!r})"


def facts(config: Mapping[str, Any]) -> dict[str, str]:
    length = config.get("text", {}).get("max_length")
    return {} if length is None else {"text": f"at most {length} tokens"}


CLASSIFICATION = task.Task(
    CLASSES,
    "the class of one or two texts",
    "texts",
    request,
    check,
    open_problem,
    shapes,
    lambda config: len(data.open_texts(request(config, download=False)).train.ids),
    Text,
    facts=facts,
)
REGRESSION = CLASSIFICATION._replace(
    name=VALUES,
    help="a number for one or two texts",
    objective=lambda config: task.regression(),
    unit="squared error",
)
