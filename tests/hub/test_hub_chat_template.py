"""Targets of the loss against a search for the assistant's words in the text of the template."""

import random
import re

import numpy as np
import pytest
from fixtures.chat.tiny import CHATML, FORMATS, LLAMA3, QWEN3, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rmlora_jax.data.chat_examples import ROLES, Names, example_of
from rmlora_jax.errors import UserError
from rmlora_jax.hub import (
    Template,
    describe,
    encode,
    encode_prompt,
    end_tokens,
    find_template,
)
from rmlora_jax.hub.chat_template import KNOWN, LOSSES, _overlap, fingerprint

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital is Paris."},
    {"role": "user", "content": "Name a prime number, please."},
    {"role": "assistant", "content": "7 is prime. ü 字"},
]
# What the published formats make of it, written by hand; the assistant's part is in «».
WRITTEN = {
    "chatml": "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n«The capital is Paris.<|im_end|>»\n"
    "<|im_start|>user\nName a prime number, please.<|im_end|>\n"
    "<|im_start|>assistant\n«7 is prime. ü 字<|im_end|>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    "What is the capital of France?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«The capital is Paris.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nName a prime number, please.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«7 is prime. ü 字<|eot_id|>»",
    "gemma": "<bos><start_of_turn>user\nWhat is the capital of France?<end_of_turn>\n"
    "<start_of_turn>model\n«The capital is Paris.<end_of_turn>»\n"
    "<start_of_turn>user\nName a prime number, please.<end_of_turn>\n"
    "<start_of_turn>model\n«7 is prime. ü 字<end_of_turn>»\n",
    "mistral": "<s>[INST] What is the capital of France?[/INST]« The capital is Paris.</s>»"
    "[INST] Name a prime number, please.[/INST]« 7 is prime. ü 字</s>»",
}


def expected(tokenizer, written: str) -> tuple[list[int], list[bool]]:
    """Tokens and targets of a text with marks, piece by piece: no token crosses a mark."""
    tokens, wanted = [], []
    for n, piece in enumerate(re.split("[«»]", written)):
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        tokens += ids
        wanted += [n % 2 == 1] * len(ids)
    return tokens, wanted


def encoded(tokenizer, example, template=None, **options):
    tokens, wanted = encode(tokenizer, example, template or find_template(tokenizer), **options)
    assert tokens.dtype == np.int32 and wanted.dtype == bool and tokens.shape == wanted.shape
    return tokens.tolist(), wanted.tolist()


@pytest.mark.parametrize("own", [True, False], ids=["tokenizers", "known"])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, own):
    """By differences of prefixes (the tokenizer's) and by generation marks (this package's)."""
    tokenizer = tiny_tokenizer(kind)
    template = find_template(tokenizer, "" if own else kind)
    assert ("generation" in str(template.text).replace("add_generation", "")) is not own
    tokens, wanted = expected(tokenizer, WRITTEN[kind])
    assert encoded(tokenizer, {"messages": CHAT}, template) == (tokens, wanted)
    whole = re.sub("[«»]", "", WRITTEN[kind])
    assert tokens == tokenizer(whole, add_special_tokens=False)["input_ids"]
    if own:
        assert tokens == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert encoded(tokenizer, {"messages": CHAT}, template, loss="all") == (
        tokens, [True] * len(tokens)
    )
    cut = WRITTEN[kind].replace("«", "", 1).replace("»", "", 1)
    assert encoded(tokenizer, {"messages": CHAT}, template, loss="last") == expected(tokenizer, cut)
    given = {"messages": CHAT, "given": 3}
    assert encoded(tokenizer, given, template) == expected(tokenizer, cut)
    # What is generated from is what training puts before the answer.
    prompt = encode_prompt(tokenizer, {"messages": CHAT[:3]}, template).tolist()
    text = cut[: cut.index("«")]
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token is None or tokens.count(tokenizer.bos_token_id) == 1
    last = re.search(r"(<[^<]+>|</s>)»", WRITTEN[kind])
    assert last and tokenizer.convert_tokens_to_ids(last[1]) in end_tokens(tokenizer, template)
    if kind == "gemma":
        assert len(end_tokens(tokenizer, template)) == 2


