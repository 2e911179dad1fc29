"""What PyTorch and transformers make of models' folders. Run by the python of ``oracle.py``.

python logits.py FOLDER INPUTS.npz OUTPUTS.npz [FOLDER INPUTS.npz OUTPUTS.npz ...]

INPUTS holds what the model is called with: ``pixel_values`` (B, C, H, W) float32, or ``input_ids``
and its companions (B, N). An ``image`` (H, W, 3) uint8 is brought to pixels by the folder's own
image processor, a ``text`` to tokens by its own tokenizer. OUTPUTS gets ``logits`` (B, labels), the
inputs so made, ``labels`` and ``architecture``. Tensors that are missing, left over or misshapen
are an error, and so is a model that is not opened in float32.
"""

import sys

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


def outputs(folder: str, inputs: dict) -> dict:
    made = {}
    if "image" in inputs:
        made = AutoImageProcessor.from_pretrained(folder)(inputs.pop("image"), return_tensors="np")
    if "text" in inputs:
        made = AutoTokenizer.from_pretrained(folder)(str(inputs.pop("text")), return_tensors="np")
    made = {name: np.asarray(values) for name, values in made.items()}
    batch = {name: torch.from_numpy(values) for name, values in (inputs | made).items()}

    images = "pixel_values" in batch
    kind = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"{folder}: tensors that do not fit: {info}"
    assert {x.dtype for x in model.parameters()} == {torch.float32}, f"{folder}: not float32"
    with torch.no_grad():
        logits = model.eval()(**batch).logits.numpy()
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return made | {"logits": logits, "labels": labels, "architecture": type(model).__name__}


def main(arguments: list[str]) -> None:
    for folder, given, made in zip(*[iter(arguments)] * 3, strict=True):
        np.savez(made, **outputs(folder, dict(np.load(given))))


if __name__ == "__main__":
    main(sys.argv[1:])
