"""What a trained model is for: ``rmlora.json`` for programs, README.md for people.

Both lie beside its weights.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmlora_jax import called
from rmlora_jax.errors import UserError
from rmlora_jax.files import read_object, write_json
from rmlora_jax.hub.pretrained import Pretrained
from rmlora_jax.hub.source import PACKAGED, bundled, split_revision
from rmlora_jax.hub.tied import grown_from, published
from rmlora_jax.hub.vllm import vllm_rank
from rmlora_jax.models.family import IMAGES, TEXTS, TOKENS, Inputs

FILE = "rmlora.json"
# What a model of each task is called with, and what a hub calls the task.
TASKS = {
    "image_classification": (IMAGES, "image-classification"),
    "text_classification": (TEXTS, "text-classification"),
    "text_regression": (TEXTS, "text-classification"),
    "sft": (TOKENS, "text-generation"),
}


@dataclasses.dataclass(frozen=True)
class Info:
    """What PEFT's own files do not say about a trained model.

    Attributes:
      task: a key of `TASKS`.
      labels: names of the classes; None where they are numbers, or for regression.
      image_size: side of the images in pixels; None is the base's own.
      stored_size: the middle square of an image is first resized to this side; None skips this.
      center: the part of the side that is then kept, in the middle, and resized to image_size.
      channels: 3, or 1 for images that are made gray.
      max_length: the most tokens that a text keeps.
      columns: names of the one or two texts of an example.
      dtype: the compute dtype of the model: "float32", "bfloat16" or "float16".
      resize: "processor": images are resized and cropped as the base's preprocessor_config.json
        says; "square": as ``stored_size`` and ``center`` say.
      template: of a language model, the chat template (Jinja) that it was trained with; "": none;
        None: the tokenizer's own.
      system: the first message of conversations without one of role system; "": none.
      about: what else a model card says: data, method, metrics, config. Any JSON.
    """

    task: str
    labels: tuple[str, ...] | None = None
    image_size: int | None = None
    stored_size: int | None = None
    center: float = 1.0
    channels: int = 3
    max_length: int = 128
    columns: tuple[str, ...] = ("text",)
    dtype: str = "float32"
    resize: str = "square"
    template: str | None = None
    system: str = ""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> Inputs:
        """What the model is called with."""
        return TASKS[self.task][0]

    @property
    def is_regression(self) -> bool:
        return self.task == "text_regression"

    @property
    def outputs(self) -> int | None:
        """Outputs of the model; None where they are not known."""
        if self.is_regression:
            return 1
        return len(self.labels) if self.labels else None

    def label(self, index: int) -> str:
        """The name of a class; its number where classes have no names."""
        return self.labels[index] if self.labels else str(index)


def write_info(folder: Path, info: Info) -> Path:
    """Writes ``rmlora.json`` into a folder."""
    fields = dataclasses.asdict(info)
    for name, usual in (("resize", "square"), ("template", None), ("system", "")):
        if fields[name] == usual:  # as in the files of earlier versions, which read this one, too
            del fields[name]
    return write_json(folder / FILE, fields)


def read_info(folder: Path) -> Info | None:
    """The `Info` in a folder; None where there is no rmlora.json.

    Raises:
      UserError: the file is damaged, or a field has a value that is not allowed.
    """
    path = folder / FILE
    if not path.exists():
        return None
    raw: dict[str, Any] = read_object(path)
    checks = {
        "task": lambda x: isinstance(x, str) and x in TASKS,
        "labels": lambda x: x is None or _strings(x, 1, 100_000),
        "image_size": lambda x: x is None or _count(x),
        "resize": lambda x: x in ("square", "processor"),
        "stored_size": lambda x: x is None or _count(x),
        "center": lambda x: type(x) in (int, float) and 0 < x <= 1,
        "channels": lambda x: x in (1, 3) and type(x) is int,
        "max_length": _count,
        "columns": lambda x: _strings(x, 1, 2),
        "dtype": lambda x: x in ("float32", "bfloat16", "float16"),
        "template": lambda x: x is None or isinstance(x, str),
        "system": lambda x: isinstance(x, str),
        "about": lambda x: isinstance(x, dict),
    }
    wrong = [name for name in raw if name not in checks or not checks[name](raw[name])]
    if "task" not in raw or wrong:
        raise UserError(f"{path}: {wrong[0] if wrong else 'task'} is missing, unknown or wrong; "
                        "copy the folder again")
    raw |= {k: tuple(raw[k]) for k in ("labels", "columns") if raw.get(k) is not None}
    return Info(**raw)


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def _strings(value: Any, least: int, most: int) -> bool:
    return (isinstance(value, list) and least <= len(value) <= most
            and all(isinstance(text, str) for text in value))


def check_fits(base: Pretrained, info: Info) -> None:
    """Raises a UserError unless ``base`` can be the model that ``info`` describes."""
    size, outputs = info.image_size, info.outputs
    if info.inputs is not base.family.inputs:
        wrong = f"it is a model of {base.family.inputs.name}; give the base that was trained"
    elif outputs not in (None, base.num_labels):
        wrong = f"it has {base.num_labels} outputs, but {outputs} are needed"
    elif size not in (None, base.image_size):
        wrong = (f"its images have {base.image_size} pixels, but {size} are needed; load it with "
                 f"image_size={size}")
    else:
        return
    raise UserError(f"{base.source} does not fit {info.task.replace('_', ' ')}: {wrong}")


def adapter_card(
    config: Mapping[str, Any],
    base: Pretrained,
    info: Info | None,
    old_names: bool,
    vllm: Sequence[str] = (),
) -> str:
    """The card of an adapter with this adapter_config.json; ``vllm``: why vLLM cannot load it."""
    auto = f"AutoModelFor{base.family.purpose}"
    name, revision = config["base_model_name_or_path"], config["revision"]
    which = f'"{name}", revision="{revision}"' if revision else f'"{name}"'
    writes = base.family.inputs is TOKENS
    new = f"num_labels={base.num_labels}, ignore_mismatched_sizes=True, "
    grown = f"base.resize_token_embeddings({base.num_labels})\n" * (grown_from(base) is not None)
    torch = f"""from peft import PeftModel
