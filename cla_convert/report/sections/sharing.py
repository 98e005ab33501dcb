"""The sharing map: which layers share, and what each group cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from ...models.shape import owners_of
from ..content import Block, Column, Details, Figure, Paragraph, Row, Svgs, Table
from ..formats import groups_text, number, percent
from ..run_folder import Json, RunFiles
from ..section import Material, Picture, Section, register
from ..sharing_map import draw_sharing
from ..text import code, fenced

ALT = "which layers share keys and values"


def collect(material: Material, report: Json) -> Json:
    """sharing {groups, worst_damage}: groups of layers, owner, damage, captured_k, captured_v, and heat.

    heat is the damage as a share of the largest one (0..1); None where nothing was calibrated.
    """
    converted = report["converted"]
    sources = converted.get("kv_source_layers") or []
    found = {tuple(group["layers"]): group for group in converted.get("groups") or []}
    groups: list[Json] = []
    for owner in owners_of(sources):
        layers = [layer for layer, source in enumerate(sources) if source == owner]
        fit = found.get(tuple(layers), {})
        groups.append(
            {"layers": layers, "owner": owner} | {k: fit.get(k) for k in ("damage", "captured_k", "captured_v")}
        )
    worst = max((group["damage"] for group in groups if group["damage"]), default=None)
    groups = [group | {"heat": group["damage"] / worst if worst and group["damage"] else None} for group in groups]
    return {"sharing": {"groups": groups, "worst_damage": worst}}


def show(report: Json) -> Sequence[Block]:
    """The map as boxes (HTML) or lines (Markdown), and every shared group."""
    groups, worst = report["sharing"]["groups"], report["sharing"]["worst_damage"]
    if not groups:
        return []
    converted = report["converted"]
    blocks: list[Block] = [
        Paragraph(
            [code(converted.get("sharing") or "by hand"), ", initialised by ", code(converted.get("init") or "?"), "."]
        ),
        Strip(converted["kv_source_layers"], groups, worst, "sharing" in report["plots"]),
    ]
    if worst:
        columns = [
            Column("owner \u2190 consumers", text=True),
            Column("damage"),
            Column("keys kept, %"),
            Column("values kept, %"),
        ]
        rows = [
            Row([_names(group), number(group["damage"], 3), percent(group["captured_k"]), percent(group["captured_v"])])
            for group in groups
            if len(group["layers"]) > 1 or group["damage"] is not None
        ]
        kept = "Kept: the share of the keys' (values') weighted energy that one projection captures, in closed form."
        blocks.append(Details("Every shared group", [Table(columns, rows), Paragraph(kept, "note")]))
    return blocks


def _names(group: Json) -> str:
    if len(group["layers"]) == 1:  # whose heads were pooled
        return str(group["owner"])
    return f"{group['owner']} \u2190 {', '.join(str(layer) for layer in group['layers'] if layer != group['owner'])}"


def group_title(group: Json) -> str:
    """What a group of the sharing map says under the mouse."""
    readers = [str(layer) for layer in group["layers"] if layer != group["owner"]]
    text = f"layer {group['owner']} " + (f"owns, {', '.join(readers)} read" if readers else "shares with no other")
    if group["damage"] is not None:
        text += f"; damage {group['damage']:.3g}"
    if group["captured_k"] is not None:
        text += f"; {100 * group['captured_k']:.1f}% of keys, {100 * group['captured_v']:.1f}% of values kept"
    return text


@dataclass(frozen=True)
class Strip:
    """The sharing map: one box a group in HTML; owner <- readers, and a picture, in Markdown."""

    sources: list[int | None]
    groups: list[Json]
    worst: float | None
    picture: bool

    def markdown(self) -> str:  # noqa: D102
        text = f"Owner <- layers that read its K/V:\n\n{fenced(groups_text(self.sources))}".replace(
            "Owner <-", "Owner &lt;-", 1
        )
        return f"{text}\n\n{Figure('sharing', ALT).markdown()}" if self.picture else text

    def html(self, svgs: Svgs) -> Markup:  # noqa: D102
        boxes = Markup("\n").join(map(self._box, self.groups))
        meaning = Markup("One box a group: the filled layer owns keys and values, the dashed ones read them.")
        if self.worst:
            meaning += Markup(
                ' The frame\'s colour is the damage <span class="scale"></span> from 0 to {}: the relative squared '
                "error of the group's attention output on calibration text, before uptraining."
            ).format(number(self.worst, 2))
        return Markup('<ol class="strip" aria-label="sharing groups">\n{}\n</ol>\n<p class="note">{}</p>').format(
            boxes, meaning
        )

    @staticmethod
    def _box(group: Json) -> Markup:
        layers = Markup("").join(
            Markup('<span class="layer{}">{}</span>').format(" owner" if layer == group["owner"] else "", layer)
            for layer in group["layers"]
        )
        heat = Markup(' style="--damage: {}"').format(round(group["heat"], 3)) if group["heat"] is not None else ""
        return Markup('<li class="group"{} title="{}">{}</li>').format(heat, group_title(group), layers)


def draw(run: RunFiles, report: Json) -> Mapping[str, Picture]:
    """The map as a picture, for Markdown."""
    converted = report["converted"]
    if not converted.get("kv_source_layers"):
        return {}
    return {"sharing": Picture(ALT, partial(draw_sharing, converted["kv_source_layers"], report["sharing"]["groups"]))}


register(Section("sharing", place=55, title="Sharing map", collect=collect, show=show, draw=draw, needs=("model",)))
