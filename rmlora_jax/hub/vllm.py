"""What the loader of adapters in vLLM cannot take.

It reads one rank and one alpha for all modules. Sources: ``vllm/lora/peft_helper.py``,
``vllm/lora/lora_model.py`` and ``embedding_modules`` of the classes in
``vllm/model_executor/models`` (https://github.com/vllm-project/vllm).
"""

from collections.abc import Iterable
from pathlib import Path

from rmlora_jax.hub.peft_config import read_config
from rmlora_jax.hub.peft_stored import ROWS, UNDER, open_tensors, plain_name
from rmlora_jax.models.family import Family

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
EMBEDS = ("LlamaForCausalLM", "MistralForCausalLM")  # classes that adapt embeddings and heads


def vllm_obstacles(folder: str | Path, family: Family) -> list[str]:
    """Why vLLM cannot use the adapter in a folder as it is, in words; empty where it can.

    Args:
      folder: an adapter in PEFT's format.
      family: of its base. Of other models than language models nothing is said.
    """
    if family.outputs is None:
        return []
    config = read_config(Path(folder))
    names = [plain_name(key) for key in open_tensors(Path(folder))]
    modules = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    found = []
    if config.description.form.peft_fields:
        found.append(f"it is of {config.description.__name__}")
    whole = [n for n in names if ".lora_" not in n and not n.endswith((ROWS, UNDER))]
    if whole:
        found.append(f"it has whole weights ({whole[0]})")
    if any(name.endswith(ROWS) for name in names):
        found.append("it has trained rows of tokens")
    ranks = {module: config.rank_of(module) for module in modules}
    if (most := max(ranks.values(), default=1)) > RANKS[-1]:
        found.append(f"it has rank {most}, above {RANKS[-1]}")
    usual = config.scale_of("", config.r)
    other = sorted(m for m, rank in ranks.items() if config.scale_of(m, rank) != usual)
    if other:
        found.append(f"alpha / r is not the same everywhere ({other[0]})")
    ends = {module.rpartition(".")[2] for module in modules} & {"embed_tokens", "lm_head"}
    if ends and family.classifier not in EMBEDS:
        found.append(f"it has factors of {' and '.join(sorted(ends))}, which vLLM does not adapt "
                     f"in {family.classifier}")
    return found


def vllm_rank(ranks: Iterable[int]) -> int:
    """The least ``--max-lora-rank`` that takes these ranks.

    >>> vllm_rank([4, 12]), vllm_rank([8])
    (16, 8)
    """
    most = max(ranks)
    return next((rank for rank in RANKS if rank >= most), RANKS[-1])
