"""Stored results and the tables made from them.

    python tests/results/tables.py add NAME WORKDIR...   # append finished runs to NAME.jsonl
    python tests/results/tables.py study WORKDIR...      # store the rows of studies, by their names
    python tests/results/tables.py                       # write the tables of configs/README.md
    python tests/results/tables.py pictures              # draw the studies' pictures to configs/
"""

import json
import statistics
import sys
from pathlib import Path

from rmlora_jax.bench import table as bench_table
from rmlora_jax.report import records
from rmlora_jax.report.style import markdown_table
from rmlora_jax.study import config as study_config
from rmlora_jax.study import rows as study_rows
from rmlora_jax.study import tables as study_tables
from rmlora_jax.study.pictures import draw

HERE = Path(__file__).parent
README = HERE.parent.parent / "configs" / "README.md"
# The shapes of a task -> the bench that timed a step of every method on them.
STEPS = {"cifar100": "h200_vit_tiny", "cola": "h100_minilm", "rte": "cpu_minilm"}
BEGIN, END = "<!-- table {name}: python tests/results/tables.py -->", "<!-- end -->"


def add(name: str, workdirs: list[str]) -> None:
    """Appends one line a run: what was asked, and what came out."""
    with open(HERE / f"{name}.jsonl", "a") as file:
        for workdir in map(Path, workdirs):
            config = json.loads((workdir / "config.json").read_text())
            summary = records.read_summary(workdir)
            if summary["task"] != "image_classification":
                file.write(json.dumps(text_row(workdir, config, summary)) + "\n")
                continue
            ranks = [
                rank
                for module in summary["intrinsic_dimension"].values()
                for rank in module["effective_rank"]
            ]
            row = {
                "method": summary["method"],
                "seed": config["seed"],
                "accuracy": summary["test"]["accuracy"],
                "loss": summary["test"]["loss"],
                "best_accuracy": summary["test_best"]["accuracy"],
                "effective_rank": statistics.mean(ranks) if ranks else None,
                "steps": summary["steps"],
                "batch_size": config["batch_size"],
                "trainable_parameters": summary["trainable_parameters"],
            }
            file.write(json.dumps(row) + "\n")


def text_row(workdir: Path, config: dict, summary: dict) -> dict:
    metric = summary["metric"]
    history, key = records.read_metrics(workdir), f"validation/{metric}"
    ranks = [r for m in summary["intrinsic_dimension"].values() for r in m["effective_rank"]]
    return {
        "kind": "final",
        "task": summary["dataset"].removeprefix("glue/"),
        "method": summary["method"],
        "learning_rate": config["optimizer"]["learning_rate"],
        "seed": config["seed"],
        "metric": metric,
        "validation": max(row[key] for row in history if key in row),
        "test": summary["test_best"][metric],
        "test_last": summary["test"][metric],
        "best_step": summary["test_best"]["step"],
        "effective_rank": statistics.mean(ranks) if ranks else None,
        "steps": summary["steps"],
        "batch_size": config["batch_size"],
        "trainable_parameters": summary["trainable_parameters"],
    }


def add_study(workdir: Path) -> None:
    """Stores the rows of a study under its name; those that are there already stay once."""
    found = study_rows.read_rows(workdir / "rows.jsonl")
    for name in dict.fromkeys(row["study"] for row in found):
        study_rows.append_rows(
            HERE / f"{name}.jsonl", [row for row in found if row["study"] == name]
        )


def pictures() -> None:
    """Draws every stored study's pictures, as its config names them, to configs/STUDY_NAME.png."""
    for file in sorted(HERE.glob("*.jsonl")):
        found = rows(file.stem)
        if "study" not in found[0]:
            continue
        study = config_of(file.stem)
        for name in study.pictures:
            draw(found, README.parent / f"{file.stem}_{name}.png", name, study.along)


