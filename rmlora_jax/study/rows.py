"""One row a run: everything that a table or a picture needs, in a file of JSON lines.

A row is written once its run is finished. A last line that is half written is dropped, and its
run's row written again.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rmlora_jax as rm
from rmlora_jax.files import plain, read_json, read_json_lines, write_text_atomic
from rmlora_jax.methods import description
from rmlora_jax.report.records import (
    by_kind,
    effective_ranks,
    read_intrinsic,
    read_metrics,
    read_summary,
)
from rmlora_jax.train.checkpoint import read_snapshots
from rmlora_jax.train.config import read_config

ROWS = "rows.jsonl"
MOST_TIMES = 12  # times at which a row keeps the effective rank of every layer
MOST_SNAPSHOTS = 16  # of which the trajectory is computed, evenly over the run


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a file, each key once, without a last line that is half written.

    Raises:
      UserError: a line other than the last is not a row.
    """
    found = {}
    for row in read_json_lines(path, "key", str, "is not the row of a run; delete it"):
        found.setdefault(row["key"], row)
    return list(found.values())


def append_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds the rows whose key the file does not have; it is written anew as a whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {row["key"]: row for row in read_rows(path)}
    for row in rows:
        whole.setdefault(row["key"], plain(row))
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in whole.values()]
    write_text_atomic(path, "".join(lines))


def row_of(folder: Path, **known: Any) -> dict[str, Any]:
    """The row of a finished run, from its folder, after what is ``known`` already.

    ``validation`` and ``test`` are the values of ``metric`` at the last step, ``test_best`` that at
    the step with the best validation; ``rank`` is the most that Delta W could have. The parameters
    of factors (whatever is not the head) and head are those at the end, without closed directions;
    ``seconds`` is the run's share of the training steps of its program.
    """
    config, summary = read_json(folder / "config.json"), read_summary(folder)
    metric, steps, rate = summary["metric"], summary["steps"], summary.get("examples_per_second")
    curve = curve_of(read_metrics(folder), metric)
    alone = steps * config["batch_size"] / rate if rate else summary.get("wall_seconds")
    ranks = effective_ranks(summary)
    widths = [np.shape(m["singular_values"])[-1] for m in summary["intrinsic_dimension"].values()]
    return known | {
        "dataset": summary["dataset"],
        "model": Path(summary["model"]).name,
        "seed": config["seed"],
        "data_seed": config["seed"] if config["data"]["seed"] is None else config["data"]["seed"],
        "metric": metric,
        "validation": _last(curve["validation"]),
        "test": summary["test"][metric],
        "test_best": summary["test_best"][metric],
        "test_loss": summary["test"]["loss"],
        "validation_loss": _last(curve["validation_loss"]),
        "train_loss": _last(curve["train_loss"]),
        "train": _last(curve["train"]),
        "steps": steps,
        "batch_size": config["batch_size"],
        "rank": max(widths, default=None),
        "classes": config["data"]["classes"],
        "effective_rank": float(np.mean(ranks)) if ranks.size else None,
        "effective_rank_modules": {
            name: round(float(np.mean(m["effective_rank"])), 4)
            for name, m in summary["intrinsic_dimension"].items()
        },
        "trainable_parameters": summary["trainable_parameters"],
        "total_parameters": summary["total_parameters"],
        "factor_parameters": summary["final_parameters"]["factors"],
        "head_parameters": summary["final_parameters"]["head"],
        "seconds": summary.get("train_seconds", alone),
        "together": summary.get("sweep", 1),
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "curve": curve,
        "layers": layers_of(folder),
        "trajectory": trajectory(folder),
    }


