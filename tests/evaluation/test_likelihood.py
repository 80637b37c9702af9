"""Likelihoods: against transformers and lm-evaluation-harness, shared beginnings, layouts, mistakes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, NumericsError
from mlm_cli.evaluation.documents import Document
from mlm_cli.evaluation.likelihood import Row, encode_rows, score_rows
from mlm_cli.evaluation.perplexity import score_documents
from mlm_cli.evaluation.shared_prefix import Batch, Read, plan_rows
from mlm_cli.parallel.context import ParallelContext
from tests.generation.folders import save_folder
from tests.ranks import run_ranks

TEXTS = ["The old man could not use a phone. ", "She is a great engineer at work. ", "Question: why? Answer: so. "] * 5
LENGTH = 96


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_folder(folder, request.param, TEXTS)


def requests() -> list[tuple[str, str]]:
    """Questions with choices behind common examples, single rows, an empty context, one that is far too long."""
    shots = "Question: what is old? Answer: the man. " * 3
    rows = [
        (f"{shots}Question: {what}? Answer:", f" {choice}")
        for what in ("who is she", "who is at work", "where is the phone")
        for choice in ("an engineer", "the old man", "so", "so so")
    ]
    rows += [("", "The man"), ("She is a great ", "engineer"), ("The old", " man could"), ("The old", " man could")]
    return [*rows, ("why? " * 90, " so.")]


def by_transformers(theirs: Any, row: Row, length: int = LENGTH) -> tuple[float, bool]:
    ids = list(row.ids)[-(length + 1) :]
    begin = row.begin - (len(row.ids) - len(ids))
    with torch.no_grad():
        logits = theirs(torch.tensor([ids[:-1]])).logits[0].double()
    log_probs, labels = logits.log_softmax(-1)[begin - 1 :], torch.tensor(ids[begin:])
    return float(log_probs.gather(1, labels[:, None]).sum()), bool((log_probs.argmax(-1) == labels).all())


def scored(folder: Path, parallel: ParallelContext, batch_size: int) -> list[tuple[float, bool]]:
    model, tokenizer = load_model_folder(folder, parallel)[0].eval(), load_tokenizer(str(folder))
    found = score_rows(
        model, encode_rows(tokenizer, requests(), ["row"] * len(requests())), length=LENGTH, batch_size=batch_size
    )
    return [(one.total, one.greedy) for one in found]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_transformers(folder: tuple[Path, Any], batch_size: int) -> None:
    found = scored(folder[0], ParallelContext.single(), batch_size)
    rows = encode_rows(load_tokenizer(str(folder[0])), requests(), ["row"] * len(requests()))
    assert len(rows[-1].ids) > LENGTH + 1  # its beginning is lost
    for row, (total, greedy) in zip(rows, found, strict=True):
        expected, expected_greedy = by_transformers(folder[1], row)
        assert total == pytest.approx(expected, rel=2e-5) and greedy == expected_greedy


def test_greedy_continuations_are_known_as_such(folder: tuple[Path, Any]) -> None:
    tokenizer, model = load_tokenizer(str(folder[0])), load_model_folder(folder[0], ParallelContext.single())[0].eval()
    start = tokenizer.encode("The old man")
    ids = folder[1].generate(torch.tensor([start]), max_new_tokens=5, do_sample=False)[0].tolist()
    wrong = [*ids[:-1], ids[-1] ^ 1]
    found = score_rows(model, [Row(tuple(ids), len(start)), Row(tuple(wrong), len(start))], length=LENGTH, batch_size=2)
    assert len(ids) > len(start) and [one.greedy for one in found] == [True, False]


def test_rows_are_those_of_the_harness(folder: tuple[Path, Any]) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    transformers = pytest.importorskip("transformers")
    lm = huggingface.HFLM(pretrained=folder[1], tokenizer=transformers.AutoTokenizer.from_pretrained(folder[0]))
    seen: list[Any] = []
    lm._loglikelihood_tokens = lambda rows, **_: seen.extend(rows)
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    lm.loglikelihood([instance("loglikelihood", {}, pair, 0) for pair in requests()], disable_tqdm=True)
    mine = encode_rows(load_tokenizer(str(folder[0])), requests(), ["row"] * len(requests()))
    assert [(list(row.ids[: row.begin]), list(row.ids[row.begin :])) for row in mine] == [
        (list(context), list(continuation)) for _, context, continuation in seen
    ]


def _scored(_rank: int, _size: int, folder: str, tensor: int) -> list[tuple[float, bool]]:
    return scored(Path(folder), ParallelContext.create(tensor=tensor), 4)


@pytest.mark.parametrize("tensor", [2, 1])
def test_on_two_ranks(folder: tuple[Path, Any], tensor: int) -> None:
    expected = scored(folder[0], ParallelContext.single(), 4)
    for found in run_ranks(_scored, 2, str(folder[0]), tensor):
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)
        assert [one[1] for one in found] == [one[1] for one in expected]


def test_positions_that_turn_by_length(tmp_path: Path) -> None:
    """Dynamic rotary scaling: beyond the trained length a text is turned by its own, whatever it is read with."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, max_position_embeddings=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.4, bos_token_id=None, eos_token_id=0,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model_folder(tmp_path, ParallelContext.single())[0].eval()
    rng = random.Random(0)
    common = tuple(rng.randrange(300) for _ in range(60))
    rows = [Row((*common, *(rng.randrange(300) for _ in range(number))), 60) for number in (3, 9, 9, 20, 33)]
    found = score_rows(model, rows, length=120, batch_size=8)
    documents = [Document(np.array(row.ids), None, None) for row in rows]
    tally = score_documents(model, documents, length=120, batch_size=8)  # padded to one length
    for number, (row, one) in enumerate(zip(rows, found, strict=True)):
        theirs.model.rotary_emb.max_seq_len_cached = 32  # it remembers the longest text, and turns by that
        assert one.total == pytest.approx(by_transformers(theirs, row, 120)[0], rel=1e-4)
        whole = by_transformers(theirs, Row(row.ids, 1), 120)[0]
        assert -tally.nll[tally.document == number].sum() == pytest.approx(whole, rel=1e-4)


