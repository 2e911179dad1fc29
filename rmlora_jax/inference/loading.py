"""The trained model in a folder: a run's, an adapter's, a whole model's, or several adapters'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import unflatten_dict

import rmlora_jax as rm
from rmlora_jax import called
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_object
from rmlora_jax.hub.gguf_file import SUFFIX
from rmlora_jax.hub.info import Info, read_info
from rmlora_jax.hub.peft_config import CONFIG_FILE, find_base, read_config
from rmlora_jax.hub.peft_read import adapter_base, load_peft, stored_labels
from rmlora_jax.hub.pretrained import Pretrained, load_pretrained
from rmlora_jax.hub.source import CONFIG, gguf_files
from rmlora_jax.inference import classifier, generator
from rmlora_jax.inference.classifier import Classifier
from rmlora_jax.inference.generator import Generator
from rmlora_jax.models.family import IMAGES, TEXTS, TOKENS, flat_params

ADAPTER, MERGED = "adapter", "merged"  # folders of a run

Model = Classifier | Generator


class Use(NamedTuple):
    """How a model with certain inputs is used.

    Attributes:
      make: (base, params, lora, info) -> the model, ready for use.
      info: what a whole model's own files say about its use.
    """

    make: Callable[..., Any]
    info: Callable[[Pretrained], Info]


CLASSIFY = Use(Classifier, classifier.info_of)
USES = {IMAGES: CLASSIFY, TEXTS: CLASSIFY, TOKENS: Use(Generator, generator.info_of)}


def load(folder: str | Path) -> Any:
    """The model in a folder, with its base: a `Classifier`, or a `Generator` if it writes text.

    Args:
      folder: a run's, which gives its ``adapter`` or else its ``merged`` model; an adapter's in
        PEFT's layout, whose base `find_base` finds; a whole model's in Hugging Face's layout, or a
        GGUF file; or one with a folder for each of several adapters of one language model, of which
        each prompt names one. Without ``rmlora.json`` the model's own files decide: images of its
        own size, or single texts of up to 512 tokens; a text model with one output is a regression.

    Raises:
      UserError: there is no model, a part of it is missing or damaged, or its base is not found.

    ::

        model = rmlora_jax.hub.load("runs/c100")
        model(["cat.png", "photos/"])  # [Prediction(input='cat.png', label='cat', ...), ...]
        model.logits(batch)            # float32 numpy (n, classes)
        rmlora_jax.hub.load("runs/math").generate(["What is 3 + 4?"])[0].text
    """
    folder = Path(folder).expanduser()
    if several := adapters_of(folder):
        return load_several(several)
    where = find_model(folder)
    info = read_info(where)
    if not (where / CONFIG_FILE).exists():
        base = load_pretrained(where)
        if base.new:
            raise UserError(f"{where} has no trained {', '.join(base.new)}; train it first")
        return use(base, base.params, None, info)
    base = adapter_base(where, _base(where, info))
    return use(base, *load_peft(where, base), info)


def use(base: Pretrained, params: dict, lora: rm.LoRA | None, info: Info | None, **more) -> Any:
    """The model ready for use, as its inputs ask for; without ``info`` its own files say how."""
    found = USES[base.family.inputs]
    return found.make(base, params, lora, info or found.info(base), **more)


def load_several(folders: dict[str, Path]) -> Any:
    """One model with the adapters in these folders, by name.

    Raises:
      UserError: they have not one base, or not that of a language model; or they were trained with
        different chat templates or system messages.
    """
    (first, place), *others = folders.items()
    sources = {name: find_base(where, read_config(where)) for name, where in folders.items()}
    for name, _ in others:
        if sources[name] != sources[first]:
            raise UserError(f"the adapters {first} and {name} have different bases, "
                            f"{sources[first]} and {sources[name]}; give the folder of one")
    infos = {name: read_info(where) for name, where in folders.items()}
    info = infos[first]
    base = _base(place, info)
    if USES[base.family.inputs].make is not Generator:
        raise UserError(f"{place.parent} holds {len(folders)} adapters; give the folder of one, "
                        f"such as {place}")
    for name, _ in others:
        if _talk(infos[name]) != _talk(info):
            raise UserError(f"the adapters {first} and {name} were trained with different chat "
                            "templates or system messages; give the folder of one")
    for where in folders.values():  # one that changes the head alone unties it for all
        base = adapter_base(where, base)
    try:
        trees, lora = rm.align_adapters({k: load_peft(v, base) for k, v in folders.items()})
    except ValueError as error:
        raise UserError(f"the adapters {', '.join(folders)} do not go together: {error}") from None
    own = flat_params(trees[first])  # also whole modules, which then are in no other place
    shared = {path: x for path, x in flat_params(base.params).items() if path not in own}
    return use(base, unflatten_dict(shared, sep="/"), lora, info, adapters=trees)


def _talk(info: Info | None) -> tuple[str | None, str]:
    """How a language model's prompts are written: chat template and system message."""
    return (info.template, info.system) if info else (None, "")


def _base(where: Path, info: Info | None) -> Pretrained:
    """The base of the adapter in a folder."""
    outputs = stored_labels(where)
    if outputs is None and info is not None:
        outputs = info.outputs
    size = info and info.image_size
    source = find_base(where, read_config(where))
    return load_pretrained(source, num_labels=outputs, image_size=size)


def adapters_of(folder: Path) -> dict[str, Path]:
    """The adapters in folders inside ``folder``, by their folder's name; {} unless several.

    They lie in the folders themselves, or are those of runs. A folder that is an adapter, a run or
    a model has none.
    """
    own = (folder / CONFIG_FILE, folder / ADAPTER / CONFIG_FILE, folder / CONFIG)
    if not folder.is_dir() or any(path.exists() for path in own):
        return {}
    found = {
        inside.name: place
        for inside in sorted(folder.iterdir())
        for place in (inside / ADAPTER, inside)
        if (place / CONFIG_FILE).exists()
    }
    return found if len(found) > 1 else {}


def find_model(folder: Path) -> Path:
    """The folder with an adapter or a model: ``folder`` itself, or one in it; or a GGUF file."""
    if folder.suffix == SUFFIX and folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; give that of a run, or of a model")
    for place in (folder, folder / ADAPTER):
        if (place / CONFIG_FILE).exists():
            return place
    for place in (folder / MERGED, folder):
        if (place / CONFIG).exists() and "model_type" in read_object(place / CONFIG):
            return place
    if gguf_files(folder):
        return folder
    if (folder / CONFIG).exists() or (folder / "checkpoints").exists():
        raise UserError(
            f"the run in {folder} has neither {ADAPTER}/ nor {MERGED}/; type\n"
            + called.command("export", f"--workdir={folder}")
        )
    raise UserError(
        f"{folder} holds neither a run nor a model: it has no {CONFIG_FILE} and no {CONFIG}; "
        "give the --workdir of a run, or the folder of an adapter or a model"
    )
