"""Table of the accuracy within each class."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

MAX_CLASSES = 100
"""Maximum number of classes in the table: those with the lowest accuracy."""


@dataclass(frozen=True)
class ClassesInfo:
    """Accuracy within each class, of the widest sub-network and of one router."""

    split: str
    router: str
    """Name of the router; empty where there is none yet."""
    classes: tuple[str, ...]
    """Names of the classes that have images in the split."""
    num_images: tuple[int, ...]
    """Images of each class."""
    widest: tuple[float, ...]
    """Top-1 of the widest sub-network within each class, 0..1."""
    routed: tuple[float, ...] = ()
    """Top-1 of the router within each class, 0..1; empty where there is none."""

    def __post_init__(self) -> None:
        lengths = {len(self.classes), len(self.num_images), len(self.widest), len(self.routed or self.widest)}
        if len(lengths) > 1:
            raise ValueError(f"all columns need one value per class, but have {sorted(lengths)} values")

    @property
    def lowest_first(self) -> list[int]:
        """The classes by the accuracy of the router, or of the widest sub-network without one."""
        shown = self.routed or self.widest
        return sorted(range(len(self.classes)), key=lambda index: (shown[index], self.classes[index]))


def classes_table(info: ClassesInfo) -> str:
    """The table as HTML: the classes with the lowest accuracy first, and the mean over all classes
    at the end."""
    heads = ["Class", "Images", "Widest (%)", *([f"{info.router} (%)"] if info.routed else [])]
    columns = [info.widest, *([info.routed] if info.routed else [])]
    head = "".join(
        f'<th class="{"number" if k else ""}" scope="col">{escape(text)}</th>' for k, text in enumerate(heads)
    )
    body = "".join(
        _row(info.classes[index], info.num_images[index], [column[index] for column in columns])
        for index in info.lowest_first[:MAX_CLASSES]
    )
    means = [sum(column) / len(column) for column in columns]
    body += _row("mean over classes", sum(info.num_images), means, "baseline")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(name: str, count: int, shares: list[float], kind: str = "") -> str:
    cells = "".join(f'<td class="number">{100 * share:.1f}</td>' for share in shares)
    attribute = f' class="{kind}"' if kind else ""
    return f'<tr{attribute}><td>{escape(name)}</td><td class="number">{count:,}</td>{cells}</tr>'
