"""A trained language model, ready for use: prompts in, answers out."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import rmlora_jax as rm
from rmlora_jax.errors import UserError, did_you_mean, progress
from rmlora_jax.files import read_object
from rmlora_jax.hub.chat_template import Template, end_tokens, find_template
from rmlora_jax.hub.info import Info, check_fits
from rmlora_jax.hub.new_tokens import tokenizer_of
from rmlora_jax.hub.on_disk import OnDisk, on_device
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import GENERATION, raw_config
from rmlora_jax.hub.weights import some
from rmlora_jax.inference.classifier import NotFinite
from rmlora_jax.inference.generate import (
    STEPS,
    bucket,
    compiled,
    decoder,
    padded,
    with_adapters,
)
from rmlora_jax.inference.pieces import Text
from rmlora_jax.inference.prompts import Prompt, as_prompt, is_conversation, prompts_of, tokens_of
from rmlora_jax.inference.sampling import Sampling, as_arguments, check_sampling, row_keys
from rmlora_jax.models.attention import blaming
from rmlora_jax.models.config import LARGEST
from rmlora_jax.models.decoder import new_cache
from rmlora_jax.models.family import flat_params
from rmlora_jax.parallel import memory

LONGEST = 2**20  # tokens of an answer
SEEDS = 2**32
PIECE = 4  # tokens of one call of the program while a person reads along
NO_TOKEN = -2  # is never written, not even where a row has ended


def info_of(base: Pretrained) -> Info:
    """What a whole model's own files say about its use."""
    return Info("sft")


def narrowed(params: dict, dtype) -> dict:
    """Kernels and embeddings in the dtype that the model multiplies them in; the rest as it is."""
    multiplied = ("kernel", "embedding")
    flat = {path: leaf.astype(dtype) if path.rpartition("/")[2] in multiplied else leaf
            for path, leaf in flat_params(params).items()}
    return unflatten_dict(flat, sep="/")


def template_of(tokenizer: Any, info: Info) -> Template:
    """The chat template that a model was trained with, or else its tokenizer's own."""
    if info.template is None:
        return find_template(tokenizer)
    return Template("of the model", info.template or None)


def stored_ends(folder: Path) -> set[int]:
    """The tokens that end an answer by a model's files: ``eos_token_id``, one number or several."""
    found, own = set(), folder / GENERATION
    for raw in (read_object(own) if own.exists() else {}, raw_config(folder)[1]):
        ends = raw.get("eos_token_id")
        found |= {end for end in (ends if isinstance(ends, list) else [ends])
                  if type(end) is int and 0 <= end < LARGEST}
    return found


def written_ends(tokenizer: Any, template: Template) -> set[int]:
    """The tokenizer's end token, and the one that the chat template writes after an answer."""
    try:
        return set(end_tokens(tokenizer, template))
    except UserError:  # it refuses so short a conversation, or does not mark where its answer is
        return {tokenizer.eos_token_id} - {None}


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
      prompt: what it was asked, as `prompts.as_prompt` gives it.
      text: the answer, without special tokens and stop strings.
      tokens: how many were written, without the one that ended the answer.
      ended: "stop" by a stop token or string, or "length" at ``max_new_tokens``, or at the model's
        last position.
    """

    prompt: Prompt
    text: str
    tokens: int
    ended: str


class Options(NamedTuple):
    """How answers are written; see `Generator.generate`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def checked(self) -> "Options":
        """The same.

        Raises:
          UserError: a value is not allowed.
        """
        check_sampling(self.sampling)
        number, seed = self.max_new_tokens, self.seed
        if type(number) is not int or not 1 <= number <= LONGEST:
            raise UserError(f"max_new_tokens is {number!r}; it must be a whole number from 1 to "
                            f"{LONGEST:,}")
        if type(seed) is not int or not 0 <= seed < SEEDS:
            raise UserError(f"seed is {seed!r}; it must be a whole number from 0 to {SEEDS - 1:,}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {self.stop!r}; it must be strings of at least one letter")
        return self._replace(stop=stop)


