"""Plan files in the folder of the test."""

import pytest

from learned_rounding.quant_core.batch.plan_file import read_plan


@pytest.fixture
def plan_file(tmp_path):
    """plan_file(text, name="plan.toml") → path of a plan file with this text."""

    def make(text: str, name: str = "plan.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def planned(plan_file):
    """planned(text) → the plan of a file with this text."""
    return lambda text: read_plan(plan_file(text))


@pytest.fixture
def touch(tmp_path):
    """touch(*names) creates empty files, which are enough for a plan."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return make