def test_a_pair_is_a_conversation_and_system_is_added():
    tokenizer = tiny_tokenizer()
    pair = {"prompt": CHAT[0]["content"], "completion": CHAT[1]["content"]}
    template = find_template(tokenizer)
    assert encoded(tokenizer, pair) == encoded(tokenizer, {"messages": CHAT[:2]})
    system = {"role": "system", "content": "You are."}
    with_system = {"messages": [system, *CHAT[:2]]}
    assert encoded(tokenizer, pair, system="You are.") == encoded(tokenizer, with_system)
    # One that the conversation has stays.
    assert encoded(tokenizer, with_system, system="Other.") == encoded(tokenizer, with_system)
    given = {"messages": CHAT, "given": 3}
    assert encoded(tokenizer, given, system="You are.")[1] == encoded(
        tokenizer, {"messages": [system, *CHAT], "given": 4})[1]
    prompt = encode_prompt(tokenizer, {"prompt": CHAT[0]["content"]}, template, system="You are.")
    tokens, wanted = encode(tokenizer, with_system, template)
    assert prompt.tolist() == tokens[: np.flatnonzero(wanted)[0]].tolist()


def test_without_a_template():
    tokenizer = tiny_tokenizer("llama3", None)
    template = find_template(tokenizer)
    assert template.text is None and find_template(tiny_tokenizer(), "none").text is None
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pair = {"prompt": "What is it?", "completion": " Paris"}
    head, tail = [bos, *ids("What is it?")], [*ids(" Paris"), eos]
    assert encoded(tokenizer, pair) == (head + tail, [False] * len(head) + [True] * len(tail))
    assert encoded(tokenizer, pair, loss="all")[1] == [True] * len(head + tail)
    assert encode_prompt(tokenizer, pair, template).tolist() == head
    assert end_tokens(tokenizer, template) == (eos,)
    # Neither a second bos nor a second eos.
    text = "<|begin_of_text|>Name.<|eot_id|>\n"
    assert encoded(tokenizer, {"text": text}) == (ids(text), [True] * len(ids(text)))
    assert encoded(tokenizer, {"text": "Name."})[0] == [bos, *ids("Name."), eos]
    bare = tiny_tokenizer("chatml", None, eos_token=None)
    assert encoded(bare, {"text": "Name."})[0] == bare("Name.")["input_ids"]
    with pytest.raises(UserError, match=r"conversations need a chat template.*chatml"):
        encode(tokenizer, {"messages": CHAT}, template)


def test_earlier_answers_without_their_reasoning():
    """The template writes the last answer more fully than earlier ones."""
    tokenizer = tiny_tokenizer("chatml", QWEN3)
    chat = [CHAT[0], {"role": "assistant", "content": "<think>a\nb</think>\n\nParis."}, *CHAT[2:]]
    written = (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n«Paris.<|im_end|>»\n"
        "<|im_start|>user\nName a prime number, please.<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\n7 is prime. ü 字<|im_end|>»\n"
    )
    assert encoded(tokenizer, {"messages": chat}) == expected(tokenizer, written)


def test_overlap_against_trying_all():
    draw = random.Random(0)
    for _ in range(2000):
        after, before = ("".join(draw.choices("ab\n", k=draw.randrange(9))) for _ in "12")
        sizes = [n for n in range(len(after) + 1) if before.endswith(after[:n])]
        assert _overlap(after, before) == max(sizes)


def test_prefixes_are_checked():
    shouting = CHATML.replace("message['content']",
                              "(message['content'] | upper if messages | length > 2 and "
                              "message['role'] == 'user' else message['content'])")  # fmt: skip
    tokenizer = tiny_tokenizer("chatml", shouting)
    encode(tokenizer, {"messages": CHAT[:2]}, find_template(tokenizer))
    with pytest.raises(UserError, match=r"message 2: .*differently.*\n.*generation.*loss=last"):
        encode(tokenizer, {"messages": CHAT}, find_template(tokenizer))
    encode(tokenizer, {"messages": CHAT}, find_template(tokenizer), loss="all")


