"""The recipe: every setting of a run, what it means and its default. Unknown keys are refused.

A recipe is a YAML file with the sections below; `recipe_file` reads it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SIZES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_count(value: Any) -> Any:
    """`"26M"` -> 26_000_000 (k, M, B, T; decimals and underscores allowed); other types pass through to pydantic."""
    return _parse_number(value, _UNITS, "a number of tokens such as 500k, 26M or 2B")


def parse_size(value: Any) -> Any:
    """`"5GB"` -> 5_000_000_000 (KB, MB, GB, KiB, ...); other types pass through to pydantic."""
    return _parse_number(value, _SIZES, "a size such as 500MB or 5GB")


def _parse_number(value: Any, units: dict[str, int], expected: str) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([\d_]+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if not match or match[2].lower() not in units:
        raise ValueError(f"{value!r} is not {expected}")
    return round(float(match[1].replace("_", "")) * units[match[2].lower()])


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, docstrings under fields are their documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


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
    """Tokens of a row. Documents fill it one after another, and see nothing of each other; the last is cut."""
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
        useless = [name for name in _FOREIGN[given[0]] if getattr(self, name) != fields[name].default]
        if useless:
            raise ValueError(f"{', '.join(useless)}: not for a source with `{given[0]}`")
        return self


_FOREIGN = {
    "path": ("config", "revision", "split"),
    "dataset": (),
    "generate": ("config", "revision", "split", "text_field", "document_field"),
}
"""Kind of source -> settings that mean nothing there: refused, so that nobody believes that they had an effect."""


class Data(Section):
    """Text for calibration and uptraining. Without sources, the small public-domain sample shipped with the package."""

    sources: list[TextSource] = []
    """Where the text comes from; weights make it a mixture."""
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of documents kept out of calibration and uptraining, for validation and held-out perplexity."""


class Calibration(Section):
    """Settings of `init: calibrated`."""

    tokens: Annotated[Count, Field(gt=0)] | Literal["auto"] = "auto"
    """Calibration tokens, taken from `data`. auto: what takes a minute or less on a data-centre GPU (2.6M for a 135M
    model, fewer for larger ones, 65,536 at least), or minutes on a CPU (24,576)."""
    sequence_length: int = Field(default=1024, ge=16)
    """Length of a calibration sequence; at most what the model was built for."""
    steps: int | None = Field(default=None, ge=0)
    """Matching steps of each group (docs/how-it-works.md); 0: the closed form alone. None: 60 of 8192 tokens, and more
    where there is more text (369 for 2.6M tokens); on a CPU 20 of 2048. What a step takes grows with the cube of the
    hidden size, so a large model on a CPU may afford only a few."""


class Convert(Section):
    """Which layers share K/V, and what the shared projections start from."""

    sharing: str | list[int] | list[list[int]] = "cla2-keep-ends"
    """Pattern (cla<k>, cla<k>-keep-ends, dense-front[:n], dense-back[:n], trailing:<n>), a list of groups
    [[0],[1,2],...], a list of owners, one per layer (kv_source_layers), or auto: the map that costs least under
    `kv_budget`, by measurements on calibration text."""
    kv_budget: float | None = Field(default=None, gt=0, le=1)
    """Share of the source's KV cache that `sharing: auto` may keep; 0.5 if not given."""
    init: Literal["calibrated", "mean", "first"] = "calibrated"
    """calibrated: fit the shared projections to the source model's activations on a little text (docs/how-it-works.md).
    mean: equal-weight mean over the group, in float32 (GQA's and CLA's way). first: keep the owner's projections."""
    calibration: Calibration = Calibration()
    """Settings of `init: calibrated`."""
    max_shard_size: Size = 5_000_000_000
    """Largest safetensors shard to write."""

    @model_validator(mode="after")
    def _auto(self) -> "Convert":
        if self.kv_budget is not None and self.sharing != "auto":
            raise ValueError("kv_budget is for `sharing: auto`; a pattern or map says itself what it keeps")
        if self.sharing == "auto" and self.init != "calibrated":
            raise ValueError("`sharing: auto` measures calibrated pooling: `init` must be calibrated")
        return self


