"""Speech: a transformer over cepstral frames that tells speakers apart.

No pretrained model can be fetched, so a first run makes one: method full from random parameters
(``model.source=""``), on labels made from the frames (``speech.clusters``). Further runs adapt it
to the speakers; their ``model.source`` is the folder of the first run.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from rmlora_jax import called, data
from rmlora_jax.config import LARGE, WHOLE, Mistake, field, section
from rmlora_jax.data.packaged import SPEAKERS, SpeechDataset
from rmlora_jax.errors import UserError
from rmlora_jax.fields import Run
from rmlora_jax.models.frames import Frames, FramesConfig
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks import places, task

NAME = "speech_classification"


@section
class Speech:
    """The fields of the task on speech."""

    speakers: tuple = field(
        (), "numbers (1 to 9) of the speakers to tell apart; (): all", elements=WHOLE
    )
    clusters: int = field(
        0, "0: tell the speaker; above 0: tell which of this many clusters a hidden frame is in",
        least=0, most=LARGE,
    )
    width: int = field(64, 'of a new model (model.source="")', least=1, most=LARGE)
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
    yield from places.unused(config, places.OF_TEXTS, f"for {config.task}")


def missing_model(config: Run) -> Iterator[str]:
    source = config.model.source
    folder = Path(source).expanduser()
    if source and not folder.is_dir():
        yield f"config.model.source={source!r}: {places.no_folder(folder)}"


def _advice() -> str:
    base = f"--config={called.config('speech:base')} --workdir=FOLDER"
    return f"type: {called.command('train', base)}"


def open_problem(config: Run, opening: task.Opening) -> task.Problem:
    """The utterances and the model that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    speech, trained, source = config.own(Speech), None, config.model.source
    if source:
        first, trained = opening.read_run(Path(source).expanduser(), NAME, _advice())
        speech = first.own(Speech)
    utterances = data.open_utterances(request(config))
    size = utterances.train.frames.shape[1:]
    plain = FramesConfig(
        num_channels=size[1],
        longest=size[0],
        hidden_size=speech.width,
        num_hidden_layers=speech.layers,
        num_attention_heads=speech.heads,
        intermediate_size=4 * speech.width,
    )
    model = task.build_model(config, Frames, plain, utterances.num_classes)
    base = model.clone(config=plain)  # without what the method puts into the layers
    example = (jax.ShapeDtypeStruct((1, *size), jnp.float32),
               jax.ShapeDtypeStruct((1, size[0]), jnp.bool_))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in example]

    def params_of(key):
        new = jax.jit(base.init)(key, *zeros)["params"]
        return trained | {"head": new["head"]} if trained else new

    params = params_of(opening.key)
    return task.Problem(
        model=model,
        params=params,
        reseeded=params_of,
        new=tuple("/".join(path) for path in flatten_dict(params)
                  if not trained or path[0] == "head"),
        example=example,
        open_feed=lambda: open_feed(config, utterances, opening.devices),
        metrics=("accuracy",),
        notes=("newly initialised: " + ("head" if trained else "all parameters"),),
    )


def request(config: Run) -> data.Request:
    """The utterances that the config names."""
    own = config.own(Speech)
    return task.request(config, speakers=own.speakers, clusters=own.clusters)


def open_feed(config: Run, utterances: SpeechDataset, devices: Devices) -> task.Feed:
    """All utterances on the device; batches hold indices into them."""
    splits = {name: getattr(utterances, name) for name in ("train", "validation", "test")}
    sizes = {name: len(split.labels) for name, split in splits.items()}
    stacked = [np.concatenate(parts) for parts in zip(*splits.values(), strict=True)]
    resident = replicate(dict(zip(("frames", "lengths", "label"), stacked, strict=True)), devices)
    train, evaluate = task.numbered(config, sizes)

    def prepare(resident, batch):
        held = {name: x[batch["id"]] for name, x in resident.items()}
        frames, lengths = held["frames"], held["lengths"]
        return (frames, jnp.arange(frames.shape[1]) < lengths[:, None]), held["label"]

    return task.Feed(
        sizes=sizes,
        train=train,
        evaluate=evaluate,
        resident=resident,
        prepare_train=lambda key, positions, *given: prepare(*given),
        prepare_eval=prepare,
        # Frames are standardised, and so no two releases of numpy need agree in their last bits.
        content={name: data.hash_of(s.lengths, s.labels) for name, s in splits.items()},
    )


def shapes(config: Run) -> task.Shapes:
    raise UserError(
        f"config.task={NAME!r} is not compiled alone; leave out --compile_only, it trains in a "
        "minute"
    )


TASK = task.Task(
    NAME,
    "who speaks",
    "utterances",
    request,
    check,
    open_problem,
    shapes,
    lambda config: len(data.open_utterances(request(config)).train.labels),
    Speech,
    model=missing_model,
)
