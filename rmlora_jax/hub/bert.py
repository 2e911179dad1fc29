"""BERT's and RoBERTa's names in Hugging Face files."""

from rmlora_jax.hub.weights import AS_IS, LINEAR, Entry
from rmlora_jax.models.bert import Bert
from rmlora_jax.models.bert_config import BertConfig
from rmlora_jax.models.family import Family

# Modules of a layer: path here, name there, whether it is a norm.
_LAYER = (
    ("attention/query", "attention.self.query", False),
    ("attention/key", "attention.self.key", False),
    ("attention/value", "attention.self.value", False),
    ("attention/out", "attention.output.dense", False),
    ("norm1", "attention.output.LayerNorm", True),
    ("mlp/fc1", "intermediate.dense", False),
    ("mlp/fc2", "output.dense", False),
    ("norm2", "output.LayerNorm", True),
)


def linear(path: str, *names: str) -> tuple[Entry, Entry]:
    """Kernel and bias of a linear layer."""
    return (
        Entry(f"{path}/kernel", LINEAR, tuple(f"{name}.weight" for name in names)),
        Entry(f"{path}/bias", AS_IS, tuple(f"{name}.bias" for name in names)),
    )


def norm(path: str, *names: str) -> tuple[Entry, Entry]:
    """Scale and bias of a layer norm."""
    return (
        Entry(f"{path}/scale", AS_IS, tuple(f"{name}.weight" for name in names)),
        Entry(f"{path}/bias", AS_IS, tuple(f"{name}.bias" for name in names)),
    )


def encoder_table(prefix: str) -> tuple[Entry, ...]:
    """Embeddings and layers, whose names families of BERT's lineage share."""
    embeddings = f"{prefix}embeddings"
    return (
        *(
            Entry(f"embed/{path}/embedding", AS_IS, (f"{embeddings}.{path}_embeddings.weight",))
            for path in ("word", "position", "token_type")
        ),
        *norm("embed/norm", f"{embeddings}.LayerNorm"),
        *(
            entry
            for path, name, is_norm in _LAYER
            for entry in (norm if is_norm else linear)(
                f"encoder/layers/{path}", f"{prefix}encoder.layer.{{}}.{name}"
            )
        ),
    )


NEW = (r"pooler/.*", r"head/.*")

BERT = Family(
    config=BertConfig,
    model=Bert,
    classifier="BertForSequenceClassification",
    prefix="bert.",
    table=(
        *encoder_table("bert."),
        *linear("pooler", "bert.pooler.dense"),
        *linear("head", "classifier"),
    ),
    new=NEW,
    leftovers=(r"cls\..*", r"(bert\.)?embeddings\.position_ids"),
)

ROBERTA = Family(
    config=BertConfig,
    model=Bert,
    classifier="RobertaForSequenceClassification",
    prefix="roberta.",
    table=(
        *encoder_table("roberta."),
        *linear("pooler", "classifier.dense"),
        *linear("head", "classifier.out_proj"),
    ),
    new=NEW,
    # The pooler of the bare encoder is not what the classifier runs.
    leftovers=(
        r"lm_head\..*",
        r"(roberta\.)?pooler\.dense\.(weight|bias)",
        r"(roberta\.)?embeddings\.position_ids",
    ),
)
