"""The sections `source` and `data`: the model, and the text."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .section import Count, Dtype, Section


class Source(Section):
    """The model to convert."""

    model: str = ""
    """Hub id, local folder, .gguf file, or `package:NAME/FILE` for a file that an installed Python package carries."""
    base_model: str | None = None
    """Hub id of what a local folder or GGUF file is a copy of, for the model card."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "auto"
    """Dtype of the converted weights. auto: each tensor as it is stored; a GGUF file is dequantised to float32."""
    text_only: bool = False
    """Of a model that also sees images, convert the language model alone, to a model that only reads. Off: the output
    is the whole model, in which everything else is what it was."""
    allow_pickle: bool = False
    """Accept pickled .bin weights (loaded with weights_only=True). Off unless you ask for it."""


Start = Literal["separator", "prefix", "random", "chat"]


class Generate(Section):
    """Text sampled from the source model itself, for `generate: {...}`; `generate: 2M` is `generate: {tokens: 2M}`."""

    tokens: Annotated[Count, Field(gt=0)] | Literal["auto"] = "auto"
    """Tokens to sample at most; a longer budget repeats them. auto: as many as the budget needs."""
    start: Start | Annotated[list[Start], Field(min_length=1)] = ["separator", "prefix"]
    """What a document begins with; of a list, documents take turns. separator: the token that the model was pretrained
    to begin documents with, found by measurement. prefix: then the first tokens of a real document, for more kinds of
    text. random: then a random token of the vocabulary (LLM-QAT, arXiv 2305.17888). chat: the opening of a user's turn
    by the chat template; the model writes both turns (MAGPIE, arXiv 2406.08464)."""
    openings: str | None = None
    """prefix: file, folder or glob of texts whose first tokens are taken. None: openings of twelve kinds of documents
    shipped with the package."""
    opening_tokens: int = Field(default=8, ge=1, le=64)
    """prefix: longest opening; lengths from 1 are equally likely."""
    length: int = Field(default=1024, ge=8)
    """Tokens of a row; at most what the model was built for. Documents fill it one after another, and see nothing of
    each other; the last is cut."""
    temperature: float = Field(default=1.0, gt=0)
    """1: the model's own distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability. 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many most likely tokens. 0: from all."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Share of documents to leave out: those with the highest perplexity under the model itself."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows sampled at a time, and kept at a time: an interruption loses one batch. auto: 64 on a CPU; on a GPU what its
    memory holds, up to 4096."""

    @property
    def starts(self) -> list[Start]:
        """What documents begin with, in turns."""
        return self.start if isinstance(self.start, list) else [self.start]

    @model_validator(mode="after")
    def _openings_are_used(self) -> "Generate":
        if self.openings is not None and "prefix" not in self.starts:
            raise ValueError("openings are for `start: prefix`")
        return self


def _tokens_alone(value: Any) -> Any:
    return {"tokens": value} if isinstance(value, (int, str)) else value


class TextSource(Section):
    """One source of text: local files, a hub dataset, or the source model itself."""

    path: str | None = None
    """File, folder or glob: .txt, .md (one document a file), .jsonl(.gz) or .parquet (one document a row)."""
    dataset: str | None = None
    """Hub dataset id, streamed; or a folder that `datasets.load_dataset` reads."""
    generate: Annotated[Generate | None, BeforeValidator(_tokens_alone)] = None
    """Number of tokens to sample from the source model, such as 2M; auto: as many as needed; or a section
    (`data.sources[].generate`)."""
    config: str | None = None
    """Configuration name of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    split: str = "train"
    """Split of the dataset."""
    text_field: str = "text"
    """Column that holds the text, for jsonl, parquet and hub datasets."""
    messages_field: str | None = None
    """Column of conversations, read instead of text: lists of turns, {role, content} or {from, value}, which the
    model's own chat template puts together."""
    document_field: str | None = None
    """Column that names the work a row is a part of: rows of one work stay on one side of the held-out split."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture (by tokens), relative to the others."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "TextSource":
        given = [name for name in _FOREIGN if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"give exactly one of `path`, `dataset` and `generate`; {found}")
        fields = type(self).model_fields
        foreign = [*_FOREIGN[given[0]], *(["text_field"] if self.messages_field else [])]
        useless = [name for name in foreign if getattr(self, name) != fields[name].default]
        if useless:
            kind = given[0] if useless != ["text_field"] or not self.messages_field else "messages_field"
            raise ValueError(f"{', '.join(useless)}: not for a source with `{kind}`")
        return self

    @property
    def columns(self) -> list[str]:
        """What is read of a row: its content first."""
        return [name for name in (self.messages_field or self.text_field, self.document_field) if name]


_FOREIGN = {
    "path": ("config", "revision", "split"),
    "dataset": (),
    "generate": ("config", "revision", "split", "text_field", "messages_field", "document_field"),
}
"""Kind of source -> settings that mean nothing there: refused, so that nobody believes that they had an effect."""


class Data(Section):
    """Text for calibration and uptraining. Without sources, the small public-domain sample shipped with the package."""

    sources: list[TextSource] = []
    """Where the text comes from; weights make it a mixture."""
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of documents kept out of calibration and uptraining, for validation and held-out perplexity."""

    @property
    def sampled(self) -> bool:
        """Whether the source model writes some of the text."""
        return any(source.generate for source in self.sources)
