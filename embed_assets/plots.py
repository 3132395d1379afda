"""Plots tuning measurements as PNG files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from embed_assets.engine.tuning import Tuning
from embed_assets.errors import SettingsError


def can_plot() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_writable(file: Path) -> None:
    """Raise ``SettingsError`` if a picture can't be written to `file`, to find out before a long measurement."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            pass
    except OSError as error:
        raise SettingsError(f"the picture {str(file)!r} can't be written: {error.strerror}; name another") from error


def plot_tuning(tuning: Tuning, title: str, file: Path) -> None:
    """Plot throughput and padding against the token budget, one line per library, with the sweet spot marked.

    Overwrites `file`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    speed = figure.add_subplot()
    padding = speed.twinx()
    for number, (library, points) in enumerate(tuning.points.items()):
        budgets = [point.max_batch_tokens for point in points]
        color = f"C{number}"
        speed.plot(budgets, [p.tokens_per_second for p in points], "o-", color=color, label=f"{library}: tokens/s")
        padding.plot(budgets, [p.padding_percent for p in points], "x:", color=color, label=f"{library}: padding")
    spot = tuning.spot
    speed.plot(spot.max_batch_tokens, spot.tokens_per_second, "*", color="black", markersize=18, label="sweet spot")
    speed.annotate(
        f"{tuning.library}, {spot.max_batch_tokens:,} tokens:\n{spot.tokens_per_second:,.0f} tokens/s",
        (spot.max_batch_tokens, spot.tokens_per_second),
        xytext=(0, -110),
        textcoords="offset points",
        ha="center",
    )
    ticks = sorted({p.max_batch_tokens for points in tuning.points.values() for p in points})
    speed.set_xscale("log", base=2)
    speed.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    speed.set_ylim(bottom=0)
    padding.set_ylim(bottom=0, top=max(5.0, *(p.padding_percent * 1.5 for ps in tuning.points.values() for p in ps)))
    speed.set_xlabel("max_batch_tokens")
    speed.set_ylabel("tokens per second (solid)")
    padding.set_ylabel("padding, % (dotted)")
    speed.set_title(title)
    handles = [*speed.get_legend_handles_labels()[0], *padding.get_legend_handles_labels()[0]]
    speed.legend(handles=handles, loc="lower left", fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
