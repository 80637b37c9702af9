"""The detector against transformers and exact fractions; the two commands end to end; what people wrote."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlm_cli import __version__
from mlm_cli.cli.app import run as mlm
from mlm_cli.config.requests import EvaluateRequest, GenerateRequest
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.evaluation.watermark import Count, Detector, count_green, watermark_result
from mlm_cli.generation.watermark import Watermark
from mlm_cli.jobs import evaluate, generate
from tests.generation.folders import save_model, save_tokenizer
from tests.generation.test_watermark import KEY, config_of

WORDS = ["".join(letters) for letters in product("bdfgklmnprst", "aeiou", "dglmnprst")]
SCHEMES = [Watermark(KEY), Watermark(KEY, 0.0, 0.5), Watermark(KEY, 0.0, 0.25, "selfhash", 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes words of three letters at random, each a token, so that its text has the tokens it chose."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder, [" " + " ".join(WORDS)] * 3, 1000)
    model = save_model(folder, "gpt2", 1000, context=256)
    tokenizer = load_tokenizer(str(folder))
    known = [tokenizer.encode(f" {word}") for word in WORDS]
    words = torch.tensor([ids[0] for ids in known if len(ids) == 1])
    assert len(words) > 400
    with torch.no_grad():  # one direction of the state is large, and tells words from all else
        embedding = model.transformer.wte.weight.mul_(0.3)
        embedding[:, 0] = -40.0
        embedding[words, 0] = 0.0
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mark", SCHEMES)
def test_scores_are_those_of_transformers(mark: Watermark) -> None:
    """Also where runs of tokens come again, which count once."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(30, (5, 90), generator=generator)
    theirs = transformers.WatermarkDetector(
        transformers.GPT2Config(vocab_size=400, bos_token_id=-1), "cpu", config_of(mark), ignore_repeated_ngrams=True
    )(ids, return_dict=True)
    detector = Detector(mark.ratio, 4.0)
    counts = [count_green(row.tolist(), mark, 400) for row in ids]
    assert [count.scored for count in counts] == theirs.num_tokens_scored.tolist()
    assert [count.green for count in counts] == theirs.num_green_tokens.tolist()
    np.testing.assert_allclose([detector.z_score(count) for count in counts], theirs.z_score, rtol=1e-12)
    assert mark.scheme == "selfhash" or theirs.num_tokens_scored.min() < 89


def test_a_run_of_tokens_counts_once() -> None:
    assert count_green([7, 8] * 50, SCHEMES[0], 400).scored == 2
    assert count_green([7], SCHEMES[0], 400) == count_green([], SCHEMES[0], 400) == Count(0, 0)
    assert count_green([1, 2, 3], SCHEMES[2], 400).scored == 0


@pytest.mark.parametrize(("scored", "green", "ratio"), [(8, 8, 0.25), (25, 15, 0.25), (60, 10, 0.25), (300, 181, 0.5)])
def test_p_values_are_binomial(scored: int, green: int, ratio: float) -> None:
    share = Fraction(ratio)
    exact = sum(math.comb(scored, k) * share**k * (1 - share) ** (scored - k) for k in range(green, scored + 1))
    assert Detector(ratio, 4.0).p_value(Count(scored, green)) == pytest.approx(float(exact), rel=1e-10)


def test_what_is_too_short() -> None:
    """0.25^8 < P(z > 4) = 3.2e-5 < 0.25^7; with many green tokens a score of 4 is out of reach for longer."""
    detector = Detector(0.25, 4.0)
    assert detector.least == 8
    assert [detector.verdict(Count(7, 7)), detector.verdict(Count(8, 8))] == ["too short", "watermarked"]
    assert detector.verdict(Count(0, 0)) == "too short" and detector.z_score(Count(0, 0)) is None
    greens = Detector(0.9, 4.0)
    assert greens.z_score(Count(greens.least, greens.least)) > 4 >= greens.z_score(Count(143, 143))  # type: ignore[operator]
    assert Detector(0.25, 100.0).verdict(Count(5000, 5000)) == "watermarked"


def test_the_summary_leaves_out_what_is_too_short() -> None:
    counts = [Count(100, 60), Count(100, 25), Count(7, 7)]
    result = watermark_result(counts, Detector(0.25, 4.0), config={}, num_original=9)
    assert result.metrics["detected"] == 0.5 and result.metrics["green_fraction"] == pytest.approx(0.425)
    assert result.metrics["z_score"] == pytest.approx(35 / math.sqrt(100 * 0.1875) / 2)
    assert (result.num_samples, result.num_original, result.config["num_too_short"]) == (2, 9, 1)
    with pytest.raises(DataError, match="none of 1 texts is long enough: 8 different runs"):
        watermark_result(counts[2:], Detector(0.25, 4.0), config={}, num_original=1)


