"""Fast tokenizers of folders and GGUF files; only local files are read, and no code is run."""

import os
from pathlib import Path
from typing import Any

from rmlora_jax.errors import UserError, first_line
from rmlora_jax.hub.gguf_file import GGUFFile
from rmlora_jax.hub.gguf_tokenizer import load_gguf_tokenizer
from rmlora_jax.hub.source import gguf_files
from rmlora_jax.models.config import LARGEST

# Without any of these, transformers makes an empty tokenizer, which knows no word.
FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spm.model", "sentencepiece.bpe.model"),
    *("spiece.model", "tokenizer.model"),
)

# Letters of several scripts, so that some token is unknown: some damage of a file shows only when a
# text is read.
PROBE = "It reads: 7 ü Ж 字 ✓ \U0001f600"


def load_tokenizer(folder: Path):
    """The fast tokenizer of a model's folder or GGUF file.

    Reads ``tokenizer.json``, or converts ``vocab.txt``, ``vocab.json`` with ``merges.txt``, or a
    SentencePiece model; or builds it from the tokens in a GGUF file.

    Raises:
      UserError: the folder has no tokenizer, or one that needs code of its own.
    """
    files = gguf_files(folder)
    if not files and not any((folder / name).exists() for name in FILES):
        raise UserError(
            f"{folder} has no tokenizer; copy its files ({', '.join(FILES)}) beside config.json"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch
    try:
        tokenizer = load_gguf_tokenizer(GGUFFile(files)) if files else _converted(folder)
        fast = getattr(tokenizer, "is_fast", False)
        if fast:
            _try(tokenizer)
    except UserError:
        raise
    except BaseException as error:  # transformers raises many kinds, with long advice of its own
        # Below them is Rust, whose own failures are not Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{folder} has no tokenizer that can be read ({first_line(error)[:200]}). Copy the "
            f"tokenizer's files ({', '.join(FILES)}) beside config.json"
        ) from None
    lacks = "fast version" if not fast else "token for padding"
    if not fast or tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no {lacks}; choose another model")
    return tokenizer


def _converted(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, use_fast=True, trust_remote_code=False
    )


def _try(tokenizer) -> None:
    """Raises an error of any kind unless the tokenizer can read a text and an empty one.

    Its largest token number must be one that a model's table can have a row for.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= LARGEST:
        raise ValueError(f"it has a token of the number {largest}")
    rows = tokenizer([PROBE, ""], truncation=True, max_length=8, return_token_type_ids=True)
    for ids in (*rows["input_ids"], *rows["token_type_ids"]):
        if len(ids) > 8 or not all(type(i) is int and 0 <= i < LARGEST for i in ids):
            raise ValueError("it makes no tokens of a text")
