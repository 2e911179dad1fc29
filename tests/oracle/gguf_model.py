"""What transformers makes of GGUF files. Run by the python of ``oracle.py``; it needs gguf, too.

python gguf_model.py FILE TEXTS.json TOKENS.npz OUT.json OUT.npz [weights]

TEXTS is a list of texts. OUT.json gets the tokens of each and the texts of these; SmolLM's
tokenizer also as it is in the published tokenizer.json, which cuts off digits first. TOKENS holds
``text`` (B, N), and ``prompt0``, ``prompt1``, ...: OUT.npz gets ``logits`` (B, N/STRIDE, V) of
every STRIDE-th place, ``greedy`` tokens (prompts, 64), and ``above``, by how much the logit of each
is above the second. With ``weights`` it also gets all parameters.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

STRIDE, NEW = 13, 64

torch.set_num_threads(1)  # more wait for each other where other tests run, too


def greedy(model, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, by how much the logit of each is above the second), (prompts, NEW), in one batch."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in prompts]).long()
    found, above, cache = [], [], None
    for _ in range(NEW):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        best = out.logits[:, -1].topk(2)
        cache, ids = out.past_key_values, best.indices[:, :1]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        found.append(best.indices[:, 0])
        above.append(best.values[:, 0] - best.values[:, 1])
    return torch.stack(found, 1), torch.stack(above, 1)


@torch.no_grad()
def main(file: str, texts: str, tokens: str, spelled: str, made: str, *more: str) -> None:
    path = Path(file)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    rows = json.loads(Path(texts).read_text())
    ids = [tokenizer(row)["input_ids"] for row in rows]
    answer = {"ids": ids, "texts": [tokenizer.decode(row) for row in ids]}
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        answer["digits"] = [backend.encode(row).ids for row in rows]
    Path(spelled).write_text(json.dumps(answer))

    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    given = {name: torch.from_numpy(value).long() for name, value in np.load(tokens).items()}
    out = {"logits": model(given.pop("text")).logits[:, ::STRIDE].numpy()}
    out["greedy"], out["above"] = map(np.asarray, greedy(model, list(given.values())))
    if "weights" in more:
        out |= {f"weight:{name}": value.numpy() for name, value in model.state_dict().items()}
    np.savez(made, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
