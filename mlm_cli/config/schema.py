"""The recipe as typed data: every section and key a recipe may have, with defaults and bounds.

Sections are frozen and refuse unknown keys. Checks that need more than one key live in ``checks.py``; reading files,
``base:`` recipes and overrides in ``resolve.py``. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from mlm_cli.config.clean_section import CleanSection
from mlm_cli.config.generate_section import GenerateSection
from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.config.section import Section
from mlm_cli.config.split import parse_split
from mlm_cli.config.task_section import TaskSection


class AttentionSection(Section):
    """Which kernel computes self-attention, and which keys a query sees (patterns: `mlm_cli/ops/sparse_pattern.py`).

    A plain string stands for the kernel: `attention: sdpa`.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    kernel: Literal["auto", "sdpa", "fused", "reference"] = Field(
        default="auto", description="auto: the fastest; with a pattern the others compute every score, and hide"
    )
    pattern: Literal["dense", "local", "strided", "fixed", "longformer", "bigbird"] | None = Field(
        default=None, description="unset: dense, or what `init_from` has"
    )
    block: int = Field(default=64, ge=1, description="tokens that strided and bigbird take together")
    window: int = Field(default=512, ge=1, description="tokens: seen back (causal) or on both sides; stride; stretch")
    global_tokens: int = Field(
        default=64, ge=0, alias="global", description="longformer, bigbird: first tokens; fixed: last of each stretch"
    )
    random: int = Field(default=3, ge=0, description="bigbird: blocks drawn for each block of queries")
    seed: int = Field(default=0, ge=0, lt=2**63, description="bigbird: of the draw")


class RotaryScalingSection(Section):
    """Rotary positions for a context longer than the one they were trained on."""

    type: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] = Field(description="how: docs/long-documents.md")
    factor: float = Field(ge=1, description="how many times as long the context gets")
    original_seq_length: int = Field(ge=1, description="context the model was trained on")
    attention_factor: float | None = Field(default=None, gt=0, description="yarn; unset: 1 + 0.1 ln(factor)")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn: more turns than this are left as they are")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: fewer turns than this are divided by factor")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3: beta_fast by its name there")
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3: beta_slow by its name there")


class ExpertsSection(Section):
    """A mixture of experts in place of feed-forward layers."""

    num_experts: int = Field(default=8, ge=2)
    top_k: Literal[1, 2] = Field(default=1, description="experts a token goes to")
    every: int = Field(default=1, ge=1, description="each n-th layer has experts, the others a plain feed-forward")
    capacity_factor: float = Field(
        default=1.25, gt=0, description="tokens an expert takes in training, as a multiple of an even share"
    )
    balance_loss: float = Field(default=0.01, ge=0, description="weight of the loss that keeps experts evenly busy")


class ModelSection(Section):
    """Architecture. GPT-2, Llama, BERT and T5 are settings of one transformer layer."""

    family: Literal["gpt", "bert", "t5"] = Field(
        default="gpt", description="gpt: causal language model; bert: masked language model; t5: encoder and decoder"
    )
    num_layers: int = Field(default=12, ge=1, description="t5: of the encoder")
    num_decoder_layers: int | None = Field(default=None, ge=1, description="t5; unset: num_layers")
    hidden_size: int = Field(default=768, ge=1)
    num_attention_heads: int = Field(default=12, ge=1)
    num_query_groups: int | None = Field(default=None, ge=1, description="key/value heads; unset: num_attention_heads")
    head_dim: int | None = Field(default=None, ge=1, description="unset: hidden_size / num_attention_heads")
    ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="unset: 4h, or 8h/3 rounded up to 64 for swiglu and geglu"
    )
    seq_length: int = Field(default=1024, ge=1, description="tokens a sample, and the longest context")
    decoder_seq_length: int | None = Field(
        default=None, ge=1, description="t5: tokens of a target; unset: what the masked spans of a sample come to"
    )
    vocab_size: int | None = Field(default=None, ge=1, description="unset: the tokenizer's")
    make_vocab_size_divisible_by: int = Field(default=128, ge=1, description="padding of the embedding rows")
    position: Literal["learned", "rotary", "relative"] = Field(
        default="learned", description="relative: a bias a head and distance (t5)"
    )
    rotary_base: float = Field(default=10000.0, gt=1)
    rotary_scaling: RotaryScalingSection | None = Field(default=None, description="rotary beyond the trained context")
    relative_buckets: int = Field(default=32, ge=4, description="distances that relative positions tell apart")
    relative_max_distance: int = Field(default=128, ge=2, description="all longer distances share a bucket")
    num_token_types: int = Field(default=0, ge=0, description="bert: 2 tells sentence A from B; 0: no such embedding")
    binary_head: Literal["none", "sentence_order", "next_sentence"] = Field(
        default="none", description="bert: what is learned beside the masked words, from a pooled first token"
    )
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_order: Literal["pre", "post"] = Field(
        default="pre", description="post: after each residual sum, as the original BERT; pre: before each branch"
    )
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: Literal["gelu", "gelu_erf", "relu", "swiglu", "geglu"] = Field(
        default="gelu", description="gelu: the tanh form of GPT-2; swiglu and geglu are gated"
    )
    experts: ExpertsSection | None = Field(
        default=None, description="gpt: a mixture of experts; unset: every token meets every weight"
    )
    bias: bool = Field(default=True, description="biases in linear layers")
    tie_embeddings: bool = True
    init_std: float = Field(default=0.02, gt=0)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    attention: AttentionSection = AttentionSection()

    @field_validator("attention", mode="before")
    @classmethod
    def _kernel(cls, value: Any) -> Any:
        return {"kernel": value} if isinstance(value, str) else value