from transformers import {auto}
base = {auto}.from_pretrained(
    {which}, {"" if writes else new}dtype="float32"
)
{grown}model = PeftModel.from_pretrained(base, "FOLDER").eval()"""
    tokens = [f"{len(x)} tokens of {name}" for name, x in
              config.get("trainable_token_indices", {}).items()]
    whole = ", ".join([*(config["modules_to_save"] or ()), *tokens])
    facts = (
        f"Low-rank factors (rank {config['r']}, alpha {config['lora_alpha']}) for "
        f"{', '.join(config['target_modules'])}"
        + (f"; trained as a whole: {whole}." if whole else ".")
    )
    use = [*_in_jax(info), "In PyTorch, with `peft`:", _code(torch)]
    if writes:
        use += _in_vllm(config, which if revision else name, vllm)
    if base.source in (*bundled(), *PACKAGED):
        find = f"from rmlora_jax.hub import find_folder; print(find_folder('{base.source}'))"
        use.append("The hub does not know the base by this name: give the folder that "
                   f"`python -c \"{find}\"` prints.")
    if base.family.spellings > 1:
        which = "up to 5.8" if old_names else "5.9 or later"
        use.append(f"The names in it are those of transformers {which}; other releases may find "
                   "no layer of that name. `save_peft(..., old_names=...)` writes either.")
    if base.image_size is not None and published(base) != base.config:
        use.append(f"It was trained on images of {base.image_size} pixels: call the model with "
                   "`interpolate_pos_encoding=True`.")
    return _card("peft", f"Adapter of {base.source}", base, info, [facts], use)


def model_card(base: Pretrained, info: Info) -> str:
    """The card of a whole model."""
    auto = f"AutoModelFor{base.family.purpose}"
    torch = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(\"FOLDER\").eval()"
    use = ["In PyTorch, with `transformers`:", _code(torch), *_in_jax(info)]
    return _card("transformers", f"{base.source}, fine-tuned", base, info, [], use)


def _card(
    library: str, title: str, base: Pretrained, info: Info | None, text: list[str], use: list[str]
) -> str:
    """What model hubs read, in YAML; then what is known of data, method, classes and figures, the
    ``use``, and the config of the run."""
    fields = {"library_name": library, "base_model": split_revision(base.source)[0]}
    fields |= {"pipeline_tag": TASKS[info.task][1]} if info else {}
    about, labels = (info.about, info.labels or ()) if info else ({}, ())
    facts = [f"* {name}: {about[name]}" for name in ("data", "method", "step") if name in about]
    if labels:
        facts.append(f"* classes: {', '.join(labels[:20])}{', ...' * (len(labels) > 20)}")
    rows = [f"| {name} | {value:.4f} |" for name, value in (about.get("metrics") or {}).items()
            if isinstance(value, float)]
    # JSON's strings are strings in YAML.
    front = "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in fields.items()), "---"])
    parts = [front, f"# {title}", *text, "\n".join(facts)]
    if rows:
        parts.append("\n".join(["| on test data | |", "|---|---|", *rows]))
    parts += ["## Use", *use]
    if "config" in about:
        parts += ["## Config of the run", _code(json.dumps(about["config"], indent=1), "json")]
    return "\n\n".join(filter(None, parts)) + "\n"


def _in_jax(info: Info | None) -> list[str]:
    if info is not None and info.inputs is TOKENS:
        code = "import rmlora_jax.hub\n\nmodel = rmlora_jax.hub.load(\"FOLDER\")\n"
        return ["In JAX, with `rmlora_jax`:",
                _code(f'{code}print(model.generate(["What is 3 + 4?"])[0].text)')]
    example = '"photo.jpg"'
    if info is not None and info.inputs is TEXTS:
        example = '"a text"' if len(info.columns) == 1 else '("a text", "another")'
    code = "import rmlora_jax.hub\n\nmodel = rmlora_jax.hub.load(\"FOLDER\")\n"
    return ["In JAX, with `rmlora_jax`:", _code(f"{code}print(model([{example}]))")]


def _in_vllm(config: Mapping[str, Any], name: str, obstacles: Sequence[str]) -> list[str]:
    if obstacles:
        return [f"vLLM cannot use this adapter as it is: {'; '.join(obstacles)}. Merge it "
                f"(`{called.command('export', '--workdir=...')}`) and serve the whole model."]
    rank = vllm_rank([config["r"], *config["rank_pattern"].values()])
    command = (f"vllm serve {name} --enable-lora --max-lora-rank {rank} "
               "--lora-modules tuned=FOLDER")
    return ["In vLLM:", _code(command, "")]


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"
