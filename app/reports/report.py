"""Reports: one HTML file with its pictures inside, which opens without network access."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from datamodules.atomic import atomic_write

if TYPE_CHECKING:
    import pandas as pd

FILE = "report.html"
# Okabe and Ito's palette, which most colour-blind readers can tell apart, without its yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
RC: Any = {  # settings of matplotlib; Any, since matplotlib types the keys as a list of all names
    "text.parse_math": False,  # names of files and classes may hold dollar signs
    "svg.hashsalt": "onesided",  # the same figure gives the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin-top: 2.5rem }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto }
figcaption b { display: block } figcaption { max-width: 46rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 }
caption { text-align: left; font-weight: 600; padding: .4rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child, .text { text-align: left } thead th { border-bottom: 2px solid #888 }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .85rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts -%}
{% if part.kind == "heading" %}<h2>{{ part.text }}</h2>
{% elif part.kind == "paragraph" %}<p>{{ part.text }}</p>
{% elif part.kind == "code" %}<pre>{{ part.text }}</pre>
{% elif part.kind == "table" %}<div class="scroll"><table>
<caption>{{ part.text }}</caption>
<thead><tr>{% for name in part.columns %}
<th{% if name in part.text_columns %} class="text"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in part.rows %}
<tr>{% for cell in row %}
<td{% if part.columns[loop.index0] in part.text_columns %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}
</tr>{% endfor %}
</tbody></table></div>
{% else %}<figure><img src="{{ part.source }}" alt="{{ part.text }}">
<figcaption><b>{{ part.text }}</b>{{ part.reading }}</figcaption></figure>
{% endif %}
{%- endfor %}
</body>
</html>
"""


class Report:
    """A page that is built from top to bottom and then written.

    All text is escaped: it may come from a configuration, a data set or an error message.

    Args:
        title: Shown at the top of the page and in the browser's tab.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[dict[str, Any]] = []  # parts of the page by the names of `PAGE`
        self._pictures: dict[str, Figure] = {}

    def add_heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append({"kind": "heading", "text": text})

    def add_paragraph(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append({"kind": "paragraph", "text": text})

    def add_code(self, text: str) -> None:
        """Add a command or a piece of a file in a monospaced font."""
        self._parts.append({"kind": "code", "text": text})

    def add_table(self, caption: str, frame: pd.DataFrame, text_columns: Collection[str] = ()) -> None:
        """Add a table of a frame's columns, without its index. Cells are converted by `str`; missing cells are empty.

        Args:
            caption: Title above the table.
            frame: Cells of the table.
            text_columns: Columns to align to the left, besides the first column; other columns go to the right.
        """
        cells = frame.astype(object).where(frame.notna(), "")
        rows = [[str(cell) for cell in row] for row in cells.itertuples(index=False)]
        table = {"columns": [str(name) for name in frame.columns], "rows": rows, "text_columns": text_columns}
        self._parts.append({"kind": "table", "text": caption, **table})

    def add_figure(self, name: str, figure: Figure, title: str, reading: str) -> None:
        """Add a picture.

        Args:
            name: Stem of the PNG file; unique in the report.
            figure: The figure, made with `new_figure`.
            title: Caption's first line: the subject of the figure.
            reading: Rest of the caption: how to read the figure, and the pattern to look for.
        """
        picture = io.BytesIO()
        with mpl.rc_context(RC):
            FigureCanvasSVG(figure).print_svg(picture, metadata={"Date": None})
        source = "data:image/svg+xml;base64," + b64encode(picture.getvalue()).decode()
        self._parts.append({"kind": "figure", "text": title, "reading": reading, "source": source})
        self._pictures[name] = figure

    def write(self, folder: Path, pictures: bool = True) -> Path:
        """Write the page and, beside it, each picture as `<name>.png`.

        Args:
            folder: Directory, created if missing. Files of the same name are overwritten.
            pictures: If false, write no PNG files.

        Returns:
            Path of the page, `report.html`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if pictures:
            for name, figure in self._pictures.items():
                with mpl.rc_context(RC), atomic_write(folder / f"{name}.png") as file:
                    figure.set_dpi(150)  # drawing the SVG has set the resolution to 72
                    FigureCanvasAgg(figure).print_png(file)
        page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
        with atomic_write(folder / FILE) as file:
            file.write(page.render(title=self.title, parts=self._parts).encode())
        return folder / FILE


def new_figure(
    width: float = 9.0, height: float = 4.0, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Any]]:
    """Return a figure, with sizes in inches, and its panels row by row. `options` go to matplotlib's `subplots`."""
    with figure_style():
        figure = Figure(figsize=(width, height), dpi=150)
        return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def side_legend(axes: Axes) -> None:
    """Add a legend to the right of a panel."""
    with figure_style():
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def figure_style() -> AbstractContextManager[None]:
    """Return a context in which new legends and colour bars get the style of reports."""
    return mpl.rc_context(RC)
