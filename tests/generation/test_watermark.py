"""Watermarks against transformers: green lists, marked scores, whole answers, and its detector on what we write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkLogitsProcessor,
)

from mlm_cli.checkpoint.hub import load_model_folder
from mlm_cli.errors import UsageError
from mlm_cli.generation.answer import EncodedPrompt, Settings
from mlm_cli.generation.answerer import decoder_of, make_answerer
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling, choose, draw
from mlm_cli.generation.watermark import Watermark, green_lists
from mlm_cli.parallel.context import ParallelContext
from tests.generation.pairs import KINDS, Pair, make_pair
from tests.generation.test_generator import Numbers

KEY = 15485863  # the one that transformers has when no other is given
NO_BOS = transformers.GPT2Config(vocab_size=400, bos_token_id=-1)
MARKS = [Watermark(KEY, 2.0), Watermark(2**61 - 1, 3.5, 0.5), Watermark(KEY, 2.5, 0.25, "selfhash", 4)]
MARKS += [Watermark(977, 2.0, 0.4, "selfhash", 1)]


def theirs_of(mark: Watermark, vocab_size: int) -> Any:
    return WatermarkLogitsProcessor(vocab_size, "cpu", mark.ratio, mark.bias, mark.key, mark.scheme, mark.context)


def config_of(mark: Watermark) -> Any:
    return transformers.WatermarkingConfig(mark.ratio, mark.bias, mark.key, mark.scheme, mark.context)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("vocab_size", [37, 400, 50257])
def test_green_lists_are_those_of_transformers(mark: Watermark, vocab_size: int) -> None:
    lists, theirs = green_lists(mark, vocab_size), theirs_of(mark, vocab_size)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(12):
        ngram = torch.randint(vocab_size, (mark.ngram,), generator=generator)
        if mark.scheme == "lefthash":
            expected = torch.zeros(vocab_size, dtype=torch.bool)
            expected[theirs._get_greenlist_ids(ngram[:1])] = True
            assert torch.equal(lists.after(int(ngram[0])), expected)
            assert int(expected.sum()) == int(vocab_size * mark.ratio)
            found.append(bool(expected[ngram[1]]))
        else:
            found.append(bool((theirs._get_greenlist_ids(ngram) == ngram[-1]).any()))
        assert lists.is_green(ngram.tolist()) == found[-1]
    assert len(set(found)) == 2


def test_lists_stay_the_same() -> None:
    """A text must be known again years later: another order of torch's random numbers is not to go unnoticed."""
    green = green_lists(Watermark(KEY), 40).after(7)
    assert green.nonzero()[:, 0].tolist() == [0, 1, 4, 6, 9, 10, 28, 29, 36, 39]
    green = [t for t in range(40) if green_lists(Watermark(KEY, 0, 0.25, "selfhash", 3), 40).is_green([5, 11, t])]
    assert green == [5, 6, 10, 12, 17, 18, 24, 30, 31, 33]


@pytest.mark.parametrize("mark", MARKS)
def test_marked_scores_are_those_of_transformers(mark: Watermark) -> None:
    torch.manual_seed(3)
    contexts = [[9, 4, 300, 17, 2], [1, 1, 1, 1, 1], [3, 399, 0, 8, 0]]
    scores = torch.randn(3, 400) * 3
    scores[1, scores[1] < scores[1].topk(7).values[-1]] = -torch.inf  # what top-k has cut
    found = mark.mark(scores.clone(), contexts)
    assert torch.equal(found, theirs_of(mark, 400)(torch.tensor(contexts), scores))
    assert (found != scores).any(1).all() and found[1].isfinite().sum() == 7


def test_a_text_too_short_to_seed_a_list_is_left_alone() -> None:
    mark, scores = MARKS[2], torch.randn(2, 400)
    found = mark.mark(scores.clone(), [[5, 6, 7], [5, 6, 7, 8]])
    assert torch.equal(found[0], scores[0]) and not torch.equal(found[1], scores[1])
    assert torch.equal(theirs_of(mark, 400)(torch.tensor([[5, 6, 7]]), scores[:1]), scores[:1])


def test_the_mark_comes_last_as_in_transformers() -> None:
    """Behind penalty, temperature, top-k and top-p, in their order; any other order draws other tokens."""
    torch.manual_seed(5)
    logits, ids, mark = torch.randn(1, 400) * 2, torch.tensor([[7, 20, 31, 7]]), MARKS[0]
    steps = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.8),
        theirs_of(mark, 400),
    ]
    expected = logits
    for step in steps:
        expected = step(ids, expected)
    rule = Sampling(0.7, 60, 0.8, 1.3, watermark=mark)
    numbers = [place / 500 for place in range(500)]
    found = [choose(logits, rule, [ids[0]], [number], ids.tolist())[0] for number in numbers]
    assert found == [int(draw(expected, [number])) for number in numbers]
    assert len(set(found)) == 15


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