def config_of(study: str):
    """The config of ``ablation_grid``: configs/ablation.py with the argument ``grid``."""
    own = README.parent / f"{study}.py"
    if own.exists():
        return study_config.load(str(own))
    for file in sorted(README.parent.glob("*.py")):
        if study.startswith(f"{file.stem}_"):
            return study_config.load(f"{file}:{study.removeprefix(f'{file.stem}_')}")
    raise ValueError(f"no file of configs/ has a study {study!r}")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def task_table(found: list[dict]) -> str:
    """Markdown: a line a method, for each task its metric at the best step and its rate."""
    tasks = list(dict.fromkeys(row["task"] for row in found))
    heads = [f"{task}, {runs_of(found, task=task)[0]['metric']} | rate | seeds" for task in tasks]
    lines = [
        f"| method | {' | '.join(heads)} | trained |",
        f"|---|{'---|---|---|' * len(tasks)}---|",
    ]
    for method in dict.fromkeys(row["method"] for row in found):
        cells = [method]
        for task in tasks:
            runs = runs_of(found, task=task, method=method, kind="final")
            if not runs:
                cells += ["-", "-", "0"]
                continue
            values = spread([100 * row["test"] for row in runs], 2)
            cells += [values, f"{runs[0]['learning_rate']:g}", str(len(runs))]
        trained = runs_of(found, method=method)[0]["trainable_parameters"]
        lines.append(f"| {' | '.join(cells)} | {trained:,} |")
    return "\n".join(lines)


def loss_table(found: list[dict]) -> str:
    """Markdown: a line a method and rate, mean +- sample standard deviation over seeds; in bold the
    rate of each method that is best on validation."""
    heads = ["validation loss", "test loss", "effective rank", "trained"]
    lines = [["method", "rate", "seeds", *heads]]
    for method in dict.fromkeys(row["method"] for row in found):
        means = {}
        for rate in dict.fromkeys(row["learning_rate"] for row in runs_of(found, method=method)):
            runs = runs_of(found, method=method, learning_rate=rate)
            cells = [
                spread([row[name] for row in runs], digits)
                for name, digits in (("validation", 4), ("test", 4), ("effective_rank", 2))
            ]
            means[rate] = statistics.mean(row["validation"] for row in runs)
            trained = f"{runs[0]['trainable_parameters']:,}"
            lines.append([method, f"{rate:g}", str(len(runs)), *cells, trained])
        best = f"{min(means, key=means.__getitem__):g}"
        for line in lines:
            if line[:2] == [method, best]:
                line[:2] = [f"**{cell}**" for cell in line[:2]]
    return markdown_table(lines)


def spread(values: list[float | None], digits: int) -> str:
    """Mean and sample standard deviation, or a dash where a value is missing."""
    if None in values or len(values) < 2:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def runs_of(found: list[dict], **fields) -> list[dict]:
    return [row for row in found if all(row[name] == value for name, value in fields.items())]


def table(name: str) -> str:
    """Markdown: a line a method, mean +- sample standard deviation over seeds."""
    if name == "step_costs":
        return step_costs()
    if "study" in rows(name)[0]:
        return study_tables.markdown(rows(name))
    if rows(name)[0].get("metric") == "loss":
        return loss_table(rows(name))
    if "task" in rows(name)[0]:
        return task_table(rows(name))
    lines = [
        "| method | seeds | test accuracy, last step | test loss | effective rank | trained |",
        "|---|---|---|---|---|---|",
    ]
    found = rows(name)
    for method in dict.fromkeys(row["method"] for row in found):
        runs = runs_of(found, method=method)
        accuracy = spread([100 * row["accuracy"] for row in runs], 2)
        loss = spread([row["loss"] for row in runs], 3)
        rank = spread([row["effective_rank"] for row in runs], 2)
        lines.append(
            f"| {method} | {len(runs)} | {accuracy} % | {loss} | {rank} "
            f"| {runs[0]['trainable_parameters']:,} |"
        )
    return "\n".join(lines)


def step_costs() -> str:
    """Markdown: what a step of each method takes alone on a device, at the shapes of each task."""
    methods = config_of("paper_table").methods
    heads, lines = ["method"], [[method] for method in methods]
    for task, name in STEPS.items():
        results = json.loads((HERE / f"bench_{name}.json").read_text())
        found = {row.name: row for row in bench_table.table_rows(results)}
        heads += [f"{task}, {results['device']}", "x lora"]
        for method, line in zip(methods, lines, strict=True):
            ms, ratio = found[method].ms.median, found[method].ratios["lora"].median
            line += [f"{bench_table.number(ms)} ms", f"{ratio:.2f}"]
    return markdown_table([heads, *lines])


def with_tables(text: str) -> str:
    """``text`` with every table between its marks made anew."""
    for name in ("step_costs", *(file.stem for file in HERE.glob("*.jsonl"))):
        begin = BEGIN.format(name=name)
        if begin in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{table(name)}\n{END}{rest.split(END, 1)[1]}"
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["study"]:
        for workdir in map(Path, sys.argv[2:]):
            add_study(workdir)
    if sys.argv[1:2] == ["pictures"]:
        pictures()
    README.write_text(with_tables(README.read_text()))
