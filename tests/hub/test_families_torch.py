"""The table of families in rmlora_jax/models/README.md, run again (tests/oracle/families.py)."""

import pytest
from oracle import families

pytestmark = pytest.mark.slow


def test_no_cell_says_no(tmp_path):
    """The limits are the project's: 2e-4 of the logits' root mean square, 1e-4 with adapters."""
    found = families.rows(list(families.TITLES), tmp_path)
    for name, row in found.items():
        assert row.greedy == 3 * families.NEW, name
        assert row.logits < 2e-4, name
        assert max(row.sft, row.peft_out, row.peft_in, row.merged_out) < 1e-4, (name, row)
    table = families.README.read_text().partition(families.BEGIN)[2]
    assert all(title in table for title in families.TITLES.values())
