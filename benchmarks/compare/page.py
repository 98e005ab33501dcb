"""The page of a comparison: tables, plots and how each number was made, from the JSON of the run folders alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arms import Arm, Comparison, Table
from plots import draw_domains, draw_sensitivity
from work import Place

from cla_convert.files import read_json, write_bytes, write_json
from cla_convert.report.figures import to_png
from cla_convert.report.formats import count, hardware_line
from cla_convert.report.run_folder import RunFiles, explained, read_run_folder
from cla_convert.report.run_plots import draw_learning, draw_pareto, has_pareto
from cla_convert.report.section import Material
from cla_convert.report.sections.domains import domain_table
from cla_convert.report.sections.runs import rows_of, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]


@dataclass
class Page:
    """What is written: Markdown, pictures beside it, and the rows for programs."""

    parts: list[str] = field(default_factory=list)
    pictures: dict[str, "Figure"] = field(default_factory=dict)
    rows: dict[str, list[Json]] = field(default_factory=dict)

    def picture(self, name: str, alt: str, figure: "Figure") -> None:
        self.pictures[name] = figure
        self.parts.append(f"![{alt}]({name}.png)")


def write_page(comparison: Comparison, place: Place, states: Mapping[str, str]) -> Path:
    """Write results.md, results.json and the pictures into the output folder."""
    page, runs = Page(), _runs(comparison, place, states)
    page.parts += ["# Comparison", "KV bytes are of caches in 16 bits."]
    for number, one in enumerate(comparison.tables, 1):
        named = [name for name in one.arms if name in comparison.arms]
        if named:
            _add_table(page, Table(one.title, named), number, runs, place, states)
    _add_sensitivity(page, runs)
    _add_commands(page, comparison.arms, runs, place)
    for name, figure in page.pictures.items():
        write_bytes(place.out / f"{name}.png", to_png(figure))
    write_json(place.out / "results.json", page.rows)
    path = place.out / "results.md"
    write_bytes(path, ("\n\n".join(page.parts) + "\n").encode())
    return path


def _runs(comparison: Comparison, place: Place, states: Mapping[str, str]) -> dict[str, RunFiles]:
    done = [name for name, arm in comparison.arms.items() if states[name] == "done" and not arm.cache]
    return {name: read_run_folder(place.run(name)) for name in done}


def _add_table(
    page: Page, one: Table, number: int, runs: Mapping[str, RunFiles], place: Place, states: Mapping[str, str]
) -> None:
    here = {name: runs[name] for name in one.arms if name in runs}
    page.parts.append(f"## {one.title}")
    if here:
        rows = _rows(here)
        blank = dict.fromkeys(rows[0]) | {"curves": {"validation": [], "kl": []}}
        for row in (read_json(place.cache(name)) for name in one.arms if states[name] == "done"):
            rows += [blank | one for one in row["rows"]] if row else []
        page.rows[one.title] = rows
        page.parts.append(table(rows).markdown())
        page.parts += _tokens_saved(rows)
        _add_plots(page, number, rows, here)
    if missing := [f"{name} ({states[name]})" for name in one.arms if states[name] != "done"]:
        page.parts.append(f"Missing: {', '.join(missing)}.")


def _rows(runs: Mapping[str, RunFiles]) -> list[Json]:
    """As `cla-convert report` shows several runs: the source model, then each; KV bytes are of 16-bit caches."""
    first, *others = runs.values()
    with explained(first.path):
        found = rows_of(Material(first, others))
    wide = 2 if first.kv_cache.get("before", {}).get("dtype") == "float32" else 1
    for row in found:
        row["label"] = row["label"].replace(str(first.path), first.path.name)
        row["kv_bytes_per_token"] /= wide
    return found


def _short(rows: list[Json]) -> list[Json]:
    """The rows with names that fit into a picture: without the model's."""
    models = {row["label"].split("-")[0] for row in rows if "-" in row["label"]}
    return [row | {"label": row["label"].removeprefix(f"{min(models)}-")} for row in rows] if len(models) == 1 else rows


def _add_plots(page: Page, number: int, rows: list[Json], runs: Mapping[str, RunFiles]) -> None:
    sizes = {row["kv_bytes_per_token"] for row in rows if row["point"] != "before"}
    if len(sizes) > 1 and has_pareto(rows):
        page.picture(f"bytes-{number}", "quality against KV bytes per token", draw_pareto(_short(rows)))
    learned = [row for row in rows if any(row["curves"].values())]
    if len(learned) > 1:
        page.picture(f"tokens-{number}", "perplexity and KL over training tokens", draw_learning(_short(learned)))
    domains = {name: found for name, run in runs.items() if run.train and (found := _shipped(domain_table(run)))}
    if domains:
        page.picture(f"domains-{number}", "KL by domain, before and after training", draw_domains(domains))


def _shipped(domains: Mapping[str, Json]) -> dict[str, Json]:
    """Without text files, which not every run has."""
    return {name: row for name, row in domains.items() if not row["own"]}


def _tokens_saved(rows: Sequence[Json]) -> list[str]:
    """By how many tokens a run is ahead of those that end where it has been."""
    said = []
    for slow in rows:
        end = slow["curves"]["validation"]
        for fast in rows:
            curve = fast["curves"]["validation"]
            if fast is slow or not end or not curve or fast["tokens"] != slow["tokens"]:
                continue
            reached = next((tokens for tokens, value in curve if value <= end[-1][1]), None)
            if reached is not None and reached < end[-1][0]:
                where = f"after {count(reached)} tokens" if reached else "before any training"
                said.append(f"- {fast['label']} has the held-out perplexity at which {slow['label']} ends {where}.")
    return ["\n".join(said)] if said else []


def _add_sensitivity(page: Page, runs: Mapping[str, RunFiles]) -> None:
    """Of every pair of neighbours alone, where a map was measured; each model once."""
    seen: dict[str, str] = {}
    for name, run in runs.items():
        groups = (run.convert.get("auto") or {}).get("damage") or []
        pairs = [group for group in groups if len(group["layers"]) == 2]
        model = (run.recipe.get("source") or {}).get("model", "")
        if pairs and seen.setdefault(model, name) == name:
            page.parts.append(f"## Sensitivity of pairs of layers, as {name} measured it")
            page.picture(f"sensitivity-{name}", "KL of sharing each pair alone", draw_sensitivity(pairs))


def _add_commands(page: Page, arms: Mapping[str, Arm], runs: Mapping[str, RunFiles], place: Place) -> None:
    page.parts.append("## How each was made")
    for name in arms:
        record = read_json(place.record(name))
        if not record:
            continue
        lines = [f"{name}: {record['ended']}, {record['seconds']:.0f} s", f"    {record['command']}"]
        if run := runs.get(name):
            lines.append(f"    {_circumstances(run)}")
        page.parts.append("\n".join([lines[0], "", *lines[1:]]))


def _circumstances(run: RunFiles) -> str:
    made = run.environment
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("cla-convert", "torch", "transformers"))
    speed = run.train.get("tokens_per_second")
    rate = f"; {speed:,.0f} tokens/s in training" if speed else ""
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in made.get("stages", {}).items())
    seed = run.recipe.get("seed")
    return f"{made['started'][:10]}; {hardware_line(made['hardware'])}; {versions}; seed {seed}; {stages}{rate}"