def test_a_token_across_the_border_is_split():
    """The prompt keeps the tokens that generation goes on from."""
    for tokenizer, answer in (
        (tiny_tokenizer(), "\nParis"),  # "\n\n" is one token
        (tiny_tokenizer("llama3", split=""), "Paris"),  # "\n\n" is, but not before a letter
    ):
        template = find_template(tokenizer)
        chat = {"messages": [CHAT[0], {"role": "assistant", "content": answer}]}
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        border = len(tokenizer.apply_chat_template([CHAT[0]], tokenize=False,
                                                   add_generation_prompt=True))
        assert text[:border].endswith("\n")
        whole, prompt, rest = (
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text, text[:border], text[border:])
        )
        assert whole[: len(prompt)] != prompt
        tokens, wanted = encode(tokenizer, chat, template)
        assert tokens.tolist() == prompt + rest
        assert tokens[~wanted].tolist()[: len(prompt)] == prompt
        assert encode_prompt(tokenizer, {"messages": [CHAT[0]]}, template).tolist() == prompt
        assert tokenizer.decode(tokens) == text


def test_a_tokenizer_that_begins_every_text_with_a_space():
    """As Llama 2's: parts of a text by themselves have other tokens than within it."""
    words = ["▁", *"abc", "▁a", "▁b", "bc", "<s>", "</s>", "<unk>"]
    merges = [("▁", "a"), ("b", "c"), ("▁", "b")]
    model = models.BPE({word: n for n, word in enumerate(words)}, merges, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '') }}"
        "{% endfor %}"
    )
    tokens, wanted = encoded(tokenizer, {"prompt": "ab", "completion": " bc"})
    assert tokenizer.convert_ids_to_tokens(tokens) == ["▁a", "b", "▁", "bc", "</s>"]
    assert wanted == [False, False, True, True, True]
    with pytest.raises(UserError, match=r"a token holds the end of 'ab' and the beginning of 'c"):
        encode(tokenizer, {"prompt": "ab", "completion": "c"}, find_template(tokenizer))


@pytest.mark.parametrize("kind", ["gemma", "mistral"])
def test_roles_out_of_order_in_the_templates_words(kind):
    tokenizer = tiny_tokenizer(kind)
    with pytest.raises(UserError) as error:
        encode(tokenizer, {"messages": CHAT[1:]}, find_template(tokenizer))
    assert "refuses the messages of assistant" in str(error.value)
    assert "roles must alternate user/assistant" in str(error.value)
    with pytest.raises(UserError, match="roles must alternate"):
        encode(tokenizer, {"messages": CHAT[1:]}, find_template(tokenizer, kind))


def test_templates_that_cannot_be_used(tmp_path):
    tokenizer = tiny_tokenizer()
    for text, why in (
        ("{{ messages[0].content ", "is not Jinja: line 1"),
        ("{{ strftime_now('%d') }}\n{{ messages[0] ", "is not Jinja: line 2"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "Range too big"),
        ("{{ raise_exception('no such thing') }}", "no such thing"),
    ):
        (file := tmp_path / "a.jinja").write_text(text)
        with pytest.raises(UserError, match=re.escape(why)) as error:
            encode(tokenizer, {"messages": CHAT}, find_template(tokenizer, str(file)))
        assert str(error.value).count("\n") <= 1
    with pytest.raises(UserError, match=r"template='b.jinja': there is no such file"):
        find_template(tokenizer, "b.jinja")
    with pytest.raises(UserError, match=r"did you mean chatml\?"):
        find_template(tokenizer, "chatlm")
    with pytest.raises(UserError, match=r"writes '<start_of_turn>' and (.|\n)*sft.template"):
        find_template(tokenizer, "gemma")
    (file := tmp_path / "c.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        find_template(tokenizer, str(file))


def test_one_date_for_ever():
    template = LLAMA3.replace("{{ content }}", "{{ content + strftime_now('%d %B %Y') }}")
    tokenizer = tiny_tokenizer("llama3", template)
    tokens, _ = encode(tokenizer, {"messages": CHAT[:2]}, find_template(tokenizer), loss="all")
    assert tokenizer.decode(tokens).count("26 July 2024") == 2


def test_tools_pass_whole():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        + CHATML.replace("message['content']", "message['content'] + (message.tool_calls | "
                         "tojson if message.tool_calls else '')")
    )  # fmt: skip
    tokenizer = tiny_tokenizer("chatml", template)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": ["int", None]}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}
    chat = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "8"},
        CHAT[1],
    ]
    example = {"messages": chat, "tools": tools}
    tokens, wanted = encode(tokenizer, example, find_template(tokenizer))
    text = tokenizer.decode(tokens)
    assert '"parameters": {"a": ["int", null]}' in text
    assert text == tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
    said = tokenizer.decode(tokens[wanted])
    assert said == ('[{"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}]'
                    "<|im_end|>The capital is Paris.<|im_end|>")
    # This package's own template for tools.
    tokens, wanted = encode(tokenizer, example, find_template(tokenizer, "chatml"))
    assert tokenizer.decode(tokens[wanted]) == (
        '<tool_call>{"name": "add", "arguments": {"a": 7}}</tool_call><|im_end|>'
        "The capital is Paris.<|im_end|>"
    )
    assert "<|im_start|>tool\n8<|im_end|>" in tokenizer.decode(tokens)