def test_nested_beginnings_need_no_deep_stack() -> None:
    rows, text = [], []
    for number in range(1500):
        text = [*text, *([number % 7] * 12)]
        rows += [[*text, 8 + n] for n in range(6)]
    rows.sort()
    steps = list(plan_rows(rows, [len(row) - 1 for row in rows], batch_size=64, worth=32))
    assert sum(len(step.numbers) for step in steps if isinstance(step, Batch)) == len(rows)


def test_mistakes(folder: tuple[Path, Any]) -> None:
    tokenizer, model = load_tokenizer(str(folder[0])), load_model_folder(folder[0], ParallelContext.single())[0].eval()
    with pytest.raises(DataError, match="quiz:3: the continuation '' has no tokens of its own"):
        encode_rows(tokenizer, [("The old", "")], ["quiz:3"])
    with pytest.raises(DataError, match=r"97 tokens is longer than the context \(96\)"):
        score_rows(model, [Row((1,) * 98, 1)], length=LENGTH, batch_size=1)
    with pytest.raises(DataError, match="token id 400 is not in the model's vocabulary of 400"):
        score_rows(model, [Row((1, 400), 1)], length=LENGTH, batch_size=1)
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        score_rows(model, [Row((1, 2), 1)], length=LENGTH, batch_size=1)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_plan_reads_every_row_once(data: st.DataObject) -> None:
    """Whatever the rows: what was read and what a batch adds are the row, and shared beginnings are read once."""
    rows = sorted(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=40), max_size=12)))
    limits = [data.draw(st.integers(0, len(row) - 1)) for row in rows]
    batch_size, worth = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 20))
    path: list[int] = []
    seen: list[int] = []
    for step in plan_rows(rows, limits, batch_size=batch_size, worth=worth):
        if isinstance(step, Read):
            assert step.depth <= len(path) and len(step.ids)
            path = [*path[: step.depth], *step.ids]
            continue
        assert isinstance(step, Batch) and 1 <= len(step.numbers) <= batch_size
        for number in step.numbers:
            assert rows[number][: step.depth] == path[: step.depth] and step.depth <= limits[number]
        seen += step.numbers
    assert sorted(seen) == list(range(len(rows)))


def test_a_plan_reads_common_examples_once() -> None:
    """Five questions of four choices behind 100 common tokens: 100, then 20 a question, then the choices."""
    rng = random.Random(0)
    shots, rows = [rng.randrange(1000) for _ in range(100)], []
    for _ in range(5):
        question = [rng.randrange(1000) for _ in range(20)]
        rows += [[*shots, *question, *(rng.randrange(1000) for _ in range(6))] for _ in range(4)]
    rows.sort()
    steps = list(plan_rows(rows, [120] * 20, batch_size=8, worth=32))
    read = sum(len(step.ids) for step in steps if isinstance(step, Read))
    added = sum(len(rows[n]) - step.depth for step in steps if isinstance(step, Batch) for n in step.numbers)
    assert (read, added, len(steps)) == (100 + 5 * 20, 20 * 6, 1 + 2 * 5)
