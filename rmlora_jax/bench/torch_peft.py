"""PyTorch's PEFT on the same shapes, for the rows of ``--peft``.

The first row is LoRA of the same rank on the same linear layers of transformers' model, in eager
mode; all of it is in the compute dtype, which is PEFT at its fastest. The second row adds what the
authors of RM-LoRA do, written from its description: the penalty of every module is added to the
loss, and a Python loop masks the gradients after each backward pass.
"""

import dataclasses
import importlib.util
import random
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from rmlora_jax.bench.measure import Program
from rmlora_jax.bench.models import CLASSES, LINEARS, Entry
from rmlora_jax.bench.options import Options
from rmlora_jax.bench.variants import LEARNING_RATE, step_flops
from rmlora_jax.errors import UserError

NEEDED = ("torch", "transformers", "peft")
ROWS = {"peft_lora": "lora", "peft_rm_lora": "rm_lora"}
BATCHES = 4
PENALTY = 0.1


def check_installed() -> None:
    """Raises a UserError if ``--peft`` cannot run."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--peft needs {', '.join(missing)}, not installed here; type\n"
            f"pip install {' '.join(missing)}"
        )
    import torch  # pyright: ignore[reportMissingImports]

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UserError("--peft: torch sees no GPU and JAX does; install a torch with CUDA")


def programs(options: Options, say: Callable[[str], None] = print) -> list[Program]:
    """The rows of PEFT, as programs to be timed with the others."""
    if options.modules != "all":
        raise UserError("--peft adapts all linear layers; leave --modules out")
    say(f"building {', '.join(ROWS)}")
    return [_program(name, options) for name in ROWS]


def _program(name: str, options: Options) -> Program:
    import torch  # pyright: ignore[reportMissingImports]

    entry = options.entry
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    model = adapted_model(entry, options.rank).to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = factors(model)
    authors = name == "peft_rm_lora"
    facts: dict[str, Any] = {
        "framework": "torch",
        "compile_seconds": None,
        "trained_parameters": sum(p.numel() for p in trained),
        "flops": step_flops(entry, options.batch, ROWS[name], options.rank),
    }

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def stretch(steps: int) -> float:
        """Holds one model at a time on the device, so that the peak memory is its own."""
        try:
            model.to(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
            batches = [random_batch(entry, options.batch, dtype, device) for _ in range(BATCHES)]
            draw = random.Random(0)

            def step(batch, masked: bool) -> None:
                loss = model(**batch).loss
                if authors:
                    loss = loss + PENALTY * penalty(pairs)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                if authors and masked:
                    mask_gradients(pairs, max(1, options.rank // 2), draw)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            step(batches[-1], masked=False)
            finish()
            began = time.perf_counter()
            for i in range(steps):
                step(batches[i % BATCHES], masked=True)
            finish()
            seconds = time.perf_counter() - began
            if device == "cuda":
                facts["memory_bytes"] = torch.cuda.max_memory_allocated()
            return seconds
        finally:
            for parameter in trained:
                parameter.grad = None
            model.to("cpu")
            if device == "cuda":
                torch.cuda.empty_cache()  # to JAX, whose turn is next

    return Program(name, stretch, facts)


def adapted_model(entry: Entry, rank: int):
    """The model of transformers with LoRA on all linear layers of its encoder; the head trains.

    Raises:
      UserError: the installed transformers builds the encoder of other layers.
    """
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    model = base_model(entry)
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    # Those inside numbered layers, whatever transformers calls them.
    targets = [name for name in linears if re.search(r"\blayers?\.\d+\.", name)]
    expected = len(LINEARS) * entry.config.num_hidden_layers
    if len(targets) != expected:
        raise UserError(
            f"--peft found {len(targets)} linear layers in the encoder of transformers, not the "
            f"{expected} that are adapted in JAX; install another version of transformers"
        )
    lora = peft.LoraConfig(r=rank, lora_alpha=4 * rank, lora_dropout=0.0, target_modules=targets)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "classifier" in name or "pooler" in name:
            parameter.requires_grad = True
    return model.train()


def base_model(entry: Entry):
    """The model of transformers with the entry's architecture."""
    import transformers

    fields = {"model_type": entry.config.model_types[0]} | dataclasses.asdict(entry.config)
    # Fields that are ours alone, 0 here, and DeBERTa's that equals hidden_size.
    for ours in ("bottleneck_width", "prefix_length", "embedding_size"):
        fields.pop(ours, None)
    if "pos_att_type" in fields:
        fields["pos_att_type"] = list(fields["pos_att_type"])
    config = transformers.AutoConfig.for_model(**fields, num_labels=CLASSES)
    images, texts = "AutoModelForImageClassification", "AutoModelForSequenceClassification"
    return getattr(transformers, images if entry.length is None else texts).from_config(config)


def factors(model) -> list[tuple]:
    """(A of (r, in), B of (out, r)) of every adapted module, as PEFT stores them."""
    return [
        (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for module in model.modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]


def penalty(pairs: list[tuple]):
    """The mean over all factors of the Frobenius norm of their Gram matrix minus the identity."""
    import torch  # pyright: ignore[reportMissingImports]

    total = 0.0
    for a, b in pairs:
        eye = torch.eye(a.shape[0], device=a.device, dtype=a.dtype)
        total = total + torch.norm(a @ a.T - eye) + torch.norm(b.T @ b - eye)
    return total / (2 * len(pairs))


def mask_gradients(pairs: list[tuple], k: int, draw: random.Random) -> None:
    """Sets the gradients of all but k random rank directions of each module to 0."""
    for a, b in pairs:
        for direction in draw.sample(range(a.shape[0]), a.shape[0] - k):
            a.grad[direction] = 0
            b.grad[:, direction] = 0


def random_batch(entry: Entry, batch: int, dtype, device: str) -> dict[str, Any]:
    """What the model of transformers is called with; no padding."""
    import torch  # pyright: ignore[reportMissingImports]

    c = entry.config
    labels = torch.randint(CLASSES, (batch,), device=device)
    if entry.length is None:
        shape = (batch, c.num_channels, c.image_size, c.image_size)
        return {"pixel_values": torch.randn(shape, dtype=dtype, device=device), "labels": labels}
    ids = torch.randint(2, c.vocab_size, (batch, entry.length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