@pytest.mark.parametrize("mark", SCHEMES)
def test_what_people_wrote_is_not_taken_for_marked(mark: Watermark, test_data: Path) -> None:
    """Passages of a novel under many keys: z-scores are those of chance, and hardly one is beyond the threshold."""
    tokenizer = load_tokenizer(str(test_data / "tokenizers/gpt2"))
    with gzip.open(
        test_data / "corpora/english_novels/Chesterton_Thursday_1908.txt.gz", "rt", encoding="utf-8"
    ) as file:
        words = file.read().split()[2000:]
    passages = [tokenizer.encode(" " + " ".join(words[n * 100 : n * 100 + 100])) for n in range(30)]
    vocab_size = 2000  # lists of a small vocabulary are drawn quickly
    detector, found = Detector(mark.ratio, 4.0), list[Count]()
    for key in range(101, 107):
        this = replace(mark, key=key)
        found += [count_green([token % vocab_size for token in ids], this, vocab_size) for ids in passages]
    z = np.array([detector.z_score(count) for count in found], dtype=float)
    assert min(count.scored for count in found) > 80 and len(z) == 180
    assert abs(z.mean()) < 0.3 and 0.85 < z.std() < 1.2
    assert (z > 4).sum() <= 1
    likely = np.array([detector.p_value(count) for count in found]) < 0.05
    assert 0 < likely.mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 180)


QUESTIONS = [f" {WORDS[n]} {WORDS[3 * n]}" for n in range(1, 7)]
CHOICE = ["--max-new-tokens", "80", "--temperature", "2", "--seed", "5", "--format", "json", "-q"]