def answers(
    folder: Path, prompts: list[list[int]], parallel: ParallelContext, start: int | None, texts: int, **given: Any
) -> list[list[int]]:
    """Ids of each answer."""
    rule = {key: given.pop(key) for key in list(given) if key in Sampling.__dataclass_fields__}
    settings = Settings(Sampling(**rule), **given)
    decoder = decoder_of(load_model_folder(folder, parallel)[0].eval(), texts, settings, start_id=start)
    if parallel.tensor.rank > 0:
        decoder.follow()
        return []
    encoded = [EncodedPrompt(Prompt(n, "", n, ""), tokens) for n, tokens in enumerate(prompts)]
    found = [answer.tokens for answer in make_answerer(decoder, settings, Numbers).answers(encoded)]
    decoder.close()
    return found


@pytest.mark.parametrize(("mark", "beams"), [(MARKS[0], 1), (MARKS[2], 1), (MARKS[1], 3)])
def test_answers_are_those_of_transformers(pair: Pair, mark: Watermark, beams: int) -> None:
    given: dict[str, Any] = {"repetition_penalty": 1.2, "max_new_tokens": 16}
    asked = {**given, "temperature": 0.0, "beams": beams, "end_ids": frozenset({pair.end})}
    known = (pair.folder, pair.prompts, ParallelContext.single(), pair.start)
    ours = answers(*known, 3, **asked, watermark=mark)
    for prompt, answer in zip(pair.prompts, ours, strict=True):
        out = pair.theirs.generate(
            torch.tensor([prompt]), do_sample=False, num_beams=beams, watermarking_config=config_of(mark),
            eos_token_id=pair.end, pad_token_id=0, **given,
        )  # fmt: skip
        ids = out[0, 1 if pair.start is not None else len(prompt) :].tolist()
        assert answer == ids[: ids.index(pair.end) if pair.end in ids else None], prompt
    assert ours != answers(*known, 3, **asked), "the mark changes nothing: the test shows nothing"
    assert ours == answers(*known, 1, **asked, watermark=mark)


def test_transformers_detects_what_we_sample(pair: Pair) -> None:
    known = (pair.folder, pair.prompts, ParallelContext.single(), pair.start)
    given: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 60, "seed": 3}
    others = answers(*known, 4, **given)
    for mark in (MARKS[1], MARKS[2]):
        marked = answers(*known, 4, **given, watermark=mark)
        assert marked == answers(*known, 1, **given, watermark=mark)  # in other company the same
        detector = transformers.WatermarkDetector(NO_BOS, "cpu", config_of(mark), ignore_repeated_ngrams=True)
        z = [[float(detector(torch.tensor([ids]), return_dict=True).z_score[0]) for ids in texts if len(ids) > 50]
             for texts in (marked, others)]  # fmt: skip
        assert min(z[0]) > 2 and sum(z[0]) / len(z[0]) > 3.5 and abs(sum(z[1]) / len(z[1])) < 1, z


def _sliced(rank: int, size: int, folder: Path, prompts: list[list[int]], start: int | None) -> list[Any]:
    parallel = ParallelContext.create(tensor=size) if size > 1 else ParallelContext.single()
    return [
        answers(folder, prompts, parallel, start, 3, max_new_tokens=12, temperature=temperature, watermark=MARKS[1])
        for temperature in (0.0, 1.0)
    ]


def test_slicing_changes_no_answer(pair: Pair, run_ranks: Callable[..., list[Any]]) -> None:
    if not pair.folder.name.startswith("gpt2"):
        pytest.skip("GPT-2 has shown it: rank 0 chooses, whatever the model")
    given = (pair.folder, pair.prompts, pair.start)
    assert run_ranks(_sliced, 2, *given)[0] == _sliced(0, 1, *given)


def test_where_a_mark_cannot_be() -> None:
    with pytest.raises(UsageError, match="top-k 1 leaves a watermark nothing to choose from"):
        Sampling(top_k=1, watermark=MARKS[0])
    with pytest.raises(UsageError, match="contrastive search writes no watermark"):
        Settings(Sampling(top_k=4, watermark=MARKS[0]), contrastive_alpha=0.5)


def test_the_key_is_not_shown() -> None:
    assert str(KEY) not in repr(Settings(Sampling(watermark=MARKS[0])))
