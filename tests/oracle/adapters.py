"""What PEFT makes of adapters. Run by the python of ``oracle.py``.

python adapters.py open BASE ADAPTER LABELS INPUTS.npz OUTPUTS.npz
python adapters.py train BASE ADAPTER LABELS INPUTS.npz OUTPUTS.npz OUT [JSON of LoraConfig]

BASE and ADAPTER are folders, INPUTS what the model is called with. ``open`` writes the logits of
the base (with a new head, where it has another number of labels) and of the adapter on it.
``train`` takes six steps of AdamW from the adapter, or with a LoraConfig (ADAPTER is then not
read) from new factors, writes the adapter that it ends with into OUT, and its logits.
"""

import json
import sys
import warnings

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification


def opened(folder: str, labels: int, images: bool):
    kind = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    return kind.from_pretrained(
        folder, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    ).eval()


def logits(model, inputs) -> np.ndarray:
    more = {}
    if "pixel_values" in inputs:
        resized = inputs["pixel_values"].shape[-1] != model.config.image_size
        more = {"interpolate_pos_encoding": resized}
    with torch.no_grad():
        parts = []
        for start in range(0, len(next(iter(inputs.values()))), 250):
            batch = {name: values[start : start + 250] for name, values in inputs.items()}
            parts.append(model(**batch, **more).logits.numpy())
    return np.concatenate(parts)


def main(what, base, adapter, labels, given, made, out=None, config=None) -> None:
    inputs = {name: torch.from_numpy(values) for name, values in np.load(given).items()}
    images = "pixel_values" in inputs
    torch.manual_seed(0)
    plain = opened(base, int(labels), images)
    found = {"base": logits(plain, inputs)}
    if config is not None:
        model = get_peft_model(plain, LoraConfig(**json.loads(config))).eval()
    else:
        with warnings.catch_warnings():
            # PEFT only warns of tensors that it does not find.
            warnings.simplefilter("error", UserWarning)
            model = PeftModel.from_pretrained(plain, adapter, is_trainable=what == "train").eval()
    if what == "train":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        targets = torch.arange(len(next(iter(inputs.values())))) % int(labels)
        for _ in range(6):
            torch.nn.functional.cross_entropy(model(**inputs).logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(out)
    np.savez(made, logits=logits(model, inputs), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