def written(folder: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    prompts = output.with_name("questions.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    assert mlm(["generate", str(folder), "--prompts", str(prompts), *CHOICE, "-o", str(output), *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def looked_at(folder: Path, texts: Path, output: Path, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    words = ["evaluate", str(folder), "--task", "watermark", "--data", str(texts), "-o", str(output), "-q", *more]
    assert mlm(words) == 0
    document = json.loads((output / "results.json").read_text())
    return document, [json.loads(line) for line in (output / "watermark.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_what_is_written_with_a_key_is_found_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = 1234577291
    monkeypatch.setenv("MARK", str(secret))
    (tmp_path / "other").write_text("1234577293\n")
    right = ["generate.watermark_key=env:MARK", f"generate.watermark_scheme={scheme}"]
    wrong = [f"generate.watermark_key=file:{tmp_path / 'other'}", right[1]]
    marked, plain = tmp_path / "marked.jsonl", tmp_path / "plain.jsonl"
    written(folder, marked, *right, "generate.watermark_bias=4", "generate.provenance=true")
    written(folder, plain)
    # The weights are of no interest to the detector.
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    document, records = looked_at(bare, marked, tmp_path / "found", *right)
    assert document["results"]["watermark"]["detected,none"] == 1.0
    assert [record["where"] for record in records] == [f"{marked}:{line}" for line in range(1, 7)]
    theirs = transformers.WatermarkDetector(
        transformers.GPT2Config(vocab_size=1000, bos_token_id=-1), "cpu", ignore_repeated_ngrams=True,
        watermarking_config=transformers.WatermarkingConfig(
            0.25, 4.0, secret, scheme, 4 if scheme == "selfhash" else 1
        ),
    )  # fmt: skip
    tokenizer = load_tokenizer(str(folder))
    for record in records:
        assert record["verdict"] == "watermarked" and record["p_value"] < 1e-4
        found = theirs(torch.tensor([tokenizer.encode(record["text"])]), return_dict=True)
        assert record["z_score"] == pytest.approx(found.z_score[0]) and found.prediction[0]
    for texts, keys in ((marked, wrong), (plain, right)):
        document, records = looked_at(bare, texts, tmp_path / "none", *keys)
        assert {record["verdict"] for record in records} == {"not found"}
        assert abs(document["results"]["watermark"]["z_score,none"]) < 1.5
    said = "".join(capsys.readouterr())
    assert not any(str(secret) in text for text in [said, *(p.read_text() for p in tmp_path.rglob("*.json*"))])


def test_answers_say_what_wrote_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "77")
    mark = ["generate.watermark_key=env:MARK", "generate.watermark_bias=2", "generate.provenance=true"]
    records = written(folder, tmp_path / "answers.jsonl", *mark)
    plain = written(folder, tmp_path / "plain.jsonl", *mark[:2])
    hashes = f"{sha256((folder / 'model.safetensors').read_bytes()).hexdigest()}  model.safetensors\n"
    for number, (record, without) in enumerate(zip(records, plain, strict=True)):
        assert record.pop("provenance") == {
            "mlm_version": __version__, "model": str(folder), "step": None,
            "weights_sha256": sha256(hashes.encode()).hexdigest(), "dtype": "float32", "as_trained": True,
            "max_new_tokens": 80, "stop": [], "repetition_penalty": 1.0, "temperature": 2.0, "top_k": 0, "top_p": 1.0,
            "seed": 5, "watermark": {"scheme": "lefthash", "context": 1, "ratio": 0.25, "bias": 2.0},
            "prompt_number": number,
        }  # fmt: skip
        assert record == without
    beams = written(folder, tmp_path / "b.jsonl", mark[2], "--temperature", "0", "generate.beams=2")[0]["provenance"]
    assert beams["beams"] == 2 and beams["watermark"] is None and "seed" not in beams
    with pytest.raises(UsageError, match="provenance stands in JSON answers"):
        generate.run(GenerateRequest(str(folder), ("x",), provenance=True))


@pytest.mark.parametrize(
    ("verb", "keys", "said"),
    [
        ("generate", ["generate.watermark_bias=2"], "`generate.watermark_key` does not say where it is"),
        ("evaluate", [], "`generate.watermark_key` does not say where it is"),
        ("generate", ["generate.watermark_bias=2", "generate.watermark_key=env:NONE"], "`NONE` does not hold"),
        ("evaluate", ["generate.watermark_key=env:WORD"], "`WORD` does not hold a watermark's key"),
        ("evaluate", ["generate.watermark_key=file:/no/file"], "key in `/no/file`: No such file"),
        ("evaluate", ["generate.watermark_key=987654321"], "must be env:NAME or file:PATH"),
        ("evaluate", ["generate.watermark_key=[9876543]"], "must be env:NAME or file:PATH"),
        (
            "evaluate",
            ["generate.watermark_key=env:MARK", "generate.watermark_context=2"],
            "lefthash looks at one token",
        ),
        ("evaluate", ["generate.watermark_key=env:MARK", "--ensemble", "other"], "tokenizer of one model"),
        (
            "generate",
            ["generate.watermark_bias=2", "generate.watermark_key=env:MARK", "--top-k", "1"],
            "top-k 1 leaves",
        ),
    ],
)
def test_what_cannot_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, verb: str, keys: list[str], said: str
) -> None:
    monkeypatch.setenv("MARK", "77")
    monkeypatch.setenv("WORD", "98765432100000000000")
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(WORDS))
    if "other" in keys:
        keys = [str(folder.parent) if key == "other" else key for key in keys]
        (folder.parent / "config.json").write_text("{}")
    given = ["--prompt", "x"] if verb == "generate" else ["--task", "watermark", "--data", str(texts)]
    assert mlm([verb, str(folder), *given, *keys]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "98765" not in shown.out + shown.err


def test_a_dry_run_names_the_place_of_the_key(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "1234577")
    words = ["generate.watermark_key=env:MARK", "generate.watermark_bias=2", "--dry-run"]
    assert mlm(["generate", str(folder), "--prompt", "x", *words]) == 0
    shown = capsys.readouterr().out
    assert "watermark_key  env:MARK" in shown and "1234577" not in shown


def test_texts_of_a_folder_and_a_limit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "77")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text("" if name == "a" else " ".join(WORDS))
    key = "generate.watermark_key=env:MARK"
    document, records = looked_at(folder, texts, tmp_path / "out", key, "--limit", "2", "evaluate.watermark_z=3")
    assert [(Path(r["where"]).name, r["verdict"]) for r in records] == [("a.txt", "too short"), ("b.txt", "not found")]
    assert records[0]["z_score"] is None and records[0]["p_value"] == 1.0
    assert document["n-samples"]["watermark"] == {"original": 3, "effective": 1}
    assert document["configs"]["watermark"]["threshold"] == 3.0
    with pytest.raises(DataError, match="none of 1 texts is long enough"):
        request = EvaluateRequest(str(folder), ("watermark",), (str(texts / "a.txt"),), watermark_key="env:MARK")
        evaluate.run(request)
