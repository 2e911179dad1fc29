"""Text classification and regression: an encoder, and tokenised examples in batches by length."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from rmlora_jax import data, hub
from rmlora_jax import methods as method
from rmlora_jax.models.family import Family
from rmlora_jax.parallel.mesh import Devices
from rmlora_jax.tasks.task import Feed, Problem, absent_classes, checkpoint_notes
from rmlora_jax.train.config import REGRESSION, data_seed
from rmlora_jax.train.fields import fields


def open_problem(
    config: ml_collections.ConfigDict, devices: Devices, head_key: jax.Array
) -> Problem:
    """The data set and the encoder that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    folder = hub.find_folder(config.model.source)  # mistyped? Said before any data is fetched
    tokenizer = hub.load_tokenizer(folder)
    glue = data.glue_task(config.data.name)
    texts = load(config)
    pretrained = hub.load_text(
        config.model.source,
        num_labels=1 if texts.label_names is None else len(texts.label_names),
        key=head_key,
    )
    model = build_model(config, pretrained.family, pretrained.config, pretrained.num_labels)
    example = example_of(config)
    with fields("text.max_length"):  # more tokens than the model has positions
        jax.eval_shape(model.init, head_key, *example)

    def write_predictions(workdir: Path, split: str, ids, predictions) -> Path:
        rows = texts.unlabelled[split].ids[ids]
        folder = workdir / "predictions"
        return data.write_predictions(folder, split, rows, predictions, texts.label_names, glue)

    return Problem(
        model=model,
        params=pretrained.params,
        new=pretrained.new,
        reseeded=lambda key: hub.new_text_head(pretrained, key).params,
        example=example,
        open_feed=lambda: open_feed(config, texts, tokenizer),
        metrics=metrics(config, glue),
        notes=checkpoint_notes(pretrained),
        write_predictions=write_predictions,
        pretrained=pretrained,
        info=hub.Info(
            task=config.task,
            labels=texts.label_names,
            max_length=config.text.max_length,
            columns=tuple(texts.columns),
            dtype=config.model.dtype,
        ),
        skipped=texts.skipped,
    )


def build_model(
    config: ml_collections.ConfigDict, family: Family, architecture: Any, num_labels: int
) -> nn.Module:
    """The encoder of a run, with what its method puts into the layers."""
    return family.model(
        method.architecture(config, architecture),
        num_labels,
        dtype=jnp.dtype(config.model.dtype),
        unroll=min(config.model.unroll, architecture.num_hidden_layers),
        remat=config.model.remat,
    )


def example_of(config: ml_collections.ConfigDict) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The model's arguments for one text of the greatest length."""
    tokens = functools.partial(jax.ShapeDtypeStruct, (1, config.text.max_length))
    return tokens(jnp.int32), tokens(jnp.bool_), tokens(jnp.int32)


def prepare(batch: dict) -> tuple[tuple, jax.Array]:
    """The model's arguments and the labels of a batch."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(batch[name] for name in names), batch["label"]


def load(config: ml_collections.ConfigDict, *, download: bool = True) -> data.TextDataset:
    """The data set that the config names, with a validation split carved from train."""
    return data.open_texts(request(config, download=download))


def request(config: ml_collections.ConfigDict, *, download: bool = True) -> data.Request:
    """The texts that the config names."""
    c, t = config.data, config.text
    glue = data.glue_task(c.name)
    tests = {"test": c.test_split} if glue is None or c.test_split else glue.tests
    unlabelled = glue.unlabelled if glue else {}
    if c.unlabelled_split:
        unlabelled = {"predict": c.unlabelled_split}
    return data.Request(
        c.name,
        columns=tuple(t.columns) or (glue.columns if glue else ()),
        label_key=c.label_key,
        regression=config.task == REGRESSION,
        data_dir=c.data_dir,
        validation=c.validation,
        train_split=c.train_split,
        test_splits=tests,
        unlabelled_splits=unlabelled,
        train_file=t.train_file,
        test_file=t.test_file,
        predict_file=t.predict_file,
        limit=c.limit,
        download=download,
        bad_records=c.bad_records,
    )


def metrics(config: ml_collections.ConfigDict, glue: data.GlueTask | None) -> tuple[str, ...]:
    if config.text.metrics:
        return tuple(config.text.metrics)
    if glue:
        return glue.metrics
    return ("pearson", "spearman") if config.task == REGRESSION else ("accuracy",)


def open_feed(config: ml_collections.ConfigDict, texts: data.TextDataset, tokenizer) -> Feed:
    """Tokenises every split, or reads its tokens from the cache."""
    t = config.text
    splits = {"train": texts.train, "validation": texts.validation}
    splits |= texts.tests | texts.unlabelled
    tokens = {
        name: data.tokenise(
            split.texts,
            tokenizer,
            t.max_length,
            cache_dir=Path(t.cache).expanduser() if t.cache else None,
            desc=f"tokenising {texts.name} {name}",
        )
        for name, split in splits.items()
    }
    options = {
        "pad_id": tokenizer.pad_token_id,
        "max_length": t.max_length,
        "one_length": t.one_length,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }

    def train(step: int):
        return data.text_batches(
            tokens["train"],
            texts.train.labels,
            config.batch_size,
            seed=data_seed(config),
            start_step=step,
            group_by_length=t.group_by_length,
            **options,
        )

    def evaluate(split: str):
        return data.eval_text_batches(
            tokens[split], splits[split].labels, config.eval_batch_size, **options
        )

    return Feed(
        sizes={name: len(split.ids) for name, split in splits.items()},
        train=train,
        evaluate=evaluate,
        resident={},
        prepare_train=lambda key, positions, resident, batch: prepare(batch),
        prepare_eval=lambda resident, batch: prepare(batch),
        tests=tuple(texts.tests),
        unlabelled=tuple(texts.unlabelled),
        absent=absent_classes(texts.train.labels, texts.label_names or ()),
    )
