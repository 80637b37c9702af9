"""The ``task`` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlm_cli.config.section import Beams, LengthPenalty, Section


class TaskSection(Section):
    """What `mlm finetune` learns. One file per kind in mlm_cli/tasks/; keys that a kind does not read are refused."""

    name: Literal[
        "classification",
        "regression",
        "token_classification",
        "question_answering",
        "multiple_choice",
        "embedding",
        "translation",
        "summarization",
        "text_generation",
    ] = "classification"
    train: str = Field(
        description=".tsv, .csv, .jsonl, CoNLL, SQuAD's JSON or aligned lines, as the kind reads (also .gz)"
    )
    dev: str
    text_column: str | int = Field(default="text", description="token_classification: unset is the first column")
    text_pair_column: str | int | None = Field(
        default=None, description="a second text; multiple_choice: what every choice begins with"
    )
    label_column: str | int = Field(default="label", description="token_classification: unset is the last column")
    choice_columns: tuple[str | int, ...] = Field(
        default=("choices",), description="multiple_choice: one column a choice, or one that holds a list (.jsonl)"
    )
    header: bool | None = Field(default=None, description=".tsv/.csv: unset guesses from the column names asked for")
    labels: tuple[str, ...] | None = Field(default=None, description="unset: those in the train file, sorted")
    max_length: int | None = Field(default=None, ge=1, description="tokens a text; unset: the model's context")
    max_target_length: int = Field(
        default=128, ge=1, le=65536, description="texts written: tokens of one, its end included"
    )
    prefix: str = Field(default="", description="texts written: stands before each text (`summarize: `)")
    suffix: str | None = Field(
        default=None, description="texts written: stands behind each text; unset: nothing (t5), a line break (gpt)"
    )
    rouge_tokenize: Literal["ascii", "unicode"] = Field(
        default="ascii", description="summarization: ascii is rouge-score's own; unicode for words beyond a to z"
    )
    beams: Beams = 1
    length_penalty: LengthPenalty = 1.0
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = Field(
        default="13a", description="translation: sacrebleu's way to cut words; zh for Chinese"
    )
    epochs: int | None = Field(default=None, ge=1, description="instead of train.steps")
    metric: str | None = Field(default=None, description="which checkpoint is best; unset: the kind's first")
    doc_stride: int = Field(default=128, ge=1, description="question_answering: tokens from one window to the next")
    max_query_length: int = Field(default=64, ge=1, description="question_answering: tokens of a question")
    max_answer_length: int = Field(default=30, ge=1, description="question_answering: tokens of an answer")
    n_best: int = Field(default=20, ge=1, description="question_answering: starts and ends that are paired")
    null_score_diff_threshold: float | None = Field(
        default=None, description="question_answering: no answer where it beats the best span by more; unset: never"
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="embedding: mean of all tokens, or the first one's state (gpt: the last one's)"
    )
    loss: Literal["cosine", "contrastive"] = Field(
        default="cosine", description="embedding: the cosine is to be the score, or a pair is to stand out in its batch"
    )
    temperature: float = Field(default=0.05, gt=0, description="embedding: of the contrastive loss")
    max_score: float = Field(default=1.0, gt=0, description="embedding: score of equal texts; scores are divided by it")
    min_positive: float = Field(
        default=0.8, ge=0, le=1, description="embedding: contrastive training takes pairs with this score or more"
    )