class Train(Section):
    """Uptraining: recover the quality on a token budget. `tokens: 0` skips it."""

    tokens: Count = 0
    """Token budget."""
    loss: Literal["distill", "cross_entropy"] = "distill"
    """distill: forward KL from a frozen teacher. cross_entropy: next-token loss on the data."""
    teacher: str | None = None
    """Model to distil from: hub id, local folder or .gguf file, with the same tokenizer. None: the source model."""
    temperature: float = Field(default=1.0, gt=0)
    """distill: softens both distributions; the KL is scaled by its square (Hinton et al. 2015)."""
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    """distill: adds so many times the cross-entropy on the data."""
    hidden_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """distill: adds |student - teacher|^2 / |teacher|^2 of the residual streams, averaged over all layers, with a
    weight that falls linearly from this to 0 at the end of the budget. auto: 30, or 0 for a teacher of another depth
    or width."""
    parameters: Literal["all", "attention", "shared"] = "all"
    """What is trained. attention: the weights of all attention layers. shared: of the layers that share K/V,
    owners and consumers."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw. muon: Muon (arXiv 2502.16982) for the matrices of the decoder layers, AdamW for the rest (torch 2.9)."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate. auto: 1e-3 for attention and a fifth of it for the rest at a width of 576, in proportion to
    1/width for other models; with `loss: cross_entropy` the former for all (docs/uptraining.md)."""
    learning_rates: dict[Literal["shared", "attention", "other"], Annotated[float, Field(gt=0)]] = {}
    """Peak rates for parts of the model, in place of `learning_rate`. shared: attention of layers that share K/V;
    attention: of all layers (but those, if `shared` is given too); other: everything else."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate over tokens; wsd: constant, then 1-sqrt decay over the last 20%."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Share of the budget for linear warm-up."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of a cosine schedule, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's betas."""
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    sequence_length: int = Field(default=1024, ge=8)
    """Tokens in a packed sequence."""
    document_masking: bool | Literal["flex"] = False
    """Documents packed into one sequence do not see each other: attention and positions start anew with each, and no
    loss is taken on the first token of the next one. False: they are separated by EOS only. flex: as true, but on a GPU
    through FlexAttention, which has not been measured on one yet."""
    batch_tokens: Count = 32_768
    """Tokens in an optimiser step (a multiple of sequence_length)."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Sequences in one forward/backward pass; gradients accumulate up to batch_tokens. auto: 8 on a CPU; on a GPU what
    its memory holds, up to 32k tokens."""
    precision: Literal["auto", "bfloat16", "tf32", "float32"] = "auto"
    """Compute precision. auto: bfloat16 where the hardware has it, else float32; weights and optimiser stay float32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the layers and the loss. auto: on a GPU, if the run is long enough to pay the half minute back."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    validate_every: Count = 2_000_000
    """Validation perplexity every so many tokens (and at the end)."""
    validation_tokens: Count = 32_768
    """Tokens of held-out text used for it."""
    checkpoint_every: Count = 2_000_000
    """Save a resumable checkpoint every so many tokens."""
    spike: float = Field(default=2.0, ge=0)
    """Stop if the loss stays above so many times its median over 100 steps for 10 steps in a row. 0: never."""
    log_to: list[Literal["tensorboard", "wandb"]] = []
    """Where to send metrics besides metrics.jsonl; each needs the extra of its name: cla-convert[wandb]."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints to keep; older ones go once a newer one is whole."""
    keep_checkpoints_after_success: bool = False
    """Keep them once the uptrained model is published too; three times its float32 size each."""
    control: bool = False
    """Uptrain the source model too, on the same tokens with the same loss: what CLA cost is then the uptrained model
    minus this control, whatever the data taught. Doubles the training time. Pure distillation needs none."""

    @property
    def needs_control(self) -> bool:
        """Whether to train a control: without weight decay, distilling the source from itself changes nothing."""
        itself = self.loss == "distill" and not (self.teacher or self.cross_entropy_weight or self.weight_decay)
        return self.control and self.tokens > 0 and not itself


class TextFile(Section):
    """A text whose perplexity is measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What the report calls it."""
    path: str
    """A UTF-8 text file."""
    window: int = Field(default=1024, ge=2)
    """Tokens of a window. Windows do not overlap; every token is predicted once, from those before it in its window."""
    characters: Count | None = None
    """Read only so many characters from its start. None: all."""


