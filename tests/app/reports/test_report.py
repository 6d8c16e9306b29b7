import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from app.reports.report import Report, new_figure
from tests.support.pages import check_single_file


def line_figure(label: str = "a $ b") -> Figure:
    figure, (axes,) = new_figure()
    axes.plot([0, 1], [1, 2], label=label)
    axes.set_xlabel("step")
    axes.legend()
    return figure


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    report = Report("Two variants")
    report.add_figure("losses", line_figure(), "Loss by step", "Lower is better. Look for a gap.")
    assert len(check_single_file(report.write(tmp_path).read_text())) == 1
    assert Image.open(tmp_path / "losses.png").size[0] == 9 * 150


def test_text_is_escaped(tmp_path: Path) -> None:
    report = Report("<script>1</script>")
    report.add_paragraph("<b>")
    report.add_table("<i>", pd.DataFrame({"<u>": ["<a href=x>"]}))
    page = report.write(tmp_path).read_text()
    assert not re.search(r"<(script|b|i|u|a)\b", page)


def test_a_missing_cell_is_empty(tmp_path: Path) -> None:
    report = Report("Cells")
    report.add_table("Cells", pd.DataFrame({"name": ["x", None], "value": [float("nan"), 1.5]}))
    cells = re.findall(r"<td>(.*?)</td>", report.write(tmp_path).read_text())
    assert cells == ["x", "", "", "1.5"]


@pytest.mark.parametrize("pictures", [True, False])
def test_the_same_report_gives_the_same_bytes(tmp_path: Path, pictures: bool) -> None:
    pages = []
    for name in ("first", "second"):
        report = Report("Same")
        report.add_figure("line", line_figure(), "Line", "Rises.")
        pages.append(report.write(tmp_path / name, pictures).read_bytes())
        assert (tmp_path / name / "line.png").is_file() is pictures
    assert pages[0] == pages[1]
