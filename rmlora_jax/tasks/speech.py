"""Speech: a transformer over cepstral frames that tells speakers apart.

There is no pretrained one to fetch, so that a run makes it: method full from random parameters
(``model.source=""``) on the frames alone (``speech.clusters``). Other runs adapt that one to the
speakers, with the folder of the first as their ``model.source``.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from rmlora_jax import data
from rmlora_jax import methods as method
from rmlora_jax.data.packaged import SpeechDataset
from rmlora_jax.models.frames import Frames, FramesConfig
from rmlora_jax.parallel.mesh import Devices, replicate
from rmlora_jax.tasks.task import Feed, Problem, numbered
from rmlora_jax.train.base_run import read_base
from rmlora_jax.train.config import SPEECH

ADVICE = "type: python run.py --config=configs/speech.py:base --workdir=FOLDER"


def open_problem(
    config: ml_collections.ConfigDict, devices: Devices, head_key: jax.Array
) -> Problem:
    """The utterances and the model that the config names.

    Raises:
      UserError: one of them cannot be had.
    """
    speech, trained, source = config.speech, None, config.model.source
    if source:
        base, trained = read_base(Path(source).expanduser(), SPEECH, ADVICE)
        speech = base.speech
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

    params = params_of(head_key)
    return Problem(
        model=Frames(method.architecture(config, plain), **options),
        params=params,
        reseeded=params_of,
        new=tuple("/".join(path) for path in flatten_dict(params)
                  if not trained or path[0] == "head"),
        example=example,
        open_feed=lambda: open_feed(config, utterances, devices),
        metrics=("accuracy",),
        notes=("newly initialised: " + ("head" if trained else "all parameters"),),
    )


def load(config: ml_collections.ConfigDict) -> SpeechDataset:
    """The utterances that the config names, some of train held out for validation."""
    return data.open_utterances(request(config))


def request(config: ml_collections.ConfigDict) -> data.Request:
    """The utterances that the config names."""
    return data.Request(
        config.data.name,
        speakers=config.speech.speakers,
        clusters=config.speech.clusters,
        validation=config.data.validation,
        limit=config.data.limit,
        data_dir=config.data.data_dir,
    )


def open_feed(
    config: ml_collections.ConfigDict, utterances: SpeechDataset, devices: Devices
) -> Feed:
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
