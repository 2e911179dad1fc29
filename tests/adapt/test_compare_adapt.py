"""The comparison in rmlora_jax/adapt/README.md: its rows run, and the table is the script's."""

import re

import compare_adapt
import pytest
from compare.checks import Failed, require
from compare.libraries import LIBRARIES, Case, NotOffered
from compare.rows import Row, all_rows

TEXT = compare_adapt.README.read_text()
ROWS = {row.name: row for row in all_rows()}
LINES = TEXT.split(compare_adapt.BEGIN)[1].split(compare_adapt.END)[0].splitlines()
CELLS = {
    cells[0]: dict(zip(compare_adapt.COLUMNS, cells[1:], strict=True))
    for line in LINES
    if line.startswith("| ") and not line.startswith(("| **", "| | "))
    for cells in [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]]
}


def test_table_has_every_row_and_a_verdict_wherever_a_framework_applies():
    assert list(CELLS) == list(ROWS)
    for name, row in ROWS.items():
        for (library, framework), cell in CELLS[name].items():
            applies = framework in row.frameworks
            assert (cell == "yes" or cell.startswith("no: ")) == applies, (name, library, cell)
            assert bool(cell) == applies


def test_ours_has_no_no():
    for name, row in ROWS.items():
        for framework in row.frameworks:
            assert CELLS[name]["ours", framework] == "yes", (name, framework)


# One cell of each kind: right, a wrong number, an error, and what is not there.
SOME = [
    ("Dense / Linear", "ours", "linen"),
    ("Dense / Linear", "ours", "nnx"),
    ("Dense / Linear", "qwix", "linen"),
    ("Dense / Linear", "flax", "nnx"),
    ("Embed, tied by attend", "ours", "nnx"),
    ("Embed", "qwix", "nnx"),
    ("Einsum, interleaved: BTD,NDH->BTNH", "ours", "linen"),
    ("Einsum, contracted", "qwix", "linen"),
    ("Conv, 1-D", "flax", "nnx"),
    ("merging into parameters of the base", "qwix", "linen"),
    ("dropout acts in training", "ours", "nnx"),
    ("the backward pass forms no full weight gradient", "hand", "linen"),
    ("alpha: the scale alpha / r", "flax", "nnx"),
]


@pytest.mark.parametrize(("name", "library", "framework"), SOME)
def test_a_cell_is_what_running_its_row_says(name, library, framework):
    found = compare_adapt.verdict(ROWS[name], LIBRARIES[library], framework)
    # The first words of an error are its own library's, and change with its version.
    kind = slice(3) if "Error" in found else slice(None)
    assert compare_adapt._cell(found)[kind] == CELLS[name][library, framework][kind]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "yes"),
        (Failed("off by 1"), "no: off by 1"),
        (NotOffered("a merge"), "no: not offered"),
        (TypeError("f() got an unexpected keyword argument 'alpha'"), "no: not offered"),
        (IndexError("at 0x7f00"), "no: IndexError: at …"),
        (KeyError("x " * 100), "no: KeyError: 'x" + " x" * 33 + " …"),
    ],
)
def test_verdicts(error, expected):
    def check(case, library, framework):
        if error is not None:
            raise error

    row = Row("Layers", "a row", Case(None, None, ()), check)
    assert compare_adapt.verdict(row, None, "linen") == expected


def test_a_wrong_increment_is_found():
    row, ours = ROWS["Dense / Linear"], LIBRARIES["ours"]

    class Doubled:
        def fit(self, case, framework, **options):
            fitted = ours.fit(case, framework, **options)
            fitted.merge, scale = None, fitted.scale
            fitted.scale = lambda weight: 2 * scale(weight)
            return fitted

    found = compare_adapt.verdict(row, Doubled(), "linen")
    assert found.startswith("no: differs from the merged model by")
    with pytest.raises(Failed, match="why"):
        require(False, "why")


def test_a_row_that_kills_its_process_costs_one_verdict(monkeypatch, tmp_path):
    # The worker is a script of its own: it dies at the second row, hangs at the third.
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for name in json.loads(sys.argv[-1]):\n"
        "    if name == 'dies': os.abort()\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    print(json.dumps([name, 'yes']), flush=True)\n"
    )
    monkeypatch.setattr(compare_adapt, "__file__", str(script))
    monkeypatch.setattr(compare_adapt, "SECONDS_PER_ROW", 3)
    names = ["first", "dies", "second", "hangs", "last"]
    assert compare_adapt.run_column("ours", "linen", names, 70) == {
        "first": "yes",
        "dies": "no: the process ends with -6",
        "second": "yes",
        "hangs": "no: does not end within 3 s",
        "last": "yes",
    }


@pytest.mark.slow
def test_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, "adapt/README.md", "exec"), names)
    assert names["y"].shape == (2, 4)
    # The second adapter is the first example's.
    pairs = zip((names["de"], names["en"]), names["x"], strict=True)
    each = [names["one"](adapter, v) for adapter, v in pairs]
    assert abs(names["y"] - names["jnp"].stack(each)).max() < 1e-6
    assert names["params"]["lora_a"].shape == (8, 2)
