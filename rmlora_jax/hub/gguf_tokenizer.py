"""The tokenizer inside a GGUF file, built with ``tokenizers``.

Two kinds are known. ``gpt2`` is byte-level BPE: the file has tokens and merges, and only the name
of the expression that cuts texts into words (``tokenizer.ggml.pre``). ``llama`` is SentencePiece's
BPE: the file has tokens and scores, from which the merges follow, and bytes stand for characters
without a token.

Sources: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, and the
tokenizer.json of the published models.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from rmlora_jax.errors import UserError, did_you_mean, first_line
from rmlora_jax.hub.gguf_file import GGUFFile

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # SentencePiece's sign for a space

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(NamedTuple):
    """How byte-level BPE cuts a text into words.

    Attributes:
      words: the expression of a word; None is GPT-2's.
      digits: whether each digit is first cut off by itself.
      whole_words: whether a word that is a token is taken without merges.
      bos: whether the first token is put in front where the file does not say.
      composed: whether texts are first normalised (NFC).
    """

    words: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    composed: bool = False


_LLAMA3 = Cut(LLAMA3, whole_words=True, bos=True)
CUTS = {
    "smollm": Cut(digits=True),
    "starcoder": Cut(digits=True),
    "refact": Cut(digits=True),
    "gpt-2": Cut(),
    "default": Cut(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Cut(LLAMA3),
    "qwen2": Cut(QWEN2, composed=True),
    "deepseek-r1-qwen": Cut(QWEN2),
    "tekken": Cut(TEKKEN, whole_words=True, bos=True),
}


def load_gguf_tokenizer(file: GGUFFile) -> Any:
    """transformers' fast tokenizer of the model in a GGUF file.

    Special tokens, the tokens at both ends and the chat template are the file's. Of several chat
    templates it is the one without a name.

    Raises:
      UserError: the file has no tokenizer, one of an unknown kind, or a damaged one.
    """
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int, default=[NORMAL] * len(tokens))
    kind = _field(file, "model", str, "")
    if kind not in KINDS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {kind[:80]!r}; known are {', '.join(KINDS)}"
        )
    if len(types) != len(tokens):
        _refuse(file, f"it has {len(tokens)} tokens, but {len(types)} types of tokens")
    # llama.cpp's own name for a token without a text.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        _refuse(file, "it has a token twice")
    try:
        built, usual = KINDS[kind](file, tokens, types)
        return _with_specials(file, built, tokens, types, usual)
    except UserError:
        raise
    except BaseException as error:  # below is Rust, whose own failures are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _refuse(file, first_line(error)[:200])


def _byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]):
    """(tokenizer, special tokens where the file does not say) of the kind gpt2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _field(file, "pre", str, "")
    if pre not in CUTS:
        said = f"is {pre[:80]!r}" if pre else "is missing, as in files of early 2024"
        raise UserError(
            f"{file.path}: tokenizer.ggml.pre, which says how texts are cut into words, {said}; "
            f"known are {', '.join(CUTS)}{did_you_mean(pre[:80], CUTS)}"
        )
    cut = CUTS[pre]
    # A merge is two tokens with a space between them; a token has no space of its own.
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        _refuse(file, "one of its merges is not of two tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.words:
        parts.append(pre_tokenizers.Split(Regex(cut.words), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"add_bos": cut.bos}


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]):
    """(tokenizer, special tokens where the file does not say) of the kind llama."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list(file, "scores", (float, int))
    if len(scores) != len(tokens):
        _refuse(file, f"it has {len(tokens)} tokens, but {len(scores)} scores")
    # A token of spaces alone is spelled with real ones, unlike those in which they are a part.
    spelled = [
        token.replace(" ", SPACE) if kind == USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    vocabulary = {token: i for i, token in enumerate(spelled)}
    if len(vocabulary) < len(spelled):
        _refuse(file, "it has a token twice")
    usual: dict[str, Any] = {"bos": 1, "eos": 2, "unknown": 0, "add_bos": True}
    unknown = _field(file, "unknown_token_id", int, usual["unknown"])
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges_from_scores(spelled, scores, types),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _field(file, "add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer, usual


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE, best first.

    SentencePiece joins the two neighbours whose union is the token of the highest score. So every
    way to cut a token into two tokens is a merge, as good as the token is; user-defined tokens are
    better than all others.

    >>> merges_from_scores(["a", "b", "ab", "aba"], [0, 0, -2, -1], [NORMAL] * 4)
    [('ab', 'a'), ('a', 'b')]
    """
    can = {token for token, kind in zip(tokens, types, strict=True)
           if kind in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = sorted(
        (kind != USER_DEFINED, -score * (kind != USER_DEFINED), i)
        for i, (score, kind) in enumerate(zip(scores, types, strict=True))
        if tokens[i] in can
    )
    return [
        (token[:at], token[at:])
        for token in (tokens[i] for _, _, i in ranked)
        for at in range(len(token) - 1, 0, -1)
        if token[:at] in can and token[at:] in can
    ]


def _with_specials(file, tokenizer, tokens, types, usual):
    """The tokenizer with its special tokens, what it adds at both ends, and its chat template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    # Texts are first cut at these tokens, whatever the merges are.
    for special, kinds in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds and tokenizer.token_to_id(token) is not None
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    named: dict[str, int] = {}
    for name, stored in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = _field(file, f"{stored}_token_id", int, usual.get(stored))
        if number is not None:
            if not 0 <= number < len(tokens):
                _refuse(file, f"its {stored}_token_id is {number}, of {len(tokens)} tokens")
            named[name] = number
    ends = [
        name
        for name in ("bos", "eos")
        if _field(file, f"add_{name}_token", bool, usual.get(f"add_{name}", False))
    ]
    for name in ends:
        if name not in named:
            _refuse(file, f"it asks for the token {name}, but does not say which that is")
    one = [*(["bos:0"] if "bos" in ends else []), "$A:0", *(["eos:0"] if "eos" in ends else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=one,
        pair=[*one, *(part.replace("A:0", "B:0").replace(":0", ":1") for part in one)],
        special_tokens=[
            {"id": name, "ids": [named[name]], "tokens": [tokens[named[name]]]} for name in ends
        ],
    )
    template = file.fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        _refuse(file, "its chat template is not a text")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[number] for name, number in named.items()},
    )


def _field(file: GGUFFile, name: str, kind: Any, default: Any) -> Any:
    """``tokenizer.ggml.NAME``, of this type."""
    value = file.fields.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        _refuse(file, f"tokenizer.ggml.{name} is {repr(value)[:80]}")
    return value


def _list(file: GGUFFile, name: str, kind: Any, default: list | None = None) -> list:
    """``tokenizer.ggml.NAME``, a list of this type."""
    values = _field(file, name, list, default)
    if not values and values is not default:
        values = None
    if values is None:
        raise UserError(f"{file.path} has no tokenizer.ggml.{name}, so no tokenizer; take a whole "
                        "model, not its projector or its adapter")
    if not all(isinstance(value, kind) for value in values):
        _refuse(file, f"tokenizer.ggml.{name} is not a list of one kind")
    return values


def _refuse(file: GGUFFile, why: str) -> NoReturn:
    raise UserError(f"{file.path} has no tokenizer that can be read ({why}); copy it again")
