"""Rows of a study as plausible runs would leave them, from formulas and a seed."""

import numpy as np

# method -> test accuracy on cifar100, Matthews on cola, accuracy on rte; effective rank; parameters
METHODS = {
    "full": (0.655, 0.304, 0.576, None, 22_700_000),
    "head": (0.437, 0.068, 0.494, None, 19_300),
    "lora": (0.592, 0.280, 0.546, 3.84, 185_188),
    "adalora": (0.585, 0.276, 0.541, 3.60, 185_188),
    "sora": (0.588, 0.271, 0.549, 3.52, 184_000),
    "reg_only": (0.584, 0.270, 0.550, 3.95, 185_188),
    "mask_only": (0.589, 0.282, 0.552, 3.88, 185_188),
    "rm_lora": (0.581, 0.268, 0.552, 3.97, 185_188),
}
RANKS = {"adalora": 6, "sora": 8, "head": None, "full": None}  # most that Delta W could have
TASKS = {  # data set, metric, spread of seeds, column above
    "cifar100": ("cifar100", "accuracy", 0.004, 0),
    "cola": ("glue/cola", "matthews", 0.022, 1),
    "rte": ("glue/rte", "accuracy", 0.018, 2),
}


def row(task="cifar100", method="lora", seed=0, *, stage="final", rate=1e-3, settings=None,
        variant=None, shift=0.0, rank=None, study="paper_table", steps=2000, speed=8.0, layers=12,
        trajectory=True, **more):
    """One row; ``shift`` is added to its metric, ``speed`` is how fast it learns."""
    dataset, metric, noise, column = TASKS[task]
    name = f"{study} {task} {method} {stage} {seed} {rate} {settings} {variant} {shift} {speed}"
    rng = np.random.default_rng(sum(map(ord, name)) + 1000 * seed)
    base, trained = METHODS[method][column] + shift, METHODS[method][4]
    test = base + noise * rng.standard_normal()
    ranks = METHODS[method][3] if rank is None else rank
    at = np.linspace(steps / 10, steps, 10).astype(int)
    rise = 1 - np.exp(-speed * at / steps)
    wobble = noise * rng.standard_normal((4, 10)) / 2
    gap = 0.25 if method == "full" else 0.02 if method == "head" else 0.1
    train = None if metric == "matthews" else test * rise + gap * rise**3 + wobble[0]
    curve = {
        "step": at.tolist(),
        "train": [None] * 10 if train is None else train.round(5).tolist(),
        "train_loss": (3 * (1 - (test + gap) * rise) + wobble[1]).round(5).tolist(),
        "validation": (test * rise + wobble[2]).round(5).tolist(),
        "validation_loss": (3 * (1 - test * rise) + wobble[3]).round(5).tolist(),
        "test": [None] * 10, "test_loss": [None] * 10,
    }
    found = path = None
    if ranks is not None:
        depth = np.linspace(0, 0.5, layers)
        over = [(ranks - 0.7 * np.exp(-5 * a / steps) - depth * (4 - ranks)).clip(1, 4)
                for a in at]
        found = {"step": at.tolist(),
                 "effective_rank": [(o + 0.02 * rng.random(layers)).round(4).tolist()
                                    for o in over]}
        reach = 10 + 6 * (ranks - 3.5) * (np.arange(1, 10)) + rng.random(9)
        path = {"step": at[1:].tolist(), "effective_rank": reach.round(4).tolist(),
                "numerical_rank": (8.0 * np.arange(1, 10)).tolist(),
                "bound": (8.0 * np.arange(1, 10)).tolist(), "layers": [9.0] * layers}
    return {
        "key": name, "study": study, "task": task, "stage": stage,
        "variant": dict(variant or {}), "settings": {"learning_rate": rate} | (settings or {}),
        "device": "NVIDIA H100", "jax": "0.11.2", "dataset": dataset,
        "model": "all-MiniLM-L6-v2" if column else "vit-tiny-patch8-64-tinyimagenet",
        "method": method, "seed": seed, "data_seed": 0, "metric": metric,
        "validation": curve["validation"][-1], "test": round(test, 5),
        "test_best": round(test + 0.001, 5), "test_loss": round(3 * (1 - test), 5),
        "validation_loss": curve["validation_loss"][-1], "train_loss": curve["train_loss"][-1],
        "train": curve["train"][-1], "steps": steps, "batch_size": 64, "rank": RANKS.get(method, 4),
        "classes": 0,
        "effective_rank": None if ranks is None else ranks + 0.01 * rng.standard_normal(),
        "effective_rank_modules": {}, "trainable_parameters": trained,
        "total_parameters": 23_000_000, "factor_parameters": trained - 19_300,
        "head_parameters": 19_300,
        "seconds": 20 + 5 * rng.random(), "together": 5, "peak_memory_bytes": 3 * 2**30,
        "curve": curve, "layers": found, "trajectory": path if trajectory else None,
    } | more


def paper_table(tasks=TASKS, methods=METHODS, seeds=5):
    rows = []
    for task in tasks:
        for method in methods:
            rows += [row(task, method, 100 + s, stage="choose", rate=rate)
                     for rate in (3e-4, 1e-3, 3e-3) for s in range(2)]
            rows += [row(task, method, s) for s in range(seeds)]
    return rows


def grid(tasks=("cifar100", "cola"), seeds=3):
    return [
        row(task, "rm_lora", seed, settings={"keep": keep, "penalty": penalty},
            shift=0.02 * keep - 0.03 * penalty**0.5 + 0.02 * keep * penalty, study="ablation_grid")
        for task in tasks for penalty in (0.0, 0.01, 0.1, 0.3, 1.0)
        for keep in (0.125, 0.25, 0.5, 0.75, 1.0) for seed in range(seeds)
    ]


def frequency(tasks=("cifar100", "cola"), seeds=3):
    variants = [({}, 0.0, 6.0), ({"rm.resample_every": "10"}, 0.002, 6.5),
                ({"rm.resample_every": "100"}, -0.004, 5.0),
                ({"rm.resample_every": "1000000000"}, -0.03, 4.0),
                ({"rm.start_step": "100"}, 0.001, 6.5), ({"rm.start_step": "500"}, 0.004, 7.5),
                ({"rm.start_step": "1000000000"}, 0.011, 8.0)]
    return [row(task, "rm_lora", seed, variant=v, shift=shift, speed=speed, steps=4000,
                study="ablation_frequency")
            for task in tasks for v, shift, speed in variants for seed in range(seeds)]


def classes(seeds=3):
    return [row("cifar100", method, seed, variant={"data.classes": str(n)}, classes=n,
                rank=3.97 - 0.6 / (n / 5) - (0.1 if method == "lora" else 0), shift=3 / n,
                study="intrinsic_classes")
            for n in (10, 20, 50, 100) for method in ("lora", "rm_lora") for seed in range(seeds)]
