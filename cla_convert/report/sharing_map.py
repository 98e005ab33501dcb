"""The sharing map as a picture: which layers share, and what each group cost."""

from typing import TYPE_CHECKING, Any

from .figures import CLA, INK, MUTED, WARM, in_style, new_figure
from .formats import owners_text
from .run_folder import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@in_style
def draw_sharing(sources: list[int | None], groups: list[Json], width: float | None = None) -> "Figure":
    """One square a layer: owners solid, consumers pale with an arrow to their owner; the colour is the damage.

    Args:
        sources: the sharing map.
        groups: layers, owner, damage and heat of each group.
        width: ignored; the picture is as wide as there are layers. The page draws the map by itself.
    """
    from matplotlib.patches import FancyBboxPatch

    count = len(sources)
    reach = max(layer - owner for layer, owner in enumerate(sources) if owner is not None)
    figure, axes = new_figure(width=max(5.0, 0.36 * count + 0.6), height=1.5)
    axis = axes[0, 0]
    for group in groups:
        colour = _colour(group)
        for layer in group["layers"]:
            owns = layer == group["owner"]
            style: dict[str, Any] = {"facecolor": colour, "edgecolor": colour, "alpha": 1.0 if owns else 0.3}
            axis.add_patch(FancyBboxPatch((layer - 0.36, -0.36), 0.72, 0.72, boxstyle="round,pad=0.04", **style))
            axis.text(layer, 0, str(layer), ha="center", va="center", fontsize=8, color="white" if owns else INK)
            if not owns and reach <= 3:
                arrow = {"arrowstyle": "->", "color": colour, "connectionstyle": "arc3,rad=0.45"}
                axis.annotate("", (group["owner"], 0.44), (layer, 0.44), arrowprops=arrow)
            elif not owns:  # arcs over many layers would cover each other
                axis.text(layer, 0.62, f"\u2190{group['owner']}", ha="center", va="center", fontsize=7, color=colour)
    axis.set(xlim=(-0.6, count - 0.4), ylim=(-0.5, 1.1))
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.set_title(f"{owners_text(sources)} cache K/V; a pale layer reads where its arrow points")
    axis.title.set_fontsize(9)
    _legend(axis, groups)
    return figure


def _legend(axis: "Axes", groups: list[Json]) -> None:
    """What squares and colours mean; the ends of the scale of damage, where it was measured."""
    from matplotlib.patches import Patch

    shared = [group for group in groups if len(group["layers"]) > 1]
    damages = [group["damage"] for group in shared if group["damage"] is not None]
    handles = [Patch(facecolor=MUTED, label="shares with no other")] if len(shared) < len(groups) else []
    colour = WARM if damages else CLA
    handles += [Patch(facecolor=colour, label="owns K/V"), Patch(facecolor=colour, alpha=0.3, label="reads them")]
    if damages:
        least = min((group for group in shared if group["damage"] is not None), key=lambda group: group["damage"])
        handles.append(Patch(facecolor=_colour(least), label=f"least damage {min(damages):.2g}"))
        handles.append(Patch(facecolor=WARM, label=f"most damage {max(damages):.2g}"))
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(handles), fontsize=8,
        handlelength=1.0, columnspacing=1.2,
    )  # fmt: skip


def _colour(group: Json) -> Any:
    """Grey for a layer on its own, then from the colour of the converted model to that of a warning by damage."""
    from matplotlib.colors import to_rgb

    if len(group["layers"]) == 1:
        return MUTED
    cool, hot, heat = to_rgb(CLA), to_rgb(WARM), group["heat"] or 0.0
    return tuple(low + heat * (high - low) for low, high in zip(cool, hot, strict=True))