class Retrieval(Section):
    """The grid of the tasks `passkey` and `needle`, which run when `eval.tasks` names them."""

    lengths: list[Annotated[int, Field(ge=16)]] = []
    """Context lengths in tokens, answer included. Empty: a quarter, half and all of what the model is fed
    (`eval.max_length`, or the model's context if that is shorter)."""
    depths: list[Annotated[float, Field(ge=0, le=1)]] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Where the fact stands: 0 before all filling text, 1 after it."""
    samples: int = Field(default=4, ge=1)
    """Documents for every length and depth."""


class Evaluate(Section):
    """The same frozen specification for the source, the converted and the uptrained model."""

    tasks: list[str] = ["hellaswag", "piqa", "winogrande", "openbookqa", "boolq", "arc_easy", "wikitext"]
    """lm-eval tasks, passkey, needle. The names of the offline pack use the shipped rows; any other stock task needs a
    network or `task_data`."""
    offline_pack: bool = True
    """Use the rows shipped with the package for the tasks it has. False: the full stock tasks, from the hub."""
    task_data: str | None = None
    """Folder of full evaluation sets, one folder a task (docs/evaluation.md); tasks without one are as ever."""
    perplexity: list[TextFile] = []
    """Text files whose perplexity and bits per byte are measured at every point."""
    agreement_tokens: Count = 8192
    """Tokens of held-out text for KL divergence from the source model and top-1 agreement with it. 0: not measured."""
    domain_tokens: Count | Literal["auto"] = "auto"
    """Tokens of each of seven kinds of text shipped with the package (encyclopaedia, web, news, law, science, dialogue,
    code) on which perplexity and KL from the source model are measured. auto: all, 5k to 7k; on a CPU 512. 0: none."""
    retrieval: Retrieval = Retrieval()
    """Context lengths and depths of the tasks `passkey` and `needle`."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task (the first n), passkey and needle apart. None: all."""
    limits: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Documents of single tasks, in place of `limit`: a page of wikitext costs as much as dozens of questions."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Few-shot examples. None: the task's own default."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Requests per forward pass, the same at every point, because scores can move with it. auto: the largest power of
    two up to 64 that fits, found once on the source model (on a CPU: 8). Out of memory halves it, for all points."""
    backend: Literal["hf", "vllm"] = "hf"
    """What scores the tasks, at every point: transformers, or vLLM where it is installed, which forms batches by itself
    (docs/evaluation.md)."""
    vllm: dict[str, Any] = {}
    """Further arguments of vLLM's engine, such as {tensor_parallel_size: 2, gpu_memory_utilization: 0.5}."""
    max_length: int = Field(default=2048, ge=16)
    """Longest context fed to the model."""
    prompts: list[Annotated[str, Field(min_length=1)]] = [
        "What is the capital of Japan, and what is it known for?",
        "A train leaves at 3 pm and takes 90 minutes. When does it arrive?",
        "Write two sentences about a lighthouse keeper.",
        "Why do leaves change their colour in autumn?",
    ]
    """Prompts answered at every point of a run, side by side in the report; none that stands in the training text is
    asked. []: none."""
    answer_tokens: Annotated[Count, Field(gt=0)] = 40
    """Tokens of such an answer, at most."""
    margin: float = Field(default=0.01, ge=0)
    """Non-inferiority margin for the verdict, in accuracy (0.01 = one point)."""
    perplexity_margin: float = Field(default=0.05, ge=0)
    """The same for every perplexity: how far above the source's, as a share of it (0.05 = 5%)."""
    kl_margin: float = Field(default=0.1, ge=0)
    """The same for the KL divergence from the source model on held-out text, in nats per token. 0.1: what the source
    writes is 10% more perplexing to the converted model."""
    gate: bool | Literal["strict"] = False
    """Exit with code 4 when a loss beyond a margin is shown (strict: unless the opposite is shown)."""

    @field_validator("perplexity")
    @classmethod
    def _names_differ(cls, texts: list[TextFile]) -> list[TextFile]:
        names = [text.name for text in texts]
        if "held_out" in names or len(set(names)) < len(names):
            raise ValueError("every text needs a name of its own, and held_out is taken")
        return texts


class Recipe(Section):
    """Everything a run needs."""

    source: Source = Source()
    convert: Convert = Convert()
    data: Data = Data()
    train: Train = Train()
    eval: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: sample order, evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: the best there is."""
