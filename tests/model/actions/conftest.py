"""The short texts of these tests attend in blocks too, as long ones do."""

import pytest

from kvsharer_exp.model.sharing import queries


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "BLOCK", 4)
