"""The sharing map as a picture: which layers share, and what each group cost."""

from typing import TYPE_CHECKING, Any

from .figures import CLA, INK, MUTED, WARM, in_style, new_figure
from .run_folder import Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sharing_groups(converted: Json) -> list[Json]:
    """Groups of the sharing map: layers, owner, damage, captured_k, captured_v, and heat.

    heat is the damage as a share of the largest one (0..1); None where nothing was calibrated.
    """
    sources = converted.get("kv_source_layers") or []
    found = {tuple(group["layers"]): group for group in converted.get("groups") or []}
    groups: list[Json] = []
    for owner in dict.fromkeys(sources):
        layers = [layer for layer, source in enumerate(sources) if source == owner]
        fit = found.get(tuple(layers), {})
        groups.append(
            {"layers": layers, "owner": owner} | {k: fit.get(k) for k in ("damage", "captured_k", "captured_v")}
        )
    worst = max((group["damage"] for group in groups if group["damage"]), default=None)
    return [group | {"heat": group["damage"] / worst if worst and group["damage"] else None} for group in groups]


@in_style
def draw_sharing(converted: Json) -> "Figure":
    """One square a layer: owners solid, consumers pale with an arrow to their owner; the colour is the damage."""
    from matplotlib.patches import FancyBboxPatch

    sources: list[int] = converted["kv_source_layers"]
    count = len(sources)
    reach = max(layer - owner for layer, owner in enumerate(sources))
    figure, axes = new_figure(width=max(5.0, 0.36 * count + 0.6), height=1.15)
    axis = axes[0, 0]
    for group in sharing_groups(converted):
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
    axis.set_title(f"{len(set(sources))} of {count} layers cache K/V; a pale layer reads where its arrow points")
    axis.title.set_fontsize(9)
    return figure


def _colour(group: Json) -> Any:
    """Grey for a layer on its own, then from the colour of the converted model to that of a warning by damage."""
    from matplotlib.colors import to_rgb

    if len(group["layers"]) == 1:
        return MUTED
    cool, hot, heat = to_rgb(CLA), to_rgb(WARM), group["heat"] or 0.0
    return tuple(low + heat * (high - low) for low, high in zip(cool, hot, strict=True))
