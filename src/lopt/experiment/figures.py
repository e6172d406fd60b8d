"""Figures without a display: matplotlib below `pyplot`, as PNG."""

import io
from typing import Any


def figure_of(width: float, height: float) -> Any:
    """Returns an empty figure of so many inches."""
    # Importing pyplot takes a second and a display; figures of their own take neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
