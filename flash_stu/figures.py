"""Figures as image files, each whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure

from flash_stu.errors import UserError
from flash_stu.files import replacing_file

FORMATS = ("png", "pdf", "svg", "eps", "jpg", "jpeg", "webp", "tif", "tiff")


def check_figure_path(path: str | Path, label: str = "figure") -> None:
    """Refuse a path whose ending names no image format.

    Raises:
        UserError: naming the path and the endings allowed.
    """
    if Path(path).suffix.lower().removeprefix(".") not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise UserError(f"{label} {path} must end in an image format; allowed: {endings}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to an image file, whose ending chooses the format; directories on the way are made.

    Raises:
        UserError: if it names no format, or the file cannot be written; nothing is left behind.
    """
    check_figure_path(path)
    with replacing_file(path) as temporary:
        figure.savefig(temporary)
