"""Perplexity of every text, and how far the predictions are from the source model's."""

from collections.abc import Sequence

from ..comparisons import cost, difference
from ..content import Block, Column, Heading, Paragraph, Row, Table
from ..formats import bracket, change_interval, integer, number, p_value, percent, percent_interval, titled
from ..run_folder import POINTS, Json
from ..section import Material, Section, register
from ..text import Text, note


def collect(material: Material, report: Json) -> Json:
    """perplexity {name: {before, converted, after, control, unit, relative, ...}}: held-out text, text files, tasks;
    agreement with the source by point, on held-out text, and text_agreement by text file and point.

    With a control, `cla_cost` holds delta, ci95, relative_ci95 and p_value of after against the control, paired by
    window or document.
    """
    run, control = material.run, material.control
    table: dict[str, Json] = {}
    for name in ["held_out", *dict.fromkeys(name for texts in run.texts.values() for name in texts)]:
        files = run.held_out if name == "held_out" else {p: t[name] for p, t in run.texts.items() if name in t}
        if files:
            statistics = {"ci95": None, "p_value": None} | material.comparison["perplexity"].get(name, {})
            table[name] = statistics | _text(files)
            if control:
                table[name]["cla_cost"] = cost(control["perplexity"].get(name, {}))
    for task, metrics in report["tasks"].items():
        for metric, unit in (("word_perplexity", "word"), ("perplexity", "answer")):
            if metric in metrics:
                table[task] = {**metrics[metric], "unit": unit}
    for row in table.values():
        last = row[run.last_point]
        row["last"], row["delta"] = last, difference(row["before"], last)
        row["relative"] = None if row["delta"] is None else last / row["before"] - 1
        row["cla_cost_relative"] = row["after"] / row["control"] - 1 if row["after"] and row["control"] else None
    return {
        "perplexity": table,
        "agreement": {point: _without_windows(row) for point, row in run.agreement.items()},
        "text_agreement": _by_text(run.text_agreement),
    }


def _by_text(agreement: dict[str, dict[str, Json]]) -> dict[str, dict[str, Json]]:
    """{name: {point: kl, top1, tokens, ci95, ...}} of text files."""
    names = dict.fromkeys(name for texts in agreement.values() for name in texts)
    return {
        name: {point: _without_windows(texts[name]) for point, texts in agreement.items() if name in texts}
        for name in names
    }


def _without_windows(row: Json) -> Json:
    return {name: value for name, value in row.items() if name not in ("windows", "identity")}


def _text(files: dict[str, Json]) -> Json:
    """Perplexity of one text at every point, and its tokens."""
    tokens = next((value.get("tokens") for value in files.values() if value.get("tokens")), None)
    return {point: files.get(point, {}).get("perplexity") for point in POINTS} | {"unit": "token", "n": tokens}


def show(report: Json) -> Sequence[Block]:
    """The table of texts, and the agreement with the source model."""
    blocks: list[Block] = []
    if report["perplexity"]:
        blocks = [
            _texts(report),
            Paragraph(_note(report["perplexity"], report["compared_point"]), "note"),
        ]  # fmt: skip
    texts = {"held_out": report["agreement"]} | report["text_agreement"]
    if any(texts.values()):
        blocks += [Heading("Agreement with the source model"), _agreement(texts)]
    return blocks


def _note(perplexity: dict[str, Json], last: str) -> str:
    """What the columns mean; that p has a least value where there are few documents."""
    least = ""
    documents = [row["n"] for row in perplexity.values() if row["unit"] != "token" and row["n"]]
    if few := [n for n in documents if n <= 5]:
        n = min(few)
        least = f", which for {n} documents gives no p below {p_value(2.0 ** (1 - n))}"
    return (
        "Lower is better. n: documents, or tokens where the perplexity is per token. The change is that of "
        f"{last} from before, as a share, or a factor beyond a doubling. p: sign-flip test on log-likelihoods{least}."
    )


def _texts(report: Json) -> Table:
    at, control = report["points"], "control" in report["points"]
    columns = [Column("text", text=True), Column("per", text=True, quiet=True), Column("n", quiet=True)]
    columns += [Column(point) for point in at]
    columns += [Column("change [95% CI]", long=True), Column("p")]
    columns += [Column("CLA cost, change [95% CI]", long=True)] if control else []
    rows = [
        Row(
            [
                titled(name), row["unit"], integer(row["n"]), *(number(row[point]) for point in at),
                _changed(row["relative"], row.get("relative_ci95")), p_value(row["p_value"]),
                *([_changed(row["cla_cost_relative"], _interval_of_cost(row))] if control else []),
            ]
        )
        for name, row in report["perplexity"].items()
    ]  # fmt: skip
    return Table(columns, rows, "cards wide")


def _changed(value: float | None, ci95: list[float] | None) -> Text:
    """`+6.7% [+6.6%, +6.8%]`: the interval that the verdict goes by; none without windows."""
    said, ends = change_interval(value, ci95)
    return [f"{said} ", note(ends)]


def _interval_of_cost(row: Json) -> list[float] | None:
    return (row.get("cla_cost") or {}).get("relative_ci95")


def _agreement(agreement: dict[str, dict[str, Json]]) -> Table:
    columns = [
        Column("text", text=True), Column("model", text=True),
        Column("KL to the source, nats per token [95% CI]", long=True),
        Column("same most likely token, % [95% CI]", long=True), Column("tokens", quiet=True),
    ]  # fmt: skip
    rows = []
    for name, point, row in ((name, point, row) for name, points in agreement.items() for point, row in points.items()):
        ci95 = row.get("ci95") or {}
        kl = [f"{number(row['kl'], 3)} ", note(bracket(ci95.get("kl")))]
        same = [f"{percent(row['top1'])} ", note(percent_interval(ci95.get("top1")))]
        rows.append(Row([titled(name), point, kl, same, integer(row["tokens"])]))
    return Table(columns, rows)


register(Section("perplexity", place=30, title="Perplexity", collect=collect, show=show, needs=("accuracy",)))