class WeightedPrefix(Section):
    """One part of a blend."""

    prefix: str
    weight: float = Field(default=1.0, gt=0)


class MaskingSection(Section):
    """bert: which tokens are hidden and have to be predicted."""

    probability: float = Field(default=0.15, gt=0, lt=1, description="share of a sample's tokens")
    max_ngram: int = Field(default=3, ge=1, description="longest run of words hidden together, n with chance ~ 1/n")
    whole_words: bool = Field(default=True, description="all pieces of a word or none; false: single tokens")
    short_sequences: float = Field(
        default=0.1, ge=0, le=1, description="share of samples cut to a random length, as short as tasks may be"
    )


class SpanCorruptionSection(Section):
    """t5: which spans are masked and have to be spelled out."""

    probability: float = Field(default=0.15, gt=0, lt=1, description="share of a text's tokens")
    mean_length: float = Field(default=3.0, ge=1, description="mean tokens of a span")


class DataSection(Section):
    """Indexed data sets (prefix without .bin/.idx): one path with a split, or separate train/valid/test."""

    path: str | tuple[WeightedPrefix, ...] | None = None
    split: str = Field(default="969,30,1", description="shares of train, valid and test documents of `path`")
    train: str | tuple[WeightedPrefix, ...] | None = None
    valid: str | tuple[WeightedPrefix, ...] | None = None
    test: str | tuple[WeightedPrefix, ...] | None = None
    mask_documents: bool = Field(
        default=False, description="gpt: no attention across document boundaries inside a sample"
    )
    masking: MaskingSection = Field(default=MaskingSection(), description="bert: the tokens to predict")
    span_corruption: SpanCorruptionSection = Field(
        default=SpanCorruptionSection(), description="t5: the spans to spell out"
    )
    num_workers: int = Field(default=0, ge=0, description="loader processes a rank")

    @field_validator("split")
    @classmethod
    def _shares(cls, text: str) -> str:
        parse_split(text)
        return text


class RampupSection(Section):
    """Growth of the global batch ("megabatches"), as Megatron-LM's `--rampup-batch-size start increment samples`."""

    start: int = Field(ge=1, description="first global batch, in samples")
    increment: int = Field(ge=1, description="what each stage adds, up to train.global_batch_size")
    samples: int = Field(ge=1, description="samples after which the batch is whole; each stage gets an even share")


class TrainSection(Section):
    """Length, batch and arithmetic of training."""

    steps: int = Field(default=1000, ge=1)
    micro_batch_size: int = Field(default=4, ge=1)
    global_batch_size: int | None = Field(
        default=None, ge=1, description="unset: micro_batch_size x data-parallel size"
    )
    rampup: RampupSection | None = Field(default=None, description="begin with smaller global batches; unset: do not")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 where the processor has it; fp16 with dynamic loss scaling"
    )
    initial_loss_scale: float = Field(default=65536.0, ge=1, description="fp16: halved after gradients that overflow")
    loss_scale_window: int = Field(default=1000, ge=1, description="fp16: steps without overflow that double the scale")
    clip_grad: float = Field(default=1.0, ge=0, description="0 switches clipping off")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="activation checkpointing of each layer; selective: of its attention scores alone"
    )
    engine: Literal["auto", "deepspeed", "plain"] = Field(
        default="auto",
        description="auto: DeepSpeed when there is something to shard or average, else a plain optimizer step",
    )
    compile: bool = False
    contrastive_margin: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="gpt, t5: against repetition, keep cosines of a text's tokens in the last layer below 1 minus this"
        " (SimCTG; 0.5 is usual); 0: do not",
    )
    heartbeat: float = Field(
        default=120.0,
        ge=0,
        description="seconds without progress after which a rank hangs: all stacks go to logs/, exit code 6; 0: never"
        " (five times as long until the first step is done)",
    )
    time_limit: str | float | None = Field(
        default=None,
        description="minutes or H:MM:SS from the start of the command, then save and exit with code 75; Slurm's end of"
        " the job is kept in any case",
    )
    on_bad_loss: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="loss or gradient not finite, or a spike, is never applied; then: exit with code 5, skip the batch,"
        " or go back to the last checkpoint and skip the samples since",
    )
    spike_zscore: float = Field(
        default=0.0, ge=0, description="robust standard deviations above the recent losses that make a spike; 0: never"
    )
    spike_window: int = Field(default=100, ge=10, description="recent losses that a spike is measured against")
    max_bad_steps: int = Field(default=10, ge=0, description="skips or rollbacks of a run before it stops all the same")


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW as torch defines it (decoupled decay)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1.5e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="not applied to biases and norms")
    lr_scaling: Literal["none", "initial_std"] = Field(
        default="none",
        description="initial_std: lr is that of weights drawn with 0.02, those drawn wider or narrower move in "
        "proportion; for T5, whose embedding is drawn with 1.0",
    )


