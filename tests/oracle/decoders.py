"""What PyTorch makes of language models and their adapters. Run by the python of ``oracle.py``.

python decoders.py JOBS.json

JOBS is a list of objects; each names a model's folder (``base``) and a file of inputs (``inputs``,
.npz with ``input_ids``), and gets ``made``, a .npz with ``logits`` float32. Where it has
  * ``adapter``: that of PEFT's folder is put on the base. PEFT must find all that the folder has,
    and no more.
  * ``config``: new factors are made by a LoraConfig of these fields, all values of the adapter
    random, and written into ``out``. With ``save`` its arguments for save_pretrained.
  * ``dtype``: the model is opened in it; without it as transformers opens it.
  * ``tokens``: the vocabulary is first resized to this size.
  * ``tokenizer``: that of this folder makes ``ids`` of ``text``, and the vocabulary is first
    resized to hold all its tokens, as a user would.
  * ``targets`` in the inputs: the mean loss and the gradients of the factors' norm are added.
  * ``new``: so many tokens are generated greedily, ``tokens``.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Both say that embedding and head are one in the model, not what PEFT does not find.
KNOWN = ("tie_word_embeddings", "gradient_checkpointing", "ensure_weight_tying", "save_embedding")


def opened(folder: str, **dtype: str):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **dtype
    )
    found = {k: v for k, v in info.items() if v}
    assert not found, f"{folder}: tensors that do not fit: {found}"
    return model.eval()


def adapted(model, folder: str):
    """The adapter in a folder on a model; a tensor that one of them lacks is an error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    found = [str(w.message) for w in said if not any(word in str(w.message) for word in KNOWN)]
    assert not found, found
    inside = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    stored = load_file(f"{folder}/adapter_model.safetensors").keys()
    stored = {key for key in stored if not key.endswith("base_layer.weight")}
    assert set(inside) == stored, set(inside) ^ stored
    return model.eval()


def made_new(model, fields: dict, out: str, save: dict):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(out, **save)
    return model


def run(job: dict) -> None:
    inputs = dict(np.load(job["inputs"]))
    tokens = torch.from_numpy(inputs["input_ids"])
    model = opened(job["base"], **{key: job[key] for key in ("dtype",) if key in job})
    if "tokens" in job:
        model.resize_token_embeddings(job["tokens"], mean_resizing=False)
    if "tokenizer" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    if "config" in job:
        model = made_new(model, job["config"], job["out"], job.get("save", {}))
    elif "adapter" in job:
        model = adapted(model, job["adapter"])
    logits = model(tokens).logits
    found = {"logits": logits.detach().float().numpy(), "dtype": str(model.dtype)}
    if "tokenizer" in job:
        found["ids"] = tokenizer(job["text"])["input_ids"]
    if "targets" in inputs:
        targets = torch.from_numpy(inputs["targets"]).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        squares = [(value.grad**2).sum() for name, value in model.named_parameters()
                   if "lora_" in name and value.grad is not None]
        found |= {"loss": loss.item(), "norm": float(sum(squares)) ** 0.5}
    if "new" in job:
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            made = model.generate(tokens, max_new_tokens=job["new"], do_sample=False,
                                  pad_token_id=0)
        found["tokens"] = made[:, tokens.shape[1] :].numpy()
    np.savez(job["made"], **found)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
