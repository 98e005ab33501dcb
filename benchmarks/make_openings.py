"""Make cla_convert/data/openings.parquet: how documents of many kinds begin, for `generate: {start: prefix}`.

    python benchmarks/make_openings.py CORPUS_FOLDER

CORPUS_FOLDER holds prefixes.parquet (columns id, text, source, kind). Taken are the first words of documents of the
sources below, all in the public domain or under a licence that asks for attribution at most; licences stand in
cla_convert/data/README.md.
"""

import hashlib
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SOURCES = [
    "bitcoin_transcripts", "business_software_docs", "classic_books", "design_proposals", "fomc_transcripts", "medquad",
    "nasa_transcripts", "reviews", "sotu", "tech_blogs", "usgov_web", "world_factbook",
]  # fmt: skip
EACH = 300
WORDS = 24
"""Enough for sixteen tokens of any tokenizer."""
OUT = Path(__file__).parents[1] / "cla_convert" / "data" / "openings.parquet"


def opening(text: str) -> str:
    """The first words of a text, with its line breaks."""
    return re.match(rf"\s*(?:\S+\s+){{0,{WORDS - 1}}}\S*", text)[0].strip()


def main() -> None:
    """Write the file and say what is in it."""
    rows = pq.read_table(Path(sys.argv[1]) / "prefixes.parquet").to_pylist()
    taken = []
    for source in SOURCES:
        ours = [row for row in rows if row["source"] == source and row["kind"] == "doc"]
        ours = sorted(ours, key=lambda row: row["id"])[:: max(1, len(ours) // EACH)][:EACH]
        taken += [{"id": row["id"], "source": source, "text": opening(row["text"])} for row in ours]
        print(f"{source}: {len(ours)}")
    # Interleaved, so that any stretch of the file holds every kind.
    taken.sort(key=lambda row: hash_of(row["id"]))
    pq.write_table(pa.Table.from_pylist(taken), OUT, compression="zstd", compression_level=19)
    print(f"{len(taken)} openings, {sum(len(row['text']) for row in taken)} characters, {OUT.stat().st_size} bytes")


def hash_of(name: str) -> str:
    """An order that has nothing to do with the source."""
    return hashlib.sha256(name.encode()).hexdigest()


if __name__ == "__main__":
    main()
