"""The loss of texts that a model continues: which tokens are to be predicted, and what is measured.

A batch holds rows of tokens. One row may hold several examples, its segments; a token is predicted
from the earlier tokens of its own segment alone. The model returns losses, not logits: logits of
all tokens would not fit in memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rmlora_jax.tasks.task import Objective

METRICS = ("loss", "token_accuracy", "perplexity")  # the first picks the best step


def shifted(batch: dict, packed: bool = True) -> tuple[tuple, Any]:
    """The arguments of the model's ``losses``, and the labels of `objective`.

    Place i of a row is to predict token i + 1, where that is wanted and of the same segment.

    Args:
      batch: "tokens" int32 (B, L); "wanted" bool (B, L), the tokens that the loss is over;
        "segments" int32 (B, L), 0 for padding; "positions" int32 (B, L), counted in each segment.
      packed: False where a row is one example with its padding behind it: causal attention then
        needs neither segments nor positions.

    >>> row = {"tokens": [5, 6, 7, 8, 0], "wanted": [0, 1, 0, 1, 0], "segments": [1, 1, 2, 2, 0],
    ...        "positions": [0, 1, 0, 1, 0]}
    >>> (_, targets, weights, *_), _ = shifted({k: jnp.array([v]) for k, v in row.items()})
    >>> targets.tolist(), weights.tolist()
    ([[6, 7, 8, 0, 0]], [[1.0, 0.0, 1.0, 0.0, 0.0]])
    """
    tokens, segments = batch["tokens"], batch["segments"]

    def following(x):
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    same = (following(segments) == segments) & (segments > 0)
    weights = (following(batch["wanted"]).astype(bool) & same).astype(jnp.float32)
    inputs = (tokens, following(tokens), weights)
    if packed:
        inputs += (batch["positions"], segments)
    return inputs, (weights, (segments > 0).sum(-1).astype(jnp.float32))


def objective() -> Objective:
    """Cross-entropy in nats of each target token: mean over the targets of the global batch.

    The labels are (weights (B, L), tokens that are not padding (B,)), see `shifted`. A step logs
    ``token_accuracy``, the fraction of targets whose most probable token is right; ``tokens``, how
    many tokens there are without padding; ``padding``, the fraction of the places that are padding.
    """

    # What the model finds of each token is 0 and False where there is no target.
    def loss(call, labels):
        weights, lengths = labels
        total, found = call(method="losses")
        counts = {
            "token_accuracy": found["correct"].sum(dtype=jnp.float32),
            "tokens": lengths.sum(),
            "places": jnp.float32(weights.size),
        }
        return total, weights.sum(), counts

    def predict(call, labels):
        weights, _ = labels
        _, found = call(method="losses")
        return {
            "loss": found["loss"].sum(-1),
            "weight": weights.sum(-1),
            "token_accuracy": found["correct"].sum(-1, dtype=jnp.float32),
        }

    return Objective(loss, predict, means)


def means(sums: dict[str, jax.Array], weight: Any) -> dict[str, jax.Array]:
    """The metrics of a step from its sums, see `objective`."""
    return {
        "token_accuracy": sums["token_accuracy"] / weight,
        "tokens": sums["tokens"],
        "padding": 1 - sums["tokens"] / sums["places"],
    }