class ScheduleSection(Section):
    """Learning rate over the steps."""

    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: int | None = Field(
        default=None, ge=1, description="unset: train.steps; wsd: length of the final decay"
    )
    min_lr: float = Field(default=0.0, ge=0)


class ParallelSection(Section):
    """How ranks are laid out; data-parallel size is what is left."""

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1, description="stages that the layers are shared out over")
    sequence: bool = Field(default=False, description="tensor ranks share out the tokens in norms and dropout too")
    context: int = Field(
        default=1,
        ge=1,
        description="gpt: copies of the model that share out the tokens of each sample, for long ones; in attention"
        " they share out the heads (DeepSpeed-Ulysses)",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="ZeRO: data ranks share the optimizer state (1), gradients too (2), and weights too (3)",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="with `zero` 3; cpu: weights and optimizer are in the host's memory; nvme: optimizer on a disk",
    )
    offload_folder: str | None = Field(default=None, description="on that disk, of each machine; unset: `output`")


class CheckpointSection(Section):
    """Saving and resuming."""

    every: int = Field(default=1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(default=3, ge=0, description="0 keeps all")
    keep_best: int = Field(
        default=0, ge=0, description="checkpoints with the lowest validation loss that stay beside the last ones"
    )
    background: bool = Field(
        default=True, description="copy the state and write while training goes on; false, or memory short: wait"
    )
    resume: Literal["auto", "never"] | str = Field(default="auto", description="auto, never, or a checkpoint folder")
    dtype: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="of model/; auto: fp32 master weights")


class EvaluateSection(Section):
    """Validation during training (`every`, `batches`), and `mlm evaluate` (the rest)."""

    every: int = Field(default=1000, ge=0, description="0: never during training")
    batches: int = Field(default=50, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1, description="unset: that of `train`")
    tasks: tuple[str, ...] = Field(default=(), description="`mlm evaluate --task`")
    data: tuple[str, ...] = Field(default=(), description="`mlm evaluate --data`")
    stride: int | None = Field(default=None, ge=1, description="`mlm evaluate --stride`")
    max_length: int | None = Field(default=None, ge=2, description="tokens of context; unset: the model's")
    limit: int | None = Field(default=None, ge=1, description="`mlm evaluate --limit`")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question of `lm_eval:NAME`; unset: as the task has it"
    )
    watermark_z: float = Field(default=4.0, gt=0, description="watermark: a text is marked where its z-score is larger")


class PreprocessSection(Section):
    """Reading of `mlm preprocess`; its flags win. `tokenizer` and `output` are the recipe's own keys."""

    inputs: tuple[str, ...] = Field(default=(), description="files, folders, globs or a Hub data set")
    workers: int | None = Field(default=None, ge=1, description="unset: one a core")
    append_eod: bool = True
    json_key: str = "text"
    on_bad_line: Literal["stop", "skip"] = "stop"
    clean: CleanSection = Field(default=CleanSection(), description="documents to leave out, personal data to take out")


class LogSection(Section):
    """How often progress is told."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = Field(default=True, description="written when the package is installed")


class Recipe(Section):
    """A whole recipe. `model` is read from `init_from` when that is set (finetune)."""

    base: str | None = None
    description: str | None = None
    model: ModelSection = ModelSection()
    init_from: str | None = Field(default=None, description="run, checkpoint or Hugging Face folder to start from")
    tokenizer: str | None = None
    data: DataSection = DataSection()
    task: TaskSection | None = None
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    generate: GenerateSection = GenerateSection()
    retrieval: RetrievalSection = RetrievalSection()
    preprocess: PreprocessSection = PreprocessSection()
    log: LogSection = LogSection()
    seed: int = Field(default=1234, ge=0, lt=2**63)
    output: str | None = None
