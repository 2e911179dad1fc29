"""Where a pretrained model's files are: a local folder, a bundled model, or the hub."""

import json
import re
import threading
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError

ASSETS = Path(__file__).parent.parent / "assets"

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Seconds for the hub's first answer. Without a network its own client would retry for minutes.
REPLY_TIMEOUT = 2.0

# What the hub allows as a name: "model" or "owner/model".
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder with the files of a pretrained model.

    Looks, in this order, for a local folder, for a model bundled with this package, and on the
    Hugging Face hub (first in its cache; the network is asked only for what is not there, and
    never where ``HF_HUB_OFFLINE`` is set).

    Args:
      source: a path, a bundled name, or a hub name such as ``google/vit-base-patch16-224``.
      revision: branch, tag or commit on the hub; None is its main branch.

    Raises:
      UserError: nothing of that name; no answer from the hub within 5 s; no safetensors there.

    >>> find_folder("vit-tiny-patch8-64-tinyimagenet").name
    'vit-tiny-patch8-64-tinyimagenet'
    """
    name = str(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in bundled():
        return ASSETS / name
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"model {name!r} is not a folder. Give the folder that holds its {CONFIG} and "
            f"{WEIGHTS}, a name on the Hugging Face hub, or a bundled model: {_bundled_names()}"
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; is it a model's folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object; copy it again")
    return value


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if (folder / WEIGHTS).exists():
        return folder
    if (folder / INDEX).exists() and all((folder / shard).exists() for shard in shards(folder)):
        return folder
    return None


def shards(folder: Path) -> list[str]:
    """File names of the shards that a folder's index lists.

    Raises:
      UserError: the index is unreadable.
    """
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX} has no 'weight_map'; copy it again")
    return sorted(set(index.values()))


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
        get(PREPROCESSOR)
        if get(WEIGHTS) is None:
            if get(INDEX) is None:
                raise UserError(
                    f"model {name!r} on the hub has no {WEIGHTS}. "
                    "Save it as safetensors with PyTorch, and give that folder"
                )
            for shard in shards(folder):
                get(shard)
    except UserError:
        raise
    except Exception as error:  # the client raises its HTTP library's errors too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"fetching model {name!r} failed ({reason}). Try again: what has arrived is kept"
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
