"""``mlm evaluate --ensemble`` of tags and numbers: models of two families, tokenizers and label orders, averaged by
`transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.cli.app import run as mlm

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "dog"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = [
    (["john", "lives", "in", "paris"], ["B-PER", "O", "O", "B-LOC"]),
    (["the", "quick", "fox", "dog"], ["O", "O", "B-PER", "I-PER"]),
]
TEXTS = {"the dog": 1.5, "the quick fox": 3.0, "john in paris": 0.5}


def save(folder: Path, name: str, words: list[str], seed: int, **settings: Any) -> tuple[Path, Any, Any]:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(vocab_size=len(words), **SIZES, **settings)).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(std=0.4)
    model.save_pretrained(folder)
    return folder, model, tokenizer


def scores(members: list[tuple[Path, Any, Any]], task: str, data: Path, capsys: Any) -> dict[str, Any]:
    """Of the ensemble and then of each member."""
    names = [str(folder) for folder, _, _ in members]
    assert mlm(["evaluate", "--ensemble", *names, "--task", task, "--data", str(data), "--format", "json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    return {name or "together": results[f"{task} {name}".strip()] for name in ["", *names]}


def test_tag_probabilities_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = []
    for number, (kind, words) in enumerate((("Bert", WORDS), ("MegatronBert", [*WORDS, "fox"]))):
        tags = TAGS[:: -1 if number else 1]
        names = {"id2label": dict(enumerate(tags)), "label2id": {tag: n for n, tag in enumerate(tags)}}
        members.append(save(tmp_path / kind, f"{kind}ForTokenClassification", words, number, **names))
    lines = ["".join(f"{word} {tag}\n" for word, tag in zip(*pair, strict=True)) for pair in SENTENCES]
    (tmp_path / "dev.conll").write_text("\n".join(lines))

    alone = []
    for _, model, tokenizer in members:
        rows = []
        for sentence, _ in SENTENCES:
            encoded = tokenizer(sentence, is_split_into_words=True, return_tensors="pt")
            first = [encoded.word_ids().index(word) for word in range(len(sentence))]
            with torch.no_grad():
                probs = model(**encoded).logits[0].double().softmax(-1)
            rows.append(probs[first][:, [model.config.label2id[tag] for tag in TAGS]])
        alone.append(torch.cat(rows))
    truth = torch.tensor([TAGS.index(tag) for _, tags in SENTENCES for tag in tags])
    found = scores(members, "token_classification", tmp_path / "dev.conll", capsys)
    for entry, probs in zip(found.values(), [sum(alone) / 2, *alone], strict=True):
        assert entry["loss,none"] == pytest.approx(-probs[range(8), truth].log().mean().item(), rel=1e-4)
        assert entry["accuracy,none"] == pytest.approx((probs.argmax(-1) == truth).double().mean().item())


def test_numbers_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    members = [
        save(tmp_path / kind, f"{kind}ForSequenceClassification", words, number, **settings)
        for number, (kind, words) in enumerate((("Bert", WORDS), ("MegatronBert", [*WORDS, "fox"])))
    ]
    rows = "".join(f"{text}\t{number}\n" for text, number in TEXTS.items())
    (tmp_path / "dev.tsv").write_text("text\tlabel\n" + rows)
    with torch.no_grad():
        alone = [
            torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in TEXTS]).double()
            for _, model, tokenizer in members
        ]
    truth = torch.tensor(list(TEXTS.values()), dtype=torch.float64)
    found = scores(members, "regression", tmp_path / "dev.tsv", capsys)
    for entry, numbers in zip(found.values(), [sum(alone) / 2, *alone], strict=True):
        assert entry["loss,none"] == pytest.approx((numbers - truth).square().mean().item(), rel=1e-4)
        pearson = torch.corrcoef(torch.stack([numbers, truth]))[0, 1].item()
        assert entry["pearson,none"] == pytest.approx(pearson, rel=1e-4)
