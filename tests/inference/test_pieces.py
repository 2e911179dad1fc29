"""Text that comes in pieces: joined they are the whole, and no piece is ever taken back."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rmlora_jax.inference.pieces import Text

WORDS = "Grüße, 字 \U0001f600 ✓ naïve é\u0301 a b END c"


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte, and one special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_join_to_the_whole(tokenizer, size):
    ids = tokenizer(WORDS)["input_ids"]
    assert len(ids) == len(WORDS.encode())
    text = Text(tokenizer, [tokenizer.eos_token_id])
    pieces = [text.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces.append(text.finish())
    assert "".join(pieces) == text.text == WORDS and not text.ended
    assert "\ufffd" not in "".join(pieces)
    assert size > 1 or sum(map(bool, pieces)) == len(WORDS)  # a letter as soon as it is whole


def test_bytes_that_are_no_letter_come_at_the_end(tokenizer):
    ids = tokenizer("ab字")["input_ids"][:-1]
    text = Text(tokenizer)
    assert [text.add([i]) for i in ids] == ["a", "b", "", ""]
    assert text.finish() == "\ufffd" == tokenizer.decode(ids)[2:]
    # Followed by others they cannot become one any more.
    assert text.add(tokenizer("!")["input_ids"]) == "!"


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(("stops", "expected"), [
    (("END",), WORDS.partition("END")[0]),
    (("c", "END", "é"), WORDS.partition("é")[0]),
    (("ENDE",), WORDS),
    (("a b EN?", " c"), WORDS.partition(" c")[0]),
    (("Gr",), ""),
])
def test_stop_strings(tokenizer, size, stops, expected):
    ids = tokenizer(WORDS)["input_ids"]
    text, told = Text(tokenizer, (), stops), ""
    for i in range(0, len(ids), size):
        told += text.add(ids[i : i + size])
        assert expected.startswith(told)  # what a stop string takes away was never shown
    told += text.finish()
    assert told == text.text == expected and text.ended == (expected != WORDS)


def test_end_tokens_and_what_is_no_token(tokenizer):
    ids = tokenizer("ab")["input_ids"]
    text = Text(tokenizer, [tokenizer.eos_token_id])
    assert text.add([*ids, -1, -1]) == "ab" and not text.ended
    assert text.add([ids[0], tokenizer.eos_token_id, ids[1]]) == "a" and text.ended
    assert text.add(ids) == "" and text.finish() == "" and text.text == "aba"
    assert text.tokens == [*ids, ids[0]]


def test_random_tokens(tokenizer):
    rng = np.random.RandomState(0)
    for _ in range(20):
        ids = rng.randint(0, 256, 30).tolist()
        text = Text(tokenizer)
        pieces = [text.add([i]) for i in ids]
        assert "".join([*pieces, text.finish()]) == tokenizer.decode(ids)
