"""Texts that a model writes: rows and losses beside transformers', cuts, files of pairs, scores."""

from __future__ import annotations

import gzip
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.hub import load_model_folder, read_model_config, save_model_folder
from mlm_cli.config.schema import ModelSection, TaskSection
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import CheckpointError, DataError, UsageError
from mlm_cli.evaluation import written_texts
from mlm_cli.evaluation.written_texts import write_texts
from mlm_cli.generation.encoding import PromptEncoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.jobs.tokenizer import TrainRequest, train
from mlm_cli.models.heads import TaskModel
from mlm_cli.models.registry import build_model
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks import text_scores
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import collate
from mlm_cli.tasks.labelled_text import Example
from mlm_cli.tasks.registry import TASKS
from mlm_cli.tasks.task_folder import load_task_model, prompt_affixes, read_facts, save_task_model, start_task_model
from mlm_cli.tasks.writing import Writing
from tests.tasks.task_models import wordpiece

_SIZE: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 48}
_T5 = {"family": "t5", "position": "relative", "norm": "rmsnorm", "bias": False, "activation": "geglu", "head_dim": 8}
_LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
SECTIONS: dict[str, dict[str, Any]] = {
    "t5": {**_SIZE, **_T5, "tie_embeddings": False},
    "gpt2": _SIZE,
    "llama": {**_SIZE, **_LLAMA, "tie_embeddings": False},
}
EXAMPLES = [
    Example("one two", None, "eins zwei", "f:1"),
    Example("three", None, "drei", "f:2"),
    Example("four five six", None, "vier six", "f:3"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tok")
    train(TrainRequest((str(tiny_text),), str(folder), "unigram", 400, max_train_mb=0.1, special_tokens="t5"))
    return load_tokenizer(folder)


def make(kind: str, layout: str, tokenizer: Tokenizer, max_length: int = 48, **keys: Any) -> Writing:
    section = ModelSection(**SECTIONS[layout], vocab_size=tokenizer.vocab_size)
    settings = TaskSection(name=kind, train="train", dev="dev", **{"max_target_length": 16, **keys})  # type: ignore[arg-type]
    task = TASKS[kind](settings, TextEncoder(tokenizer, section, max_length))
    assert isinstance(task, Writing)
    return task


def affixes_in(folder: Path) -> tuple[str, str]:
    section, config = read_model_config(folder)
    return prompt_affixes(config, section.family)


def make_model(task: Writing, layout: str, parallel: ParallelContext | None = None) -> TaskModel:
    """A random model that writes different words."""
    section = ModelSection(**SECTIONS[layout], vocab_size=task.encoder.tokenizer.vocab_size, init_std=0.3)
    return TaskModel(build_model(section, parallel or ParallelContext.single(), seed=3), task.head, seed=None).eval()


def theirs(folder: Path, layout: str) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForSeq2SeqLM if layout == "t5" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("layout", SECTIONS)
def test_loss_and_texts_are_those_of_transformers(layout: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make("text_generation", layout, tokenizer, prefix="say: ")
    model = make_model(task, layout)
    save_task_model(model, task, tmp_path)
    their_model, features = theirs(tmp_path, layout), task.features(EXAMPLES)
    batch = collate(features, [2, 0, 1])
    with torch.no_grad():
        loss, count = task.loss(model(batch), batch)
    total, number, texts = 0.0, 0, []
    for example in EXAMPLES:  # one by one: nothing is padded
        source, target = tokenizer.encode(f"say: {example.text}{task.affixes[1]}"), tokenizer.encode(example.label)
        target = [*target, tokenizer.eod_id]
        if layout == "t5":
            inputs, labels = torch.tensor([[*source, tokenizer.eod_id]]), torch.tensor([target])
        else:
            inputs, labels = torch.tensor([[*source, *target]]), torch.tensor([[*[-100] * len(source), *target]])
        with torch.no_grad():
            total += float(their_model(inputs, labels=labels).loss) * len(target)
            number += len(target)
            start = inputs if layout == "t5" else inputs[:, : len(source)]
            written = their_model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=16,
                eos_token_id=tokenizer.eod_id, pad_token_id=tokenizer.pad_id,
            )  # fmt: skip
        new = written[0, 1:] if layout == "t5" else written[0, len(source) :]
        texts.append(tokenizer.decode([int(token) for token in new if int(token) not in tokenizer.special_ids]))
    assert int(count) == number and float(loss) == pytest.approx(total / number, rel=1e-5)
    for rows in (1, 3):
        found = write_texts(model.backbone, task, features, batch_size=rows)
        assert [found[unit] for unit in range(3)] == texts
    read = sum(map(len, features.rows)) + number - (0 if layout == "t5" else len(EXAMPLES))  # the last word is not read
    assert int(task.count_tokens(batch)) == read


@pytest.mark.parametrize("layout", ["t5", "gpt2"])
def test_a_model_is_opened_again_with_its_settings(layout: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make("summarization", layout, tokenizer, prefix="in short: ", suffix=" =>", max_length=40)
    model = make_model(task, layout)
    save_task_model(model, task, tmp_path)
    facts = read_facts(tmp_path, TASKS["summarization"])
    assert facts.settings == {"prefix": "in short: ", "suffix": " =>", "max_target_length": 16}
    assert facts.max_length == 40 and affixes_in(tmp_path) == ("in short: ", " =>")
    batch = collate(task.features(EXAMPLES), [0, 1, 2])
    again = load_task_model(tmp_path, ParallelContext.single(), task.head)
    further = start_task_model(tmp_path, ParallelContext.single(), task.head, seed=1)
    with torch.no_grad():
        for other in (again.eval(), further.eval()):
            torch.testing.assert_close(other(batch), model(batch), rtol=0, atol=0)
    # To another task it is a model that writes; what it learned with is not that one's.
    other = read_facts(tmp_path, TASKS["translation"])
    assert other.settings == {} and other.max_length == 48
    with pytest.raises(CheckpointError, match="not a model for classification"):
        read_facts(tmp_path, TASKS["classification"])


def test_a_model_of_pretraining_writes_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model_folder(make_model(make("translation", "t5", tokenizer), "t5").backbone, tmp_path, tokenizer)
    assert affixes_in(tmp_path) == ("", "")
    assert read_facts(tmp_path, TASKS["translation"]).max_length == 48


@pytest.mark.parametrize(("layout", "room"), [("t5", 20), ("gpt2", 20 - 8)])
def test_a_long_text_loses_its_own_end_alone(layout: str, room: int, tokenizer: Tokenizer) -> None:
    task = make("translation", layout, tokenizer, max_length=20, max_target_length=8, prefix="say: ", suffix=" END")
    text = "the quick brown fox jumps over the lazy dog and then some more of them"
    features = task.features([Example(text, None, text, "f:1"), Example("dog", None, "fox", "f:2")])
    end = [tokenizer.eod_id] if layout == "t5" else []
    ids = features.rows[0].ids.tolist()
    assert room - 3 <= len(ids) <= room
    kept = tokenizer.decode(ids[: len(ids) - len(end)])
    assert kept.startswith("say: the") and kept.endswith(" END") and ids[len(ids) - len(end) :] == end
    assert text.startswith(kept.removeprefix("say: ").removesuffix(" END"))
    # ids are those of the text that is left: what `mlm generate` would give the model
    assert ids == [*tokenizer.encode(kept), *end]
    assert features.answers is not None
    assert [len(answer) for answer in features.answers] == [8, len(tokenizer.encode("fox")) + 1]
    assert all(answer[-1] == tokenizer.eod_id for answer in features.answers)
    batch = collate(features, [0, 1])
    assert batch["tokens"].shape[1] <= 20 and batch["loss_mask"].sum() == sum(map(len, features.answers))


def test_the_template_begins_a_causal_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As `mlm generate` begins a prompt, and transformers does."""
    files = json.loads((Path(tokenizer.spec) / "tokenizer.json").read_text())
    files["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [tokenizer.eod_id], "tokens": ["</s>"]}},
    }  # fmt: skip
    for path in Path(tokenizer.spec).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(files))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "</s>"}))
    for layout, end in (("gpt2", tokenizer.encode("one two\n")), ("t5", [*tokenizer.encode("one two"), 1])):
        task = make("translation", layout, load_tokenizer(tmp_path))
        ids = task.features(EXAMPLES[:1]).rows[0].ids.tolist()
        assert ids == [tokenizer.eod_id, *end]
        encoder = PromptEncoder(load_tokenizer(tmp_path), 48, ends=layout == "t5", affixes=task.affixes)
        assert ids == encoder.encode(Prompt(0, "one two", 0, "")).tokens


def test_no_room_and_no_end_are_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"20 tokens leave no room for a text beside task\.max_target_length 19"):
        make("translation", "gpt2", tokenizer, max_length=20, max_target_length=19)
    with pytest.raises(UsageError, match="4 tokens leave no room for a text"):
        make("translation", "t5", tokenizer, max_length=4, prefix="a long way to say it: ")
    make("translation", "t5", tokenizer, max_length=20, max_target_length=100)
    with pytest.raises(DataError, match="`bytes` has no padding token, which a T5's texts begin with"):
        make("translation", "t5", load_tokenizer("bytes"))
    with pytest.raises(UsageError, match="a model of the bert family fills gaps"):
        TASKS["translation"].check_family(ModelSection(family="bert"))


def test_a_suffix_that_the_tokenizer_drops(tmp_path: Path) -> None:
    words = wordpiece(tmp_path)
    with pytest.raises(UsageError, match=r"drops the suffix '\\n': nothing would say where a text ends"):
        make("translation", "gpt2", words)
    task = make("translation", "gpt2", words, suffix="")
    features = task.features([Example(" ", None, "good film", "f:1")])
    assert features.rows[0].ids.tolist() == [words.eod_id]  # nothing at all: the beginning of a document
    assert collate(features, [0])["loss_mask"].tolist() == [[1, 1, 1]]
    words.eod_id = None
    with pytest.raises(DataError, match="no token that ends a text"):
        make("translation", "gpt2", words, suffix="")


def test_what_is_cut_is_said(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    make("translation", "t5", tokenizer, max_target_length=2).features(EXAMPLES)
    assert "3 of 3 texts to be written are longer than task.max_target_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_length", "abc"), ("max_length", -3), ("max_target_length", "8"), ("prefix", 5), ("suffix", {"a": 1})],
)
def test_a_malformed_entry_is_named(key: str, value: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make("translation", "t5", tokenizer)
    save_task_model(make_model(task, "t5"), task, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mlm_task"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read_it in (lambda: read_facts(tmp_path, TASKS["translation"]), lambda: affixes_in(tmp_path)):
        with pytest.raises(CheckpointError, match=rf"config\.json: `mlm_task\.{key}` is "):
            read_it()


def test_a_model_without_words_writes_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make("translation", "gpt2", tokenizer)
    save_task_model(make_model(task, "gpt2"), task, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlm_task": {"name": "embedding"}}))
    with pytest.raises(CheckpointError, match="a model for embedding, which writes no texts"):
        read_facts(tmp_path, TASKS["translation"])


def read(path: Path, **keys: Any) -> list[Example]:
    section = TaskSection(name="translation", train="", dev="", **keys)
    return Writing.read(str(path), section)  # type: ignore[return-value]


def test_aligned_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.en").write_bytes("a\rb\nsecond \n\nfourth\u2028line\n".encode())
    (tmp_path / "train.fr.gz").write_bytes(gzip.compress(b"un\ndeux\ntrois\nquatre\n"))
    found = read(tmp_path / "train", text_column="en", label_column="fr")
    # neither a carriage return nor a line separator within a sentence puts the others out of step
    assert [(e.text, e.label) for e in found] == [("a\rb", "un"), ("second", "deux"), ("fourth\u2028line", "quatre")]
    assert found[2].where == f"{tmp_path / 'train.en'}:4"
    assert "1 lines are left out" in capsys.readouterr().err
    (tmp_path / "train.fr.gz").write_bytes(gzip.compress(b"un\ndeux\n"))
    with pytest.raises(DataError, match=r"train\.fr\.gz ends after line 2, .*train\.en does not"):
        read(tmp_path / "train", text_column="en", label_column="fr")
    with pytest.raises(DataError, match=r"train\.en is there, .*train\.de is not"):
        read(tmp_path / "train", text_column="en", label_column="de")
    with pytest.raises(DataError, match=r"labelled text is read from"):
        read(tmp_path / "absent", text_column="en", label_column="de")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "train.en", text_column="en", label_column="fr")
    assert "aligned lines are named by what their two files begin with" in (caught.value.hint or "")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="holds no examples") as caught:
        read(tmp_path / "empty.jsonl.gz")
    assert caught.value.hint is None
    (tmp_path / "latin.en").write_bytes(b"caf\xe9\n")
    (tmp_path / "latin.fr").write_text("x\n")
    with pytest.raises(DataError, match=r"latin\.en is not UTF-8"):
        read(tmp_path / "latin", text_column="en", label_column="fr")
    (tmp_path / "blank.en").write_text("\n\n")
    (tmp_path / "blank.fr").write_text("\n\n")
    with pytest.raises(DataError, match="hold no pairs of lines"):
        read(tmp_path / "blank", text_column="en", label_column="fr")


def test_lists_are_sentences_and_references(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ["One.", "Two."], "label": ["1 2", " 12 "]}\n{"text": "Three.", "label": "3"}\n')
    first, second = read(path)
    assert (first.text, first.label, first.references) == ("One. Two.", "1 2", ("1 2", "12"))
    assert (second.text, second.label, second.references) == ("Three.", "3", ())
    for bad in ('{"text": "a", "label": []}', '{"text": "a", "label": ["x", ""]}'):
        path.write_text(bad + "\n")
        with pytest.raises(DataError, match=r"a\.jsonl:1 has no label"):
            read(path)
    path.write_text('{"text": [1], "label": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: `text` is \[1\], not a list of texts"):
        read(path)
    path.write_text('{"text": "a\\ud800b", "label": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: `text` holds half of a surrogate pair"):
        read(path)
    # a classifier's label is no list
    path.write_text('{"text": "a", "label": ["x"]}\n')
    with pytest.raises(DataError, match="not a text or a number"):
        TASKS["classification"].read(str(path), TaskSection(train="", dev=""))


def test_real_files(test_data: Path) -> None:
    lines = gzip.decompress((test_data / "finetune/multi30k/val.de.gz").read_bytes()).decode().splitlines()
    found = read(test_data / "finetune/multi30k/val", text_column="en", label_column="de")
    assert len(found) == 1014 and [e.label for e in found] == [line.strip() for line in lines]
    papers = read(test_data / "finetune/scitldr/dev.jsonl", text_column="source", label_column="target")
    assert len(papers) == 619 and max(len(e.references) for e in papers) > 1
    assert papers[0].text.startswith("Mixed precision training (MPT) is becoming")


def scores(kind: str, texts: list[str], golds: list[tuple[str, ...]], tokenizer: Tokenizer, **keys: Any) -> Any:
    examples = [Example("x", None, gold[0], f"f:{n}", references=gold) for n, gold in enumerate(golds, 1)]
    return make(kind, "t5", tokenizer, **keys).score(texts, examples, seed=1)


def test_bleu_by_its_definition(tokenizer: Tokenizer) -> None:
    """Papineni et al. 2002, section 2.3: clipped precisions of 1 to 4 words, brevity penalty, the nearest reference."""
    texts = ["the cat sat on the mat today\n", "a dog"]
    golds = [("the cat sat on a mat today", "on the mat sat the cat"), ("a dog barks",)]
    found = scores("translation", texts, golds, tokenizer)
    # 1: 7/7 + 2/2, 2: the cat, cat sat, sat on, on the, the mat, mat today + a dog = 6/6 + 1/1, 3: the cat sat,
    # cat sat on, on the mat of 5; 4: the cat sat on of 4
    precisions = [9 / 9, 7 / 7, 3 / 5, 1 / 4]
    brevity = math.exp(1 - (7 + 3) / (7 + 2))
    expected = 100 * brevity * math.exp(sum(math.log(p) for p in precisions) / 4)
    assert found.metrics["bleu"] == pytest.approx(expected, rel=1e-9)
    assert 0 < found.metrics["chrf"] < 100 and "tok:13a" in found.facts["bleu_signature"]
    assert found.predictions["predictions.txt"] == "the cat sat on the mat today\na dog\n"
    line = json.loads(found.predictions["predictions.jsonl"].splitlines()[1])
    assert line == {"source": "x", "references": ["a dog barks"], "prediction": "a dog", "where": "f:2"}
    chinese = scores("translation", ["猫坐在垫子上"], [("猫坐在垫子上",)], tokenizer, bleu_tokenize="zh")
    assert chinese.metrics["bleu"] == pytest.approx(100)


def test_rouge_by_its_definition(tokenizer: Tokenizer) -> None:
    """Lin 2004, sections 2 and 3: F-measures over words, pairs and longest common subsequences; the best reference."""
    golds = [("the gunman", "police kill the gunman"), ("x",)]
    found = scores("summarization", ["police killed the gunman", ""], golds, tokenizer)
    # by the stemmer "killed" and "kill" are one: the second reference is matched whole; the empty text scores 0
    assert found.metrics == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rougeLsum": 0.5}
    assert found.facts["empty"] == 1
    found = scores("summarization", ["police killed the gunman"], [("the gunman killed police",)], tokenizer)
    assert found.metrics["rouge1"] == 1.0 and found.metrics["rougeL"] == pytest.approx(0.5)
    assert found.metrics["rouge2"] == pytest.approx(1 / 3)  # the gunman, of three pairs each


def test_rouge_of_other_scripts(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    texts, golds = ["мир и свет", "你好 世界", "Größe Häuser"], [("мир и свет",), ("你好世界",), ("Gräße Höuser",)]
    found = scores("summarization", texts, golds, tokenizer, rouge_tokenize="unicode")
    assert found.metrics["rouge1"] == pytest.approx(2 / 3) and not capsys.readouterr().err
    scores("summarization", texts, golds, tokenizer)
    assert "knows no letters but a to z" in capsys.readouterr().err
    # where all letters are, both ways are one
    plain = "The police, killing_2 gunmen; don't re-enter houses!"
    theirs = pytest.importorskip("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=True).tokenize(plain)
    assert text_scores._Words(pytest.importorskip("nltk.stem.porter").PorterStemmer()).tokenize(plain) == theirs


def test_words_in_common(tokenizer: Tokenizer) -> None:
    found = scores("text_generation", ["The Cat sat!", "no"], [("cat sat", "dog"), ("yes no",)], tokenizer)
    assert found.metrics == {"f1": pytest.approx((1 + 2 / 3) / 2), "exact_match": 0.5}
    assert found.stderr["exact_match"] == pytest.approx(0.5)


def test_a_missing_scorer_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UsageError, match="needs the package `sacrebleu`") as caught:
        make("translation", "t5", tokenizer)
    assert caught.value.hint == "pip install 'mlm-cli[eval]'"
    make("text_generation", "t5", tokenizer)


def written_on_ranks(rank: int, world_size: int, folder: str, tensor: int) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=tensor)
    found = {}
    for layout in ("t5", "gpt2"):
        place = Path(folder) / layout
        task = make("translation", layout, load_tokenizer(place))
        backbone, _ = load_model_folder(place, parallel)
        features = task.features(EXAMPLES)
        rounds: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(written_texts, "_ROUND", 1)
            found[layout] = write_texts(
                backbone.eval(), task, features, batch_size=1, interrupt=partial(rounds.append, 1)
            )
        # equal on all ranks, also on one that has nothing left to write
        assert len(rounds) == (3 if tensor == 2 else 2)
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_write_the_same(tensor: int, tokenizer: Tokenizer, tmp_path: Path, run_ranks: Any) -> None:
    expected = {}
    for layout in ("t5", "gpt2"):
        task = make("translation", layout, tokenizer)
        model = make_model(task, layout)
        save_task_model(model, task, tmp_path / layout)
        expected[layout] = write_texts(model.backbone, task, task.features(EXAMPLES), batch_size=2)
        assert len(set(expected[layout].values())) > 1
    assert run_ranks(written_on_ranks, 2, str(tmp_path), tensor) == [expected] * 2
