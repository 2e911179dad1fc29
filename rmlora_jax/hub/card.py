"""README.md of a trained model's folder: what it is, how well it does, and how it is opened."""

import json
from collections.abc import Mapping
from typing import Any

from rmlora_jax.hub.info import Info
from rmlora_jax.hub.peft_names import Base
from rmlora_jax.hub.source import CONFIG, PACKAGED, bundled, read_json
from rmlora_jax.hub.text import PretrainedText
from rmlora_jax.models.vit_config import ViTConfig

PIPELINES = {
    "image_classification": "image-classification",
    "text_classification": "text-classification",
    "text_regression": "text-classification",
}


def adapter_card(config: Mapping[str, Any], base: Base, info: Info | None, old_names: bool) -> str:
    """The card of an adapter with this adapter_config.json."""
    labels = base.num_labels
    auto = "AutoModelForSequenceClassification"
    if not isinstance(base, PretrainedText):
        auto = "AutoModelForImageClassification"
    more = "" if isinstance(base, PretrainedText) else ", ignore_mismatched_sizes=True"
    torch = f"""from peft import PeftModel
from transformers import {auto}
base = {auto}.from_pretrained("{base.source}", num_labels={labels}{more}, dtype="float32")
model = PeftModel.from_pretrained(base, "FOLDER").eval()"""
    versions = ""
    if not isinstance(base, PretrainedText):
        which = "up to 5.8" if old_names else "5.9 or later"
        versions = (
            f"\n\nThe names in it are those of transformers {which}; other releases may find no "
            "layer of that name. `save_peft(..., old_names=...)` writes either."
        )
        own = ViTConfig.from_hf(read_json(base.folder / CONFIG)).image_size
        if own != base.image_size:
            versions += f"\n\nIt was trained on images of {base.image_size} pixels: call the " \
                        "model with `interpolate_pos_encoding=True`."
    text = [
        _front({"library_name": "peft", "base_model": base.source,
                **({"pipeline_tag": PIPELINES[info.task]} if info else {})}),
        f"# Adapter of {base.source}",
        f"Low-rank factors (rank {config['r']}, alpha {config['lora_alpha']}) for "
        f"{', '.join(config['target_modules'])}"
        + (f"; trained as a whole: {', '.join(config['modules_to_save'])}."
           if config["modules_to_save"] else "."),
        *_about(info),
        "## Use",
        "In JAX, with `rmlora_jax`:",
        _code("import rmlora_jax.hub\n\nmodel = rmlora_jax.hub.load(\"FOLDER\")\n"
              f"print(model([{_example(info)}]))"),
        "In PyTorch, with `peft`:",
        _code(torch) + _where(base) + versions,
        *_config(info),
    ]
    return "\n\n".join(text) + "\n"


def model_card(base: Base, info: Info) -> str:
    """The card of a whole model."""
    auto = "AutoModelForSequenceClassification"
    if info.is_image:
        auto = "AutoModelForImageClassification"
    text = [
        _front({"library_name": "transformers", "base_model": base.source,
                "pipeline_tag": PIPELINES[info.task]}),
        f"# {base.source}, fine-tuned",
        *_about(info),
        "## Use",
        "In PyTorch, with `transformers`:",
        _code(f"from transformers import {auto}\n\n"
              f"model = {auto}.from_pretrained(\"FOLDER\").eval()"),
        "In JAX, with `rmlora_jax`:",
        _code("import rmlora_jax.hub\n\nmodel = rmlora_jax.hub.load(\"FOLDER\")\n"
              f"print(model([{_example(info)}]))"),
        *_config(info),
    ]
    return "\n\n".join(text) + "\n"


def _where(base: Base) -> str:
    """How to find a base that is on no hub."""
    if base.source not in (*bundled(), *PACKAGED):
        return ""
    find = f"from rmlora_jax.hub import find_folder; print(find_folder('{base.source}'))"
    return f"\n\nThe base is no name on a hub: give the folder that `python -c \"{find}\"` prints."


def _about(info: Info | None) -> list[str]:
    """Data, method, classes and figures, as far as they are known."""
    if info is None:
        return []
    facts = [f"* {name}: {info.about[name]}" for name in ("data", "method", "step")
             if name in info.about]
    if info.labels:
        shown = ", ".join(info.labels[:20])
        facts.append(f"* classes: {shown}" + (", ..." if len(info.labels) > 20 else ""))
    figures = info.about.get("metrics") or {}
    rows = [f"| {name} | {value:.4f} |" for name, value in figures.items()
            if isinstance(value, float)]
    table = ["| on test data | |\n|---|---|\n" + "\n".join(rows)] if rows else []
    return ["\n".join(facts), *table]


def _config(info: Info | None) -> list[str]:
    if info is None or "config" not in info.about:
        return []
    return ["## Config of the run", _code(json.dumps(info.about["config"], indent=1), "json")]


def _example(info: Info | None) -> str:
    if info is None or info.is_image:
        return '"photo.jpg"'
    return '"a text"' if len(info.columns) == 1 else '("a text", "another")'


def _front(fields: Mapping[str, str]) -> str:
    """What model hubs read, in YAML; JSON's strings are strings there."""
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in fields.items()), "---"])


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"
