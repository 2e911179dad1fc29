"""DeBERTa-v2's and v3's names in Hugging Face files."""

from rmlora_jax.hub.bert import NEW, linear, norm
from rmlora_jax.hub.weights import AS_IS, LINEAR, Entry
from rmlora_jax.models.deberta import Deberta
from rmlora_jax.models.deberta_config import DebertaConfig
from rmlora_jax.models.family import Family

_EMBEDDINGS = "deberta.embeddings"
_ENCODER = "deberta.encoder"
_LAYER = "deberta.encoder.layer.{}"

# PyTorch's Conv1d keeps (out, in, width).
_CONV1D = (2, 1, 0)

DEBERTA = Family(
    config=DebertaConfig,
    model=Deberta,
    classifier="DebertaV2ForSequenceClassification",
    prefix="deberta.",
    table=(
        *(
            Entry(f"embed/{path}/embedding", AS_IS, (f"{_EMBEDDINGS}.{path}_embeddings.weight",))
            for path in ("word", "position", "token_type")
        ),
        Entry("embed/project/kernel", LINEAR, (f"{_EMBEDDINGS}.embed_proj.weight",)),
        *norm("embed/norm", f"{_EMBEDDINGS}.LayerNorm"),
        Entry("encoder/relative/embedding", AS_IS, (f"{_ENCODER}.rel_embeddings.weight",)),
        *norm("encoder/relative_norm", f"{_ENCODER}.LayerNorm"),
        Entry("encoder/conv/conv/kernel", _CONV1D, (f"{_ENCODER}.conv.conv.weight",)),
        Entry("encoder/conv/conv/bias", AS_IS, (f"{_ENCODER}.conv.conv.bias",)),
        *norm("encoder/conv/norm", f"{_ENCODER}.conv.LayerNorm"),
        *(
            entry
            for name in ("query", "key", "value", "pos_key", "pos_query")
            for entry in linear(
                f"encoder/layers/attention/{name}", f"{_LAYER}.attention.self.{name}_proj"
            )
        ),
        *linear("encoder/layers/attention/out", f"{_LAYER}.attention.output.dense"),
        *norm("encoder/layers/norm1", f"{_LAYER}.attention.output.LayerNorm"),
        *linear("encoder/layers/mlp/fc1", f"{_LAYER}.intermediate.dense"),
        *linear("encoder/layers/mlp/fc2", f"{_LAYER}.output.dense"),
        *norm("encoder/layers/norm2", f"{_LAYER}.output.LayerNorm"),
        *linear("pooler", "pooler.dense"),
        *linear("head", "classifier"),
    ),
    new=NEW,
    # Masked-language and replaced-token heads, the absolute positions that only the former's
    # decoder saw, and what mDeBERTa added to the words while it was pre-trained.
    leftovers=(
        r"(lm_predictions|mask_predictions|cls)\..*",
        r"(deberta\.)?embeddings\.(position_ids|position_embeddings\.weight)",
        r"(deberta\.)?embeddings\.word_embeddings\._weight",
    ),
)
