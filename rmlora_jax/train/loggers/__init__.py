"""Where the numbers of a run are shown as curves, beside ``metrics.jsonl``: one file a logger."""

from rmlora_jax.train.loggers import tensorboard, weights_and_biases
from rmlora_jax.train.loggers.logger import Logger, Opened

__all__ = ["LOGGERS", "Logger", "Opened"]

LOGGERS: dict[str, Logger] = {
    "tensorboard": tensorboard.LOGGER,
    "wandb": weights_and_biases.LOGGER,
    "none": Logger("metrics.jsonl alone, which is always written"),
}
