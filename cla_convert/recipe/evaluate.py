"""The section `eval`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .section import Count, Section


class TextFile(Section):
    """A text whose perplexity is measured and, in a run, its KL divergence from the source model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What the report calls it."""
    path: str
    """A UTF-8 text file. Of jsonl (also .gz) and parquet, told by their endings as in data.sources, the texts of all
    rows are one text, with a blank line between two."""
    text_field: str = "text"
    """Column that holds the text, for jsonl and parquet."""
    window: int = Field(default=1024, ge=2)
    """Tokens of a window, or what the model was built for if that is less. Windows do not overlap; every token is
    predicted once, from those before it in its window."""
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
    include_path: str | None = None
    """Folder with tasks of one's own, as lm-eval's YAML files (its --include_path); `tasks` names those to run. Python
    that they name is run (docs/evaluation.md)."""
    perplexity: list[TextFile] = []
    """Text files whose perplexity and bits per byte are measured at every point, and KL from the source model on their
    beginning."""
    agreement_tokens: Count = 8192
    """Tokens of held-out text, and of each text of `perplexity` from its start, for KL divergence from the source model
    and top-1 agreement with it. 0: not measured."""
    domain_tokens: Count | Literal["auto"] = "auto"
    """Tokens of each of seven kinds of text shipped with the package (encyclopaedia, web, news, law, science, dialogue,
    code) on which perplexity and KL from the source model are measured. auto: all, 5k to 7k; on a CPU 512. 0: none.
    Whole rows of 512 tokens are taken, or one row of fewer."""
    retrieval: Retrieval = Retrieval()
    """Context lengths and depths of the tasks `passkey` and `needle`."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task (the first n), passkey and needle apart. None: all."""
    limits: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Documents of single tasks, in place of `limit`: a page of wikitext costs as much as dozens of questions."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Few-shot examples. None: the task's own default."""
    chat_template: bool = False
    """Ask the tasks as turns of a conversation, by the model's own chat template, few-shot examples as turns before;
    what they measure changes with it (docs/evaluation.md). Wikitext, passkey and needle stay plain text."""
    chat_template_args: dict[str, Any] = {}
    """Further arguments of the template, such as {enable_thinking: false}."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Requests per forward pass, the same at every point, because scores can move with it. auto: the largest power of
    two up to 64 that fits, found once on the source model (on a CPU: 8). One that does not fit is refused. On a GPU it
    counts the longest contexts: of shorter requests, as many tokens go together."""
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

    @field_validator("domain_tokens")
    @classmethod
    def _a_row_has_something_to_predict(cls, tokens: int | str) -> int | str:
        if tokens == 1:
            raise ValueError("of a single token nothing is predicted; 0 measures none")
        return tokens

    @model_validator(mode="after")
    def _arguments_have_a_template(self) -> "Evaluate":
        if self.chat_template_args and not self.chat_template:
            raise ValueError("chat_template_args are of the chat template, and chat_template is false")
        return self

    @field_validator("perplexity")
    @classmethod
    def _names_differ(cls, texts: list[TextFile]) -> list[TextFile]:
        names = [text.name for text in texts]
        if "held_out" in names or len(set(names)) < len(names):
            raise ValueError("every text needs a name of its own, and held_out is taken")
        return texts

    @model_validator(mode="after")
    def _texts_are_no_tasks(self) -> "Evaluate":
        if taken := sorted({text.name for text in self.perplexity} & set(self.tasks)):
            raise ValueError(f"perplexity and tasks both have a {taken[0]!r}: give the text another name")
        return self