def curve_of(history: list[dict], metric: str) -> dict[str, list]:
    """Loss and metric at every evaluation: on training the mean of the lines since the one before,
    None where the run does not evaluate a split on its way."""
    keys = {"validation": f"validation/{metric}", "validation_loss": "validation/loss",
            "test": f"test/{metric}", "test_loss": "test/loss"}
    curve = {name: [] for name in ("step", "train", "train_loss", *keys)}
    since = []
    for row in history:
        since.append(row)
        if "validation/loss" not in row:
            continue
        curve["step"].append(row["step"])
        for name, key in keys.items():
            curve[name].append(_finite(row.get(key)))
        for name, key in (("train", f"train/{metric}"), ("train_loss", "train/loss")):
            values = [r[key] for r in since if r.get(key) is not None]
            curve[name].append(_finite(np.mean(values)) if values else None)
        since = []
    return curve


def layers_of(folder: Path) -> dict[str, list] | None:
    """Effective ranks over time: ``{"step": [T], "effective_rank": [T][layers]}``, means over the
    kinds of modules of a layer; None for methods without factors."""
    records = [record for record in read_intrinsic(folder) if record["modules"]]
    if not records:
        return None
    found = {"step": [], "effective_rank": []}
    for record in _evenly(records, MOST_TIMES):
        kinds = [kind["effective_rank"] for kind in by_kind(record["modules"]).values()]
        found["step"].append(record["step"])
        found["effective_rank"].append(_by_layer(kinds))
    return found


def trajectory(folder: Path) -> dict[str, list] | None:
    """Of the snapshots up to each step, means over all modules and layers:

    ``{"step": [K], "effective_rank": [K], "numerical_rank": [K], "bound": [K], "layers": [L]}``,
    with ``bound`` the most that either could be and ``layers`` the effective rank of each layer at
    the end. None where the run left fewer than two snapshots.
    """
    taken = read_snapshots(folder)
    if len(taken) < 2:
        return None
    own = description(read_config(folder))
    # A snapshot of AdaLoRA or SoRA has its diagonal in A: to plain factors a plain description.
    lora = rm.LoRA(**{f.name: getattr(own, f.name) for f in dataclasses.fields(rm.LoRA)})
    taken = _evenly(taken, MOST_SNAPSHOTS)
    found = {"step": [], "effective_rank": [], "numerical_rank": [], "bound": []}
    modules = {}
    for count in range(2, len(taken) + 1):
        modules = dimension([tree for _, tree in taken[:count]], lora)
        found["step"].append(taken[count - 1][0])
        for name in ("effective_rank", "numerical_rank"):
            values = np.concatenate([np.ravel(m[name]) for m in modules.values()])
            found[name].append(round(float(values.mean()), 4))
        bounds = [m["singular_values"].shape[-1] for m in modules.values()]
        found["bound"].append(round(float(np.mean(bounds)), 4))
    layers = _by_layer([np.ravel(m["effective_rank"]) for m in modules.values()])
    return found | {"layers": layers}


def _by_layer(kinds: list[np.ndarray]) -> list[float]:
    """The mean of each layer over those kinds of modules that are in every layer."""
    deepest = max(map(len, kinds))
    means = np.mean([ranks for ranks in kinds if len(ranks) == deepest], axis=0)
    return [round(float(mean), 4) for mean in means]


def dimension(factors: list[dict], lora: rm.LoRA) -> dict[str, dict[str, jax.Array]]:
    """`rmlora_jax.trajectory_dimension` of trees that hold factors alone."""
    return rm.trajectory_dimension([_with_weights(tree, lora) for tree in factors], lora)


def _with_weights(tree: dict, lora: rm.LoRA) -> dict:
    """The tree with a weight of zeros, which takes no memory, beside every pair of factors."""
    whole = {name: _with_weights(below, lora) for name, below in tree.items()
             if isinstance(below, dict)}
    if "lora_a" not in tree:
        return whole
    a, b = tree["lora_a"], tree["lora_b"]
    weight = np.broadcast_to(np.float32(0), (*a.shape[:-1], b.shape[-1]))
    return whole | {"lora_a": a, "lora_b": b, lora.weights[0]: weight}


def _evenly(items: list, most: int) -> list:
    """At most ``most`` of the items, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def _finite(value) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _last(values: list):
    return values[-1] if values else None