def test_fuzzed_examples_are_encoded_or_refused():
    """Whatever a row may hold that `example_of` lets through."""
    draw = random.Random(0)
    words = ["", " ", "a\n", "\n\n", "<|im_end|>", "[INST]", "{{ 1 }}", "\x00", "字", "<think>"]
    tokenizers = [tiny_tokenizer(kind) for kind in FORMATS] + [tiny_tokenizer("chatml", QWEN3)]
    pairs = [(one, find_template(one)) for one in tokenizers]
    pairs += [(tiny_tokenizer(kind), find_template(tiny_tokenizer(kind), kind)) for kind in KNOWN]
    done = 0
    for _ in range(400):
        messages = []
        for _ in range(draw.randrange(1, 6)):
            message: dict = {"role": draw.choice(["user", "assistant", draw.choice(ROLES)])}
            message["content"] = "".join(draw.choices(words, k=3))
            if draw.random() < 0.1:
                arguments = draw.choice(["a", "[1]", None, {"a": [None, 1.5]}])
                message["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
            if draw.random() < 0.1:
                message[draw.choice(["name", "x"])] = draw.choice([None, 1, ["a"]])
            messages.append(message)
        row = {"messages": messages}
        if draw.random() < 0.2:
            row["tools"] = [{"name": draw.choice(words), "parameters": draw.choice([None, 1, {}])}]
        example = example_of(row, Names(), "line 1")
        tokenizer, template = draw.choice(pairs)
        loss = draw.choice(LOSSES)
        try:
            tokens, wanted = encode(tokenizer, example, template, loss=loss)
        except UserError as error:
            assert str(error).count("\n") <= 1 and len(str(error)) < 800
            continue
        done += 1
        assert tokens.shape == wanted.shape and tokens.dtype == np.int32
        if any(one["role"] == "assistant" for one in example["messages"]):
            assert wanted.any()
    assert done > 100


def test_described():
    tokenizer = tiny_tokenizer()
    tokens, wanted = encode(tokenizer, {"messages": CHAT}, find_template(tokenizer))
    marked = WRITTEN["chatml"].replace("«", "[[").replace("»", "]]")
    assert describe(tokens, wanted, tokenizer, colour=False) == marked
    coloured = describe(tokens, wanted, tokenizer, colour=True)
    assert "\x1b[32mThe capital is Paris.<|im_end|>\x1b[0m" in coloured
    ids = np.array(tokenizer("\x1b[31m \x07" + "word " * 2000)["input_ids"], np.int32)
    text = describe(ids, np.zeros(len(ids), bool), tokenizer, colour=False)
    assert "\\x1b[31m \\x07word" in text and len(text) < 1100


def test_the_fingerprint_depends_on_what_decides_the_tokens():
    def of(tokenizer, name="", **options):
        return fingerprint(tokenizer, find_template(tokenizer, name), **options)

    found = {
        of(tiny_tokenizer()), of(tiny_tokenizer("llama3")), of(tiny_tokenizer(), "chatml"),
        of(tiny_tokenizer(), loss="all"), of(tiny_tokenizer(), system="a"),
    }  # fmt: skip
    assert len(found) == 5 and of(tiny_tokenizer()) in found


def test_known_templates_are_there():
    for name, (_, bos, _, _) in FORMATS.items():
        template = find_template(tiny_tokenizer(name), name)
        assert isinstance(template, Template) and template.name == name in KNOWN
        assert ("bos_token" in str(template.text)) == bool(bos)
