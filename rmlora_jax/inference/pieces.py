"""An answer's text while its tokens come: pieces that never change afterwards."""

from collections.abc import Iterable, Sequence

UNKNOWN = "\ufffd"  # what a tokenizer gives for bytes that are not (yet) a letter


class Text:
    """The text of tokens that come a few at a time.

    A piece is what can no longer change: a letter whose bytes are not complete is held back, and so
    is what may be the beginning of a stop string. The pieces, joined, are the whole text.

    Args:
      tokenizer: of transformers; special tokens are not part of the text.
      ends: tokens that end the text, and are not part of it.
      stops: strings that end the text, and are not part of it.

    Attributes:
      tokens: those of the text so far, without one that ended it.
      text: the pieces so far, joined.
      ended: whether a token or a string has ended it.
    """

    def __init__(self, tokenizer, ends: Iterable[int] = (), stops: Sequence[str] = ()):
        self.tokenizer, self.ends, self.stops = tokenizer, frozenset(ends), tuple(stops)
        self.tokens: list[int] = []
        self.ended = False
        self.text = ""

    def add(self, tokens: Iterable[int]) -> str:
        """The piece that further tokens give, which may be empty; -1 is no token."""
        for token in tokens:
            if self.ended or token < 0:
                break
            if token in self.ends:
                self.ended = True
            else:
                self.tokens.append(token)
        whole = self._decoded()
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if places:
            self.ended = True
            return self._piece(whole[: min(places)])
        return self._piece(whole[: self._certain(whole)])

    def finish(self) -> str:
        """The last piece: what was held back."""
        whole = self._decoded()
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        return self._piece(whole[: min(places, default=len(whole))])

    def _decoded(self) -> str:
        return self.tokenizer.decode(
            self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _piece(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _certain(self, whole: str) -> int:
        """How many letters cannot change any more."""
        known = whole.rstrip(UNKNOWN)
        held = (n for stop in self.stops for n in range(min(len(stop) - 1, len(known)), 0, -1)
                if known.endswith(stop[:n]))
        return len(known) - max(held, default=0)
