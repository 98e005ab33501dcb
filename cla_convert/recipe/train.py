"""The section `train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..named import OneOf
from ..registry import LOSSES, registry_at
from .section import FREE, PLACES, Count, Section

_A_BUDGET = 1000
"""Tokens: below, a unit was forgotten."""


class Train(Section):
    """Uptraining: recover the quality on a token budget. `tokens: 0` skips it."""

    tokens: Count = 0
    """Token budget; at least one sequence."""
    loss: Annotated[str, OneOf(LOSSES)] = "distill"
    """What is minimised."""
    teacher: str | None = None
    """Model to distil from: hub id, local folder or .gguf file, with the same tokenizer. None: the source model."""
    temperature: float = Field(default=1.0, gt=0)
    """distill: softens both distributions; the KL is scaled by its square (Hinton et al. 2015)."""
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    """distill: adds so many times the cross-entropy on the data."""
    hidden_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """distill: adds |student - teacher|^2 of the residual streams over the larger of |student|^2 and |teacher|^2,
    averaged over all layers, with a weight that falls linearly from this to 0 at the end of the budget. auto: 30, or 0
    for a teacher of another depth or width."""
    parameters: Literal["all", "attention", "shared"] = "all"
    """What is trained. attention: the weights of all attention layers. shared: of the layers that share K/V,
    owners and consumers."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak learning rate. auto: half a per cent of the size of attention's matrices (root mean square), a tenth of one
    per cent of the size of the rest's (half with `loss: cross_entropy`), and less for fewer than 100 steps
    (docs/uptraining.md)."""
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
    sequence_length: Annotated[int, PLACES] = Field(default=1024, ge=8)
    """Tokens in a packed sequence."""
    document_masking: bool = False
    """Documents packed into one sequence do not see each other: attention and positions start anew with each, and no
    loss is taken on the first token of the next one. False: they are separated by EOS only, conversations
    by what their template ends with."""
    batch_tokens: Annotated[Count, PLACES] = 16_384
    """Tokens in an optimiser step; must be a multiple of sequence_length."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Sequences in one forward/backward pass; gradients accumulate up to batch_tokens. auto: 8 on a CPU; on a GPU what
    its memory holds, up to 32k tokens."""
    precision: Literal["auto", "bfloat16", "tf32", "float32"] = "auto"
    """Compute precision. auto: bfloat16 where the hardware has it, else float32; weights and optimiser stay float32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the layers and the loss. auto: on a GPU, if the run is long enough to pay the half minute back."""
    processes: Annotated[int, FREE] = Field(default=1, ge=1)
    """Processes of this machine that train together, a GPU each: parameters, gradients and optimiser are divided among
    them. For several machines start `uptrain` with torchrun (docs/uptraining.md)."""
    shard_degree: Annotated[Annotated[int, Field(ge=1)] | Literal["all", "node"], FREE] = "all"
    """Processes among which parameters, gradients and optimiser are divided (FSDP). all: all of them. node: those of a
    machine; machines then hold the same, and only gradients travel between them (HSDP). Or a number."""
    gather: Annotated[Literal["auto", "layer", "step"], FREE] = "auto"
    """When several processes gather the model and add up its gradients. layer: each layer in every pass, which takes
    least memory. step: all of it once a step, which takes least traffic. auto: a step, where a GPU has room for it."""
    shard_teacher: Annotated[bool | Literal["auto"], FREE] = "auto"
    """Divide the teacher among the processes too, at the price of its traffic. auto: where it does not fit whole."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    validate_every: Annotated[Count, FREE] = 2_000_000
    """Validation perplexity every so many tokens (and at the end)."""
    validation_tokens: Count = 32_768
    """Tokens of held-out text used for it."""
    checkpoint_every: Annotated[Count, FREE] = 2_000_000
    """Save a resumable checkpoint every so many tokens."""
    spike: Annotated[float, FREE] = Field(default=2.0, ge=0)
    """Stop if the loss stays above so many times its median over 100 steps for 10 steps in a row. 0: never."""
    log_to: Annotated[list[Literal["tensorboard", "wandb"]], FREE] = []
    """Where to send metrics besides metrics.jsonl; each needs the extra of its name: cla-convert[wandb]."""
    keep_checkpoints: Annotated[int, FREE] = Field(default=2, ge=1)
    """Checkpoints to keep; older ones go once a newer one is whole."""
    keep_checkpoints_after_success: Annotated[bool, FREE] = False
    """Keep them once the uptrained model is published too; three times its float32 size each."""
    control: Annotated[bool, FREE] = False
    """Uptrain the source model too, on the same tokens with the same loss: what CLA cost is then the uptrained model
    minus this control, whatever the data taught. Doubles the training time. Pure distillation needs none."""

    @model_validator(mode="after")
    def _a_step_has_sequences(self) -> "Train":
        if not self.tokens:
            return self
        batch, length = self.batch_tokens, self.sequence_length
        if self.tokens < length:
            unit = f"; {self.tokens}M is {self.tokens} million" if self.tokens < _A_BUDGET else ""
            raise ValueError(f"tokens is {self.tokens}, less than one sequence (sequence_length: {length}){unit}")
        if batch < length:
            raise ValueError(f"batch_tokens is {batch}, less than one sequence (sequence_length: {length})")
        if over := batch % length:
            raise ValueError(
                f"batch_tokens is {batch}, no multiple of sequence_length ({length}): {batch - over} and "
                f"{batch - over + length} are"
            )
        return self

    @model_validator(mode="after")
    def _a_control_trains_the_same(self) -> "Train":
        if self.needs_control and (self.parameters == "shared" or "shared" in self.learning_rates):
            what = "parameters: shared" if self.parameters == "shared" else "learning_rates of shared layers"
            raise ValueError(
                f"control with {what} would not train the source as the converted model: none of its layers share. "
                "attention is what both have"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether `loss` compares with a teacher."""
        return registry_at(LOSSES).named(self.loss).needs_teacher

    @property
    def needs_control(self) -> bool:
        """Whether to train a control: without weight decay, distilling the source from itself changes nothing."""
        itself = self.needs_teacher and not (self.teacher or self.cross_entropy_weight or self.weight_decay)
        return self.control and self.tokens > 0 and not itself
