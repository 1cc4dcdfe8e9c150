"""Pictures: each one function from values to a figure; nothing is written here."""

from kvsharer_exp.figures.bench import bench_figure
from kvsharer_exp.figures.front import front_figure, front_html
from kvsharer_exp.figures.maps import map_figure
from kvsharer_exp.figures.progress import progress_figure
from kvsharer_exp.figures.ranking import acceptance_figure, distance_heatmap
from kvsharer_exp.figures.style import save_pdf, save_png
from kvsharer_exp.figures.tasks import tasks_figure

__all__ = [
    "acceptance_figure",
    "bench_figure",
    "distance_heatmap",
    "front_figure",
    "front_html",
    "map_figure",
    "progress_figure",
    "save_pdf",
    "save_png",
    "tasks_figure",
]
