"""Speech: a transformer over cepstral frames that tells speakers apart.

There is no pretrained one to fetch, so that a run makes it: method full from random parameters
(``model.source=""``) on the frames alone (``speech.clusters``). Other runs adapt that one to the
speakers, with the folder of the first as their ``model.source``.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rmlora_jax import data, methods
from rmlora_jax.config import LARGE, WHOLE, Mistake, field
from rmlora_jax.data.packaged import SPEAKERS, SpeechDataset
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.models.frames import Frames, FramesConfig
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks import places
from rmlora_jax.tasks.task import Feed, Opening, Problem, Shapes, Task, classification, numbered

NAME = "speech_classification"
ADVICE = "type: python run.py --config=configs/speech.py:base --workdir=FOLDER"


@dataclasses.dataclass(frozen=True)
class Speech:
    """Read by the task of speech alone."""

    speakers: tuple = field(
        (), "numbers from 1 to 9 of those who are told apart; (): all", elements=WHOLE
    )
    clusters: int = field(
        0, "above 0: tell the cluster, of this many, of a hidden frame instead of the speaker",
        least=0, most=LARGE,
    )
    width: int = field(64, 'of a new model (model.source="", not a run\'s folder)',
                       least=1, most=LARGE)
    layers: int = field(4, "of a new model", least=1, most=LARGE)
    heads: int = field(4, "of a new model", least=1)


def check(config: Run) -> Iterator[Mistake]:
    """What is wrong with a config for speech."""
    own = config.own(Speech)
    chosen = set(own.speakers)
    fine = len(chosen) == len(own.speakers) > 1 and chosen <= set(SPEAKERS)
    if chosen and not fine:
        yield "speech.speakers", "two or more different numbers from 1 to 9, or () for all"
    if config.data.name != "japanese_vowels":
        yield "data.name", "japanese_vowels for speech"
    if own.heads >= 1 and own.width % own.heads:
        yield "speech.heads", f"a divisor of speech.width {own.width}"
    if config.model.adapter:
        yield "model.adapter", "empty for speech"
    yield from places.no_texts(config)


def missing(config: Run) -> Iterator[str]:
    source = config.model.source
    folder = Path(source).expanduser()
    if source and not folder.is_dir():
        yield f"config.model.source={source!r}: {places.no_folder(folder)}"
    yield from data.missing("utterances", request(config))


def open_problem(config: Run, opening: Opening) -> Problem:
    """The utterances and the model that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    speech, trained, source = config.own(Speech), None, config.model.source
    if source:
        base, trained = opening.read_run(Path(source).expanduser(), NAME, ADVICE)
        speech = base.own(Speech)
    utterances = load(config)
    size = utterances.train.frames.shape[1:]
    plain = FramesConfig(
        num_channels=size[1],
        longest=size[0],
        hidden_size=speech.width,
        num_hidden_layers=speech.layers,
        num_attention_heads=speech.heads,
        intermediate_size=4 * speech.width,
    )
    options = {
        "num_labels": utterances.num_classes,
        "dtype": jnp.dtype(config.model.dtype),
        "unroll": min(config.model.unroll, speech.layers),
        "remat": config.model.remat,
    }
    example = (jax.ShapeDtypeStruct((1, *size), jnp.float32),
               jax.ShapeDtypeStruct((1, size[0]), jnp.bool_))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in example]

    def params_of(key):
        new = jax.jit(Frames(plain, **options).init)(key, *zeros)["params"]
        return trained | {"head": new["head"]} if trained else new

    params = params_of(opening.key)
    return Problem(
        model=Frames(methods.architecture(config, plain), **options),
        params=params,
        reseeded=params_of,
        new=tuple("/".join(path) for path in flatten_dict(params)
                  if not trained or path[0] == "head"),
        example=example,
        open_feed=lambda: open_feed(config, utterances, opening.devices),
        objective=classification(config.optimizer.label_smoothing),
        metrics=("accuracy",),
        notes=("newly initialised: " + ("head" if trained else "all parameters"),),
    )


def load(config: Run) -> SpeechDataset:
    """The utterances that the config names, some of train held out for validation."""
    return data.open_utterances(request(config))


def request(config: Run) -> data.Request:
    """The utterances that the config names."""
    return data.Request(
        config.data.name,
        speakers=config.own(Speech).speakers,
        clusters=config.own(Speech).clusters,
        validation=config.data.validation,
        limit=config.data.limit,
        data_dir=config.data.data_dir,
    )


def open_feed(config: Run, utterances: SpeechDataset, devices: Devices) -> Feed:
    """All utterances on the device; batches are numbers into them."""
    splits = {name: getattr(utterances, name) for name in ("train", "validation", "test")}
    sizes = {name: len(split.labels) for name, split in splits.items()}
    stacked = [np.concatenate(parts) for parts in zip(*splits.values(), strict=True)]
    resident = replicate(dict(zip(("frames", "lengths", "label"), stacked, strict=True)), devices)
    train, evaluate = numbered(config, sizes)

    def prepare(resident, batch):
        frames, lengths, labels = (
            resident[name][batch["id"]] for name in ("frames", "lengths", "label")
        )
        return (frames, jnp.arange(frames.shape[1]) < lengths[:, None]), labels

    return Feed(
        sizes=sizes,
        train=train,
        evaluate=evaluate,
        resident=resident,
        prepare_train=lambda key, positions, resident, batch: prepare(resident, batch),
        prepare_eval=prepare,
    )


def shapes(config: Run) -> Shapes:
    raise UserError(
        f"config.task={NAME!r} is not compiled alone; leave out --compile_only, it trains in a "
        "minute"
    )


TASK = Task(
    NAME,
    "who speaks",
    check,
    missing,
    open_problem,
    shapes,
    lambda config: len(load(config).train.labels),
    Speech,
)
