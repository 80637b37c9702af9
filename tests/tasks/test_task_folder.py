"""Task models against transformers on the same folder: every head, in both directions, and at tensor size 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tasks.task_models import LABELS, SECTIONS, make_batch, make_model, make_task, outputs_and_gradients, wordpiece

from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.config.schema import AttentionSection
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.models.heads import TaskModel
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task_folder import load_task_model, read_facts, save_task_model, start_task_model

transformers = pytest.importorskip("transformers")

ONE = ParallelContext.single()
PREFIXES = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert", "megatron-bert": "MegatronBert"}
ENDINGS = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
    "embedding": "Model",
}
CASES = [(layout, name) for layout in SECTIONS for name in ENDINGS]


def their_class(layout: str, name: str) -> Any:
    causal = layout in ("gpt2", "llama")
    ending = "ForSequenceClassification" if causal and name == "multiple_choice" else ENDINGS[name]
    return getattr(transformers, PREFIXES[layout] + ending)


def open_theirs(cls: Any, folder: Path) -> Any:
    extra = {"add_pooling_layer": False} if cls.__name__.endswith("BertModel") else {}
    model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", **extra)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def their_scores(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What their class gives, in the shape of our outputs; what stands on padding is zeroed."""
    mask = (torch.arange(12) < batch["lengths"][:, None]).long()
    options = {"attention_mask": mask}
    if "Bert" in type(model).__name__:
        options["token_type_ids"] = batch["token_types"]
    tokens = batch["tokens"]
    if "MultipleChoice" in type(model).__name__:  # four choices of one question
        options = {key: value[None] for key, value in options.items()}
        return model(tokens[None], **options).logits.flatten()[:, None]
    out = model(tokens, **options)
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1) * mask[..., None]
    if hasattr(out, "logits"):
        return out.logits * mask[..., None] if out.logits.dim() == 3 else out.logits
    mean = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def check_equal(ours: TaskModel, theirs: Any) -> None:
    batch = make_batch()
    expected, found = their_scores(theirs, batch), ours(batch)
    if found.dim() == 3:
        found = found * (torch.arange(12) < batch["lengths"][:, None])[..., None]
    assert expected.std() > 0.02
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_transformers_gives_our_scores(tmp_path: Path, layout: str, name: str) -> None:
    task = make_task(name, SECTIONS[layout], wordpiece(tmp_path / "tok"))
    model = make_model(layout, task)
    save_task_model(model, task, tmp_path / "m")
    theirs = open_theirs(their_class(layout, name), tmp_path / "m")
    check_equal(model, theirs)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == [their_class(layout, name).__name__]
    if name in LABELS:
        assert theirs.config.id2label == dict(enumerate(LABELS[name]))
    assert theirs.config.pad_token_id == 0
    facts = read_facts(tmp_path / "m", TASKS[name])
    assert facts.max_length == 32 and (name not in LABELS or facts.labels == LABELS[name])
    again = load_task_model(tmp_path / "m", ONE, task.head).eval()
    assert torch.equal(again(make_batch()), model(make_batch()))
    card = (tmp_path / "m" / "README.md").read_text()
    assert (
        f"| parameters | {sum(t.numel() for t in load_file(tmp_path / 'm' / 'model.safetensors').values()):,} |" in card
    )


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_theirs_opens_with_their_scores(tmp_path: Path, layout: str, name: str) -> None:
    cls = their_class(layout, name)
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 120, "pad_token_id": 0, "initializer_range": 0.3}
    shared["num_labels"] = len(LABELS.get(name, "x")) if name != "question_answering" else 2
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if layout == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    elif layout == "llama":
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
    else:
        sizes |= {"max_position_embeddings": 32}
    theirs = cls(cls.config_class(**shared, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    task = make_task(name, SECTIONS[layout], wordpiece(tmp_path / "tok"))
    read_facts(tmp_path / "theirs", TASKS[name])
    ours = load_task_model(tmp_path / "theirs", ONE, task.head).eval()
    check_equal(ours, theirs)
    # and out again: what they open is what they wrote
    save_task_model(ours, task, tmp_path / "ours")
    written = open_theirs(cls, tmp_path / "ours").state_dict()
    for key, tensor in theirs.state_dict().items():
        if not (name == "embedding" and key.startswith("pooler.")):  # which nothing reads
            assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize(
    ("cls", "pooler"),
    [
        ("BertForPreTraining", True),
        ("BertForMaskedLM", False),
        ("BertModel", True),
        ("BertForNextSentencePrediction", True),
        ("BertForTokenClassification", False),
        ("BertForMultipleChoice", True),
        ("MegatronBertForPreTraining", True),
        ("MegatronBertForMaskedLM", False),
        ("MegatronBertModel", True),
        ("GPT2LMHeadModel", False),
        ("GPT2Model", False),
        ("LlamaForCausalLM", False),
        ("LlamaForQuestionAnswering", False),
    ],
)
def test_any_model_is_a_start_and_keeps_all_but_its_head(tmp_path: Path, cls: str, pooler: bool) -> None:
    cls = getattr(transformers, cls)
    sizes: dict[str, Any] = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = cls(cls.config_class(**sizes, intermediate_size=48, max_position_embeddings=32, initializer_range=0.3))
    theirs.save_pretrained(tmp_path)
    _, section = load_model_folder(tmp_path, ONE, head=False)
    task = make_task("classification", section, wordpiece(tmp_path / "tok"))
    model = start_task_model(tmp_path, ONE, task.head, seed=1)
    state = theirs.state_dict()
    bare = {name.split(".", 1)[1] if "." in name else name: tensor for name, tensor in state.items()} | state
    found = getattr(model.head, "pooler", None)
    if found is not None:
        fresh = TaskModel(build_model(section, ONE, head=False), task.head, seed=1).head.pooler
        expected = bare["pooler.dense.weight"] if pooler else fresh.weight
        assert torch.equal(found.weight, expected)
    words = next(
        tensor
        for name, tensor in state.items()
        if name.endswith(("wte.weight", "word_embeddings.weight", "embed_tokens.weight"))
    )
    assert torch.equal(model.backbone.embedding.word.weight[:120], words)


@pytest.mark.parametrize("layout", ["gpt2", "llama", "bert"])
def test_a_pattern_of_attention_may_come_with_the_task(tmp_path: Path, layout: str) -> None:
    task = make_task("classification", SECTIONS[layout], wordpiece(tmp_path / "tok"))
    pretrained = build_model(SECTIONS[layout], ONE, seed=3)
    save_model_folder(pretrained, tmp_path / "lm", task.encoder.tokenizer)
    local = AttentionSection(pattern="local", window=4, block=2)
    model = start_task_model(tmp_path / "lm", ONE, task.head, seed=1, changes={"attention": local})
    assert model.backbone.config.attention == local
    assert torch.equal(model.backbone.embedding.word.weight, pretrained.embedding.word.weight)


def test_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "tok")
    task = make_task("classification", SECTIONS["bert"], tokenizer)
    save_model_folder(build_model(SECTIONS["bert"], ONE), tmp_path / "lm", tokenizer)
    tensors = load_file(tmp_path / "lm" / "model.safetensors")

    def refused(match: str, change: dict[str, torch.Tensor | None]) -> None:
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "lm" / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            start_task_model(tmp_path / "lm", ONE, task.head, seed=1)

    refused(
        "unexpected tensor bert.encoder.layer.2.output", {"bert.encoder.layer.2.output.dense.weight": torch.ones(2)}
    )
    refused("tensor bert.embeddings.LayerNorm.bias is missing", {"bert.embeddings.LayerNorm.bias": None})
    refused("pooler.dense.bias is missing", {"bert.pooler.dense.weight": torch.ones(32, 32)})
    refused(
        r"pooler.dense.weight has shape \[3, 3\]",
        {"bert.pooler.dense.weight": torch.ones(3, 3), "bert.pooler.dense.bias": torch.ones(32)},
    )
    model = make_model("bert", task)
    save_task_model(model, task, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for extra in ("qa_outputs.weight", "cls.predictions.bias"):
        save_file({**tensors, extra: torch.ones(2, 32)}, tmp_path / "m" / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"unexpected tensor {extra}"):
            load_task_model(tmp_path / "m", ONE, task.head)
    with pytest.raises(CheckpointError, match="BertForSequenceClassification, which has no output layer"):
        load_model_folder(tmp_path / "m", ONE)


def test_head_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    task = make_task("classification", SECTIONS["gpt2"], wordpiece(tmp_path))

    def weight(layout: str, seed: int) -> torch.Tensor:
        backbone = build_model(SECTIONS[layout], ONE, seed=seed + 50, head=False)
        return TaskModel(backbone, task.head, seed=seed).head.output.weight

    assert torch.equal(weight("gpt2", 4), weight("bert", 4))
    assert not torch.equal(weight("gpt2", 4), weight("gpt2", 5))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "tok")
    save_model_folder(build_model(SECTIONS["gpt2"], ONE), tmp_path / "lm", tokenizer)
    with pytest.raises(CheckpointError, match="holds a GPT2LMHeadModel, not a model for classification"):
        read_facts(tmp_path / "lm", TASKS["classification"])
    task = make_task("regression", SECTIONS["bert"], tokenizer)
    save_task_model(make_model("bert", task), task, tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds a model for regression, not a model for classification"):
        read_facts(tmp_path / "m", TASKS["classification"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["mlm_task"]  # as transformers writes it
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was trained for regression"):
        read_facts(tmp_path / "m", TASKS["classification"])
    t5 = SECTIONS["bert"].model_copy(update={"family": "t5"})
    with pytest.raises(UsageError, match="no heads for the t5 family"):
        TASKS["multiple_choice"].architecture(t5)


@pytest.mark.slow
def test_tensor_slices_change_nothing(tmp_path: Path, run_ranks: Any) -> None:
    check_slices(tmp_path, run_ranks, CASES)


def test_tensor_slices_change_nothing_in_some(tmp_path: Path, run_ranks: Any) -> None:
    chosen = [("gpt2", "classification"), ("bert", "multiple_choice"), ("megatron-bert", "question_answering")]
    check_slices(tmp_path, run_ranks, [*chosen, ("llama", "token_classification"), ("bert", "embedding")])


def check_slices(folder: Path, run_ranks: Any, cases: list[tuple[str, str]]) -> None:
    tokenizer = wordpiece(folder / "tok")
    for layout, name in cases:
        task = make_task(name, SECTIONS[layout], tokenizer)
        save_task_model(make_model(layout, task), task, folder / layout / name)
    whole = outputs_and_gradients(0, 1, str(folder), cases)
    for sliced in run_ranks(outputs_and_gradients, 2, str(folder), cases):
        for case, values in whole.items():
            assert len(values) >= 3
            for key, value in values.items():
                np.testing.assert_allclose(sliced[case][key], value, rtol=1e-4, atol=1e-5, err_msg=f"{case} {key}")
    for layout, name in cases:
        base = folder / layout / name
        files = [base, *(base / f"again{size}" for size in (1, 2))]
        assert len({(file / "model.safetensors").read_bytes() for file in files}) == 1


@pytest.mark.parametrize("name", [name for name in ENDINGS if name != "embedding"])
def test_losses_are_theirs(tmp_path: Path, name: str) -> None:
    """On rows without padding: their spans' softmax goes over padding too, ours does not."""
    task = make_task(name, SECTIONS["bert"], wordpiece(tmp_path / "tok"))
    save_task_model(make_model("bert", task), task, tmp_path / "m")
    theirs = open_theirs(their_class("bert", name), tmp_path / "m")
    tokens = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "lengths": torch.full((4,), 9), "token_types": (torch.arange(9) > 4).long().expand(4, 9)}
    labels: dict[str, torch.Tensor] = {
        "classification": torch.tensor([0, 2, 1, 2]),
        "regression": torch.tensor([0.5, -1.0, 3.0, 2.0]),
        "token_classification": torch.arange(36).view(4, 9) % 4 - 1,
        "question_answering": torch.tensor([[1, 3], [0, 0], [8, 8], [2, 7]]),
        "multiple_choice": torch.tensor([1, 0]),
    }
    batch["labels"] = labels[name].where(labels[name] != -1, -100) if name == "token_classification" else labels[name]
    inputs = [tokens, torch.ones_like(tokens), batch["token_types"]]
    given = {"labels": batch["labels"]}
    if name == "question_answering":
        given = {"start_positions": batch["labels"][:, 0], "end_positions": batch["labels"][:, 1]}
    elif name == "multiple_choice":
        batch["members"] = torch.arange(4).view(2, 2)
        inputs = [tensor.reshape(2, 2, 9) for tensor in inputs]
    with torch.no_grad():
        expected = theirs(inputs[0], attention_mask=inputs[1], token_type_ids=inputs[2], **given).loss
        found, count = task.loss(load_task_model(tmp_path / "m", ONE, task.head).eval()(batch), batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert int(count) == {"token_classification": 27, "multiple_choice": 2}.get(name, 4)
