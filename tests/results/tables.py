"""Stored results and the tables made from them.

    python tests/results/tables.py add NAME WORKDIR...   # append finished runs to NAME.jsonl
    python tests/results/tables.py                       # write the tables of configs/README.md
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent.parent / "configs" / "README.md"
BEGIN, END = "<!-- table {name}: python tests/results/tables.py -->", "<!-- end -->"


def add(name: str, workdirs: list[str]) -> None:
    """Appends one line a run: what was asked, and what came out."""
    with open(HERE / f"{name}.jsonl", "a") as file:
        for workdir in map(Path, workdirs):
            config = json.loads((workdir / "config.json").read_text())
            summary = json.loads((workdir / "summary.json").read_text())
            ranks = [
                rank
                for module in summary["intrinsic_dimension"].values()
                for rank in module["effective_rank"]
            ]
            row = {
                "method": summary["method"],
                "seed": config["seed"],
                "accuracy": summary["eval"]["accuracy"],
                "loss": summary["eval"]["loss"],
                "best_accuracy": summary["best_eval"]["accuracy"],
                "effective_rank": statistics.mean(ranks) if ranks else None,
                "steps": summary["steps"],
                "batch_size": config["batch_size"],
                "trainable_parameters": summary["trainable_parameters"],
            }
            file.write(json.dumps(row) + "\n")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def table(name: str) -> str:
    """Markdown: a line a method, mean +- sample standard deviation over seeds."""
    lines = [
        "| method | seeds | test accuracy, last step | test loss | effective rank | trained |",
        "|---|---|---|---|---|---|",
    ]
    found = rows(name)
    for method in dict.fromkeys(row["method"] for row in found):
        runs = [row for row in found if row["method"] == method]

        def spread(field, scale=1.0, digits=2, runs=runs):
            values = [scale * row[field] for row in runs if row[field] is not None]
            if len(values) < 2:
                return "-"
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            return f"{mean:.{digits}f} ± {deviation:.{digits}f}"

        lines.append(
            f"| {method} | {len(runs)} | {spread('accuracy', 100)} % | {spread('loss', digits=3)} "
            f"| {spread('effective_rank')} | {runs[0]['trainable_parameters']:,} |"
        )
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """``text`` with every table between its marks made anew."""
    for file in sorted(HERE.glob("*.jsonl")):
        begin = BEGIN.format(name=file.stem)
        if begin in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{table(file.stem)}\n{END}{rest.split(END, 1)[1]}"
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], sys.argv[3:])
    README.write_text(with_tables(README.read_text()))