class Generator:
    """A trained language model on one device, from `load` or from parts in memory.

    Args:
      base: the pretrained model.
      params: of ``base``'s model, with factors where ``lora`` is given.
      lora: the description of the factors; None for a model without factors.
      info: what the model is for; its dtype is that of the computation and of the cache.
      adapters: for several adapters of one base: their trainable parts by name, all of one
        structure (`rmlora_jax.align_adapters`), described by ``lora``; ``params`` are then the
        base's alone. Each prompt names the one that answers, and a batch may have different ones.

    Attributes:
      model: the Linen module, adapted; ``params``, on the device, are its parameters.
      tokenizer: of transformers.
      template: the chat template.
      ends: the tokens that end an answer.

    Raises:
      UserError: the parts do not belong together, or there is no tokenizer.

    ::

        model = rmlora_jax.hub.load("runs/math")
        model.generate(["What is 3 + 4?"], max_new_tokens=100)[0].text
        for piece in model.stream("What is 3 + 4?"):
            print(piece, end="", flush=True)
    """

    def __init__(
        self,
        base: Pretrained,
        params: dict,
        lora: rm.LoRA | None,
        info: Info,
        adapters: Mapping[str, dict] | None = None,
    ):
        check_fits(base, info)
        self.base, self.info = base, info
        self.tokenizer = tokenizer_of(base)
        self.template = template_of(self.tokenizer, info)
        self.ends = stored_ends(base.folder) | written_ends(self.tokenizer, self.template)
        dtype = jnp.dtype(info.dtype)
        config = base.config
        model = base.family.model(config, base.num_labels, dtype=dtype)
        if lora is not None:  # W + s A B anew for each token would take longer than the token
            model = rm.adapt(model, dataclasses.replace(lora, execution="factored"))
        self.model = model

        decode = decoder(model)
        self.names = tuple(adapters or ())
        if adapters:
            stack = jax.tree.map(lambda *leaves: np.stack(leaves), *adapters.values())
            self.adapters = jax.device_put(stack)
            decode = with_adapters(decode)
        self.programs = compiled(decode, lambda rows, slots: new_cache(config, rows, slots, dtype))
        self.params = jax.device_put(on_device(narrowed(params, dtype)))
        given, held = flat_params(params), flat_params(self.params)
        untouched = {path: held[path] if given.get(path) is x else x
                     for path, x in flat_params(base.params).items() if isinstance(x, OnDisk)}
        own = flat_params(base.params) | untouched
        self.base = base._replace(params=unflatten_dict(own, sep="/"))

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 16,
        adapters: str | Sequence[str] | None = None,
        failed: Callable[[UserError], None] | None = None,
    ) -> list[Answer]:
        """The answer to each prompt, in the prompts' order.

        Args:
          prompts: one, or a list of them, in the forms of `prompts.as_prompt`: strings,
            conversations (lists of messages), dicts.
          max_new_tokens: the most tokens of an answer.
          temperature, top_k, top_p: see `sampling.Sampling`; temperature 0 is greedy.
          stop: strings that end an answer, and are not part of it. Special tokens may be among
            them. The tokens in ``ends`` always end an answer.
          seed: of the draws. The answer to prompt number i depends on ``seed`` and i, not on the
            batch that it is in.
          batch_size: prompts that are answered together, those of like length; fewer, which is
            told, where they do not fit in memory.
          adapters: where there are several: the name for all prompts, or for each.
          failed: called with the error of prompts whose logits are not finite, which are then left
            out; None raises it.

        Raises:
          UserError: an argument or a prompt is not allowed, a prompt has no room in the model's
            positions, or logits are not finite.
        """
        options = Options(max_new_tokens, temperature, top_k, top_p, stop, seed).checked()
        if type(batch_size) is not int or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be at least 1")
        asked = self._read(prompts, adapters)
        # The longest first: what does not fit in memory shows at once.
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][1]))
        answers: list[Answer | None] = [None] * len(asked)
        lost = []
        few = len(asked) <= batch_size
        with progress(len(asked), "answering", " prompts", disable=few) as bar:
            while order:
                rows = order[:batch_size]
                try:
                    found = self._write([asked[i] for i in rows], rows, options)
                except Exception as error:
                    if len(rows) == 1 or not memory.is_short(error):
                        raise
                    batch_size = len(rows) // 2
                    bar.write(f"note: {len(rows)} prompts at once need more memory; now "
                              f"{batch_size}", file=sys.stderr)
                    continue
                order = order[len(rows) :]
                for i, answer in zip(rows, found, strict=True):
                    answers[i] = answer
                    lost += [i] if answer is None else []
                bar.update(len(rows))
        if lost:
            error = self._not_finite(sorted(lost), len(asked))
            if failed is None:
                raise error
            failed(error)
        return [answer for answer in answers if answer is not None]

    def stream(self, prompt: Any, *, adapter: str | None = None, **options: Any) -> Iterator[str]:
        """The answer to one prompt in pieces, as they come; joined they are the whole answer.

        ``options`` are ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``stop`` and
        ``seed``, as in `generate`, which gives the same answer.
        """
        checked = Options(**options).checked()
        (asked,) = self._read([prompt], adapter)
        return self._stream(asked, checked)

    def _write(self, batch, rows: list[int], options: Options) -> list[Answer | None]:
        writing = _Writing(self, batch, rows, options)
        for _ in writing:
            pass
        return writing.answers()

    def _stream(self, asked, options: Options) -> Iterator[str]:
        writing = _Writing(self, [asked], [0], options, count=PIECE)
        for (piece,) in writing:
            if piece:
                yield piece
        if writing.answers()[0] is None:
            raise self._not_finite([0], 1)

    def from_arguments(self, values: Sequence[str]) -> list[Prompt]:
        """The prompts that the arguments of ``--predict`` name."""
        return prompts_of(values)

    def _not_finite(self, lost: list[int], number: int) -> NotFinite:
        named = some([f"prompt {i}" for i in lost])
        return NotFinite(f"the logits for {len(lost)} of {number} prompts are not finite, so they "
                         f"have no answer: {named}; the model's weights are damaged, or "
                         f"{self.info.dtype} is too narrow")

    def _read(self, prompts: Any, adapters) -> list[tuple[Prompt, list[int]]]:
        """Each prompt with its tokens."""
        one = isinstance(prompts, str | Prompt | Mapping) or is_conversation(prompts)
        given = [prompts] if one else list(prompts)
        names = list(adapters) if isinstance(adapters, list | tuple) else [adapters] * len(given)
        if len(names) != len(given):
            raise UserError(f"adapters has {len(names)} names for {len(given)} prompts; give one "
                            "name, or one for each prompt")
        found = []
        for i, (prompt, name) in enumerate(zip(given, names, strict=True)):
            where = f"prompt {i}"
            prompt = prompt if isinstance(prompt, Prompt) else as_prompt(prompt, where)
            prompt = prompt._replace(adapter=self.adapter_of(prompt.adapter or name, where))
            found.append((prompt, self.tokens_of(prompt, where)))
        return found

    def tokens_of(self, prompt: Prompt, where: str) -> list[int]:
        """What the model goes on from; a UserError, which names ``where``, if it cannot."""
        tokens = tokens_of(prompt, self.tokenizer, self.template, self.info.system, where)
        longest = self.base.config.max_position_embeddings
        if len(tokens) >= longest:
            raise UserError(f"{where} has {len(tokens):,} tokens, and {self.base.source} takes "
                            f"{longest:,}, of which the answer needs one; shorten the prompt")
        return tokens

    def adapter_of(self, name: str | None, where: str) -> str | None:
        """The name, if an adapter has it; a UserError, which names ``where``, if none has."""
        if name in self.names or (name is None and not self.names):
            return name
        known = f"this model has {', '.join(self.names)}" if self.names else "this model has one"
        if name is None:
            raise UserError(f"{where} names no adapter; {known}")
        raise UserError(f"{where} names the adapter {name[:80]!r}; {known}"
                        f"{did_you_mean(name, self.names)}")


