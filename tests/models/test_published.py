"""config.json of published checkpoints: read; what would change the computation: refused."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures.published import CHECKPOINTS

from rmlora_jax.models import FAMILIES
from rmlora_jax.models.config import BOOKKEEPING
from rmlora_jax.models.decoder_families import DECODERS

ALL = [(family, name) for family, files in CHECKPOINTS.items() for name in files]
KINDS = {"bert": "bert", "roberta": "xlm-roberta", "deberta-v2": "deberta-v2", "vit": "vit"}


@pytest.mark.parametrize(("family", "name"), ALL)
def test_a_published_config_is_that_of_its_architecture(family, name):
    given = CHECKPOINTS[family][name]
    cls = FAMILIES[given["model_type"]].config
    read = cls.from_hf(given)
    fields = cls.__dataclass_fields__.keys() & given.keys()
    for field in fields - {"pos_att_type"}:
        assert getattr(read, field) == given[field], field
    # The rest is book-keeping: without it the architecture is the same.
    alone = {field: given[field] for field in fields}
    assert cls.from_hf(alone) == read


def test_eight_published_configs_a_family():
    assert CHECKPOINTS.keys() == KINDS.keys()
    assert min(map(len, CHECKPOINTS.values())) >= 8


# Fields that transformers' code reads although they are inert here, and where it reads them.
ELSEWHERE = {
    "pad_token_id",  # whose embedding is 0 or masked out
    *("problem_type", "num_labels"),  # the loss and the head
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),  # other outputs
    "chunk_size_feed_forward",  # the same sums in parts
    *("encoder_stride", "pooler_act", "pooler_output_size"),  # masked images; ViTModel's pooler
    *("legacy", "attention_head_size", "pooler_hidden_size"),  # another head; checked in from_hf
}


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - DECODERS.keys()))
def test_no_code_of_transformers_reads_an_inert_field(kind):
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("needs transformers")
    module = kind.replace("-", "_")
    code = Path(spec.origin).parent / "models" / module / f"modeling_{module}.py"
    pairs = re.findall(r'config\.(\w+)|config, "(\w+)"', code.read_text(encoding="utf-8"))
    read = {name for pair in pairs for name in pair if name}
    assert "layer_norm_eps" in read
    config = FAMILIES[kind].config
    assert read & {*BOOKKEEPING, *config.inert} <= ELSEWHERE
    # And what it reads is a field here, or refused where it asks for something.
    known = {*config.__dataclass_fields__, *BOOKKEEPING, *config.inert}
    for name in read - known - {"_attn_implementation"}:
        with pytest.raises(ValueError, match=name):
            config.from_hf({name: 5})


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (family, fields)
        for family in KINDS
        for fields in (
            {"hidden_act": "gelu_fast"},
            {"pruned_heads": {"0": [1]}},
            {"auto_map": {"AutoModel": "modeling.Model"}},
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            {"rope_theta": 10000.0},
            {"head_dim": 8},
        )
    ]
    + [
        (family, fields)
        for family in ("bert", "roberta")
        for fields in (
            {"position_embedding_type": "relative_key"},
            {"position_embedding_type": "relative_key_query"},
            {"is_decoder": True},
            {"is_encoder_decoder": True},
            {"add_cross_attention": True},
            {"embedding_size": 16},
            {"pooler_act": "gelu"},
        )
    ],
)
def test_what_changes_the_computation_is_refused_by_name(family, fields):
    given = next(iter(CHECKPOINTS[family].values())) | fields
    with pytest.raises(ValueError, match=next(iter(fields))):
        FAMILIES[given["model_type"]].config.from_hf(given)


@pytest.mark.parametrize("family", KINDS)
def test_the_epsilon_of_the_file_is_obeyed(family):
    given = next(iter(CHECKPOINTS[family].values())) | {"layer_norm_eps": 1e-3}
    assert FAMILIES[given["model_type"]].config.from_hf(given).layer_norm_eps == 1e-3
