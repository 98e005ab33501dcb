"""Recovery by domain: how far from the source model each kind of text is left, and what to do about it."""

from collections.abc import Sequence
from typing import Any

from ...evaluation.domains.overlap import COPIED
from ..content import Block, Bullets, Column, Paragraph, Row, Table
from ..formats import change, count, number, percent, yes_no
from ..run_folder import Json, RunFiles
from ..section import Material, Section, register

_POINTS = ("before", "converted", "after")


def collect(material: Material, report: Json) -> Json:
    """domains and domain_advice."""
    domains = domain_table(material.run)
    return {"domains": domains, "domain_advice": domain_advice(domains, material.margins.perplexity)}


def domain_table(run: RunFiles) -> dict[str, Json]:
    """{name: {perplexity, kl, recovered, relative, touched, ...}}, the one with the largest KL first.

    recovered is the share of the KL that training took away again: 1 - after / converted; negative where it added some.
    Text files that the KL was measured on stand among the domains (own: true); their perplexity is of the whole file.
    """
    last = run.last_point
    scores = {point: run.domains[point]["domains"] for point in _POINTS if "domains" in run.domains.get(point, {})}
    rows = {name: _row(name, scores, run.touched.get(name, {}), last, own=False) for name in _names(scores)}
    texts = {point: run.texts.get(point, {}) for point in _POINTS}
    compared = {point: run.text_agreement.get(point, {}) for point in _POINTS}
    for name in _names(compared):
        both = {point: {name: _whole(texts[point].get(name)) | _kl(compared[point].get(name))} for point in _POINTS}
        label = f"{name} (own text)" if name in rows else name
        rows[label] = _row(name, both, run.touched_texts.get(name, {}), last, own=True)
    return dict(sorted(rows.items(), key=lambda item: -_badness(item[1], last)))


def _names(scores: dict[str, Json]) -> list[str]:
    return list(dict.fromkeys(name for table in scores.values() for name in table))


def _whole(measured: Json | None) -> Json:
    return {"perplexity": (measured or {}).get("perplexity")}


def _kl(compared: Json | None) -> Json:
    return {"kl": compared.get("kl"), "tokens": compared.get("tokens")} if compared else {}


def _row(name: str, scores: dict[str, Json], touched: Json, point: str, *, own: bool) -> Json:
    """A row of the table; its change is that of `point`, the last one, measured or not."""
    found: dict[str, Json] = {point: table.get(name, {}) for point, table in scores.items()}
    perplexity = {point: found.get(point, {}).get("perplexity") for point in _POINTS}
    kl = {point: found.get(point, {}).get("kl") for point in _POINTS[1:]}
    last = perplexity[point]
    recovered = 1 - kl["after"] / kl["converted"] if kl["after"] is not None and kl["converted"] else None
    return {
        "own": own,
        "perplexity": perplexity,
        "kl": kl,
        "recovered": recovered,
        "relative": last / perplexity["before"] - 1 if last and perplexity["before"] else None,
        "tokens": next((one["tokens"] for one in found.values() if one.get("tokens")), None),
        "touched": touched.get("touched"),
        "similarity": touched.get("similarity"),
        "held_out_similarity": touched.get("held_out_similarity"),
        "contained": touched.get("contained"),
    }


def _badness(row: Json, point: str) -> float:
    kl: Any = row["kl"][point]
    return kl if kl is not None else row["relative"] or 0.0


def domain_advice(domains: dict[str, Json], close: float = 0.05) -> list[str]:
    """What to do about the domains, worst first; a sentence for each reason.

    Args:
        domains: as `domain_table` returns them.
        close: perplexity above the source's by no more needs nothing done.
    """
    far = {name: row for name, row in domains.items() if row["relative"] is not None and row["relative"] > close}
    missing = _named({name: row for name, row in far.items() if row["touched"] is False})
    known = _named({name: row for name, row in far.items() if row["touched"]})
    unknown = _named({name: row for name, row in far.items() if row["touched"] is None})
    copied = [name for name, row in domains.items() if (row["contained"] or 0) > COPIED]
    said = []
    if missing:
        said.append(
            f"Far from the source, and the training text holds nothing of the kind: {missing}. Add such text to "
            "data.sources, or text sampled from the source model (generate: auto)."
        )
    if known:
        said.append(
            f"Far from the source, though the training text holds such text: {known}. Give it more weight in "
            "data.sources, or train on more tokens."
        )
    if unknown:
        said.append(f"Far from the source: {unknown}. Add such text to data.sources, or train on more tokens.")
    if copied:
        said.append(f"{', '.join(copied)}: parts of this very text were trained on; its numbers are too good.")
    if domains and not far and all(row["relative"] is not None for row in domains.values()):
        said.append(f"No domain is more than {100 * close:g}% above the source's perplexity.")
    return said


def _named(domains: dict[str, Json]) -> str:
    """`law (+31.0%), code (+12.0%)`."""
    return ", ".join(f"{name} ({change(row['relative'])})" for name, row in domains.items())


def show(report: Json) -> Sequence[Block]:
    """The table, what its columns mean, and the advice."""
    if not report["domains"]:
        return []
    columns = [
        Column("domain", text=True), Column("trained on such text", text=True), Column("perplexity before"),
        Column("perplexity converted"), Column("perplexity after"), Column("change of perplexity"),
        Column("KL converted"), Column("KL after"),
        Column("recovered, %"),
    ]  # fmt: skip
    rows = [
        Row(
            [
                name, yes_no(row["touched"]), *(number(row["perplexity"][point]) for point in _POINTS),
                change(row["relative"]), number(row["kl"]["converted"], 3), number(row["kl"]["after"], 3),
                percent(row["recovered"]),
            ]
        )
        for name, row in report["domains"].items()
    ]  # fmt: skip
    return [
        Table(columns, rows, "cards wide"), Paragraph(_note(report["domains"]), "note"),
        Bullets(report["domain_advice"]),
    ]  # fmt: skip


def _note(domains: dict[str, Json]) -> str:
    """What the columns mean."""
    own = {name: row for name, row in domains.items() if row["own"]}
    tokens = sorted({row["tokens"] for row in domains.values() if row["tokens"] and not row["own"]})
    amount = " to ".join(count(n) for n in dict.fromkeys((tokens[0], tokens[-1]))) if tokens else "some"
    shipped = f"{amount} tokens a domain, shipped with cla-convert. " if len(own) < len(domains) else ""
    read = ", ".join(f"{name}, {count(row['tokens'] or 0)} tokens" for name, row in own.items())
    files = f"Text files, of which the KL is on their beginning: {read}. " if own else ""
    few = " So few tokens give an indication, not a measurement." if tokens and tokens[0] < 4096 else ""
    return (
        f"{shipped}{files}KL from the source model, nats per token. Recovered: the "
        "share of the KL after conversion that training took away. Trained on such text: its rows are as near to the "
        f"training text as that text's own held-out rows.{few}"
    )


register(Section("domains", place=40, title="Recovery by domain, largest KL first", collect=collect, show=show))