class _Writing:
    """A batch of answers that is being written: iterated over, it gives each row's next piece."""

    def __init__(self, generator: Generator, batch, rows: list[int], options: Options, count=STEPS):
        self.generator, self.batch, self.options, self.count = generator, batch, options, count
        tokenizer = generator.tokenizer
        special = {text: tokenizer.convert_tokens_to_ids(text) for text in options.stop
                   if text in tokenizer.get_added_vocab()}
        self.ends = generator.ends | set(special.values())
        strings = [text for text in options.stop if text not in special]
        self.texts = [Text(tokenizer, self.ends, strings) for _ in batch]
        self.damaged = np.zeros(len(batch), bool)
        self.rows = rows

    def __iter__(self) -> Iterator[list[str]]:
        generator, options = self.generator, self.options
        programs, config = generator.programs, generator.base.config
        tokens, positions = padded([tokens for _, tokens in self.batch])
        size = len(tokens)
        longest = config.max_position_embeddings
        left = np.zeros(size, np.int32)
        for row, (_, prompt) in enumerate(self.batch):
            left[row] = min(options.max_new_tokens, longest - len(prompt))
        slots = tokens.shape[1] + bucket(int(left.max()))
        numbers = np.zeros(size, np.uint32)
        numbers[: len(self.rows)] = self.rows
        stops = np.full(bucket(len(self.ends), 4), NO_TOKEN, np.int32)
        stops[: len(self.ends)] = sorted(self.ends)
        sampling = as_arguments(options.sampling)
        params = self._params(size)
        with blaming(generator.info.dtype, "the model's dtype"):
            state = programs.start(params, tokens, positions, left, slots=slots)
            keys = row_keys(np.uint32(options.seed), numbers)
            while True:
                state, written = programs.write(
                    params, state, keys, stops, sampling, np.int32(self.count)
                )
                found, left = np.asarray(written), np.array(state.left)
                yield [text.add(row.tolist()) for text, row in
                       zip(self.texts, found, strict=False)]
                for row, text in enumerate(self.texts):
                    left[row] = 0 if text.ended else left[row]
                if not left.any():
                    break
                state = state._replace(left=left)
        self.damaged = np.asarray(state.damaged)[: len(self.batch)]
        yield [text.finish() for text in self.texts]

    def _params(self, size: int):
        """The model's parameters, with the adapter of each row where there are several."""
        generator = self.generator
        if not generator.names:
            return generator.params
        which = np.zeros(size, np.int32)
        which[: len(self.batch)] = [generator.names.index(p.adapter) for p, _ in self.batch]
        return generator.params, jax.tree.map(lambda leaf: leaf[which], generator.adapters)

    def answers(self) -> list[Answer | None]:
        """The answers, at the end; None where logits were not finite."""
        return [
            None if damaged else Answer(
                prompt, text.text, len(text.tokens), "stop" if text.ended else "length"
            )
            for (prompt, _), text, damaged in zip(self.batch, self.texts, self.damaged, strict=True)
        ]
