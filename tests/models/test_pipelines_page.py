"""The page of pipelines says what the table and the figures say, and the figures cover the table."""

import json

from darkroom.families import FAMILIES, UNSUPPORTED
from tests.models.pipelines_page import MEASURED, PAGE, page
from tests.tiny_models import TINY_MODELS, WITHOUT_ROW


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page(json.loads(MEASURED.read_text()))


def test_the_figures_cover_every_row_and_keep_to_the_limits() -> None:
    figures = json.loads(MEASURED.read_text())
    assert set(figures) == {*TINY_MODELS, *WITHOUT_ROW}
    assert {figure["pipeline"] for figure in figures.values()} >= set(FAMILIES)
    assert max(figure["batched_error"] for figure in figures.values()) <= 1e-5
    assert all(figure["is_equal_alone"] for figure in figures.values())


def test_what_is_not_supported_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert all(f"| `{pipeline}` |" in text for pipeline in (*FAMILIES, *UNSUPPORTED))
