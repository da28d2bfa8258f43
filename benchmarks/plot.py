"""Draws what `convert.py --json` measured: `python benchmarks/plot.py` makes docs/convert.svg of benchmarks/results/.

Needs matplotlib.
"""

import json
import pathlib
import statistics

import matplotlib
from matplotlib import pyplot
from trees import MODELS

HERE = pathlib.Path(__file__).parent
COLOURS = {
    "portax": "#1a7f5a",
    "portax-stream": "#7fbfa6",
    "numpy": "#8c8c8c",
    "maxtext": "#c2553d",
    "maxtext-table": "#e0a08f",
    "tunix": "#7d6bb0",
}
LABELS = {
    "portax": "portax",
    "portax-stream": "portax, in buckets",
    "numpy": "numpy by hand, one thread",
    "maxtext": "MaxText subclass",
    "maxtext-table": "MaxText rule table",
    "tunix": "Tunix, to MaxText's own model",
}


def panel(axes: pyplot.Axes, found: dict) -> None:
    """One run: a bar for each converter and number of devices, the first row on top."""
    rows = [row for row in found["rows"] if not row["mesh"]][::-1]
    for y, row in enumerate(rows):
        kept = row["kept"]
        ratio = statistics.median(kept["warm_s"]) / statistics.median(kept["copy_s"])
        axes.barh(y, ratio, color=COLOURS[row["converter"]])
        axes.text(ratio, y, f" {ratio:.1f}x, {statistics.median(kept['warm_s']):.2f} s", va="center", fontsize=8)
    names = [f"{LABELS[row['converter']]}, {row['devices']} device{'s' * (row['devices'] > 1)}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"{MODELS[found['model']].title}, bfloat16, tp 4", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)


def main() -> None:
    """Draws all runs."""
    matplotlib.rcParams["svg.hashsalt"] = "portax"  # the same figures, the same file
    runs = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("convert-*.json"))]
    heights = [sum(not row["mesh"] for row in run["rows"]) for run in runs]
    size = (8, 1.4 + 0.4 * sum(heights))
    figure, panels = pyplot.subplots(len(runs), 1, figsize=size, height_ratios=heights, squeeze=False)
    for axes, run in zip(panels[:, 0], runs, strict=True):
        panel(axes, run)
    panels[-1, 0].set_xlabel("warm conversion / np.copyto of the same bytes (dotted)", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "convert.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
