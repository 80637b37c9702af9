"""Recipe resolution: precedence, YAML, bases, paths, and mistakes told all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mlm_cli.config.builtin import builtin_names, recipes_root
from mlm_cli.config.resolve import read_draft, recipe_text, resolve_recipe, write_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_precedence_defaults_base_recipe_overrides_flags(folder: Path) -> None:
    write(folder, "base.yaml", "train: {steps: 10, micro_batch_size: 2, clip_grad: 0.5}\nseed: 1\n")
    recipe = write(folder, "my.yaml", "base: base.yaml\ntrain: {steps: 20, micro_batch_size: 3}\n")
    found = resolve_recipe(recipe, ["train.steps=30", "seed=2"], overlay={"seed": 3})
    assert found.train.steps == 30  # override over recipe
    assert found.train.micro_batch_size == 3  # recipe over base
    assert found.train.clip_grad == 0.5  # base over default
    assert found.train.recompute == "none"  # default
    assert found.seed == 3  # flag over override
    assert found.base is None  # merged in


def test_base_is_looked_for_beside_the_recipe_and_among_the_built_in(folder: Path) -> None:
    write(folder, "deep/base.yaml", "base: debug/gpt\nmodel: {num_layers: 5}\n")
    recipe = write(folder, "deep/my.yaml", "base: base.yaml\nmodel: {hidden_size: 32}\n")
    found = resolve_recipe(recipe)
    assert (found.model.num_layers, found.model.hidden_size, found.model.seq_length) == (5, 32, 64)


def test_base_circle_is_named(folder: Path) -> None:
    write(folder, "a.yaml", "base: b.yaml\n")
    write(folder, "b.yaml", "seed: 1\nbase: a.yaml\n")
    with pytest.raises(UsageError, match=r"b\.yaml:2: .*circle: a\.yaml -> b\.yaml -> a\.yaml"):
        resolve_recipe("a.yaml")


def test_missing_base_names_file_and_line(folder: Path) -> None:
    recipe = write(folder, "a.yaml", "seed: 1\nbase: gpt/355n\n")
    with pytest.raises(UsageError, match=r"a\.yaml:2: `base`: .*gpt/355n") as caught:
        resolve_recipe(recipe)
    assert "gpt/355m" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.5E-4", 1.5e-4),
        ("3.0e-4", 3e-4),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1_000.0", 1000.0),
        ("2", 2.0),
    ],
)
def test_numbers_of_yaml_1_2(folder: Path, text: str, value: float) -> None:
    recipe = write(folder, "a.yaml", f"optimizer:\n  lr: {text}\n")
    assert resolve_recipe(recipe).optimizer.lr == value
    assert resolve_recipe(None, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_yaml_1_1_traps_do_not_spring(folder: Path) -> None:
    recipe = write(folder, "a.yaml", "description: no\ntokenizer: on\ndata: {split: 1:30}\nseed: 010\n")
    draft = read_draft(recipe, [])
    assert draft.values["description"] == "no"
    assert draft.values["tokenizer"] == "on"
    assert draft.values["data"]["split"] == "1:30"
    assert draft.values["seed"] == 10


def test_booleans_written_as_words_still_work() -> None:
    assert resolve_recipe(None, ["model.bias=no"]).model.bias is False
    assert resolve_recipe(None, ["model.bias=false"]).model.bias is False


def test_override_values_are_yaml() -> None:
    found = resolve_recipe(None, ["optimizer.betas=[0.9, 0.95]", "data.path=[{prefix: /a, weight: 2}, {prefix: /b}]"])
    assert found.optimizer.betas == (0.9, 0.95)
    assert found.data.path is not None and not isinstance(found.data.path, str)
    assert [(part.prefix, part.weight) for part in found.data.path] == [("/a", 2.0), ("/b", 1.0)]
    assert resolve_recipe(None, ["data.split=969,30,1"]).data.split == "969,30,1"
    assert resolve_recipe(None, ["train.steps=3e2"]).train.steps == 300


def test_null_puts_a_key_back_to_its_default(folder: Path) -> None:
    recipe = write(folder, "a.yaml", "train: {steps: 7, global_batch_size: 8}\nmodel: {vocab_size: 100}\ndata:\n")
    found = resolve_recipe(recipe, ["train.steps=null", "train.global_batch_size=", "model.vocab_size=~"])
    assert found.train.steps == Recipe().train.steps
    assert found.train.global_batch_size is None
    assert found.model.vocab_size is None


def test_merge_keys_and_anchors(folder: Path) -> None:
    recipe = write(folder, "a.yaml", "train: &t {steps: 5}\nlog: {every: 1}\nevaluate: {<<: {every: 3}, batches: 2}\n")
    found = resolve_recipe(recipe)
    assert (found.train.steps, found.evaluate.every, found.evaluate.batches) == (5, 3, 2)


def test_every_mistake_at_once_with_file_line_and_suggestion(folder: Path) -> None:
    recipe = write(
        folder,
        "my.yaml",
        "model:\n  hiden_size: 64\n  num_attention_heads: 5\n  position: rotery\ntrain:\n  steps: many\nschedule:\n"
        "  warmup_steps: -1\nlearning_rate: 1\ntensor: 2\n",
    )
    with pytest.raises(UsageError) as caught:
        resolve_recipe(recipe, ["optimizer.lr=0", "nonsense"], verb="pretrain", world_size=1)
    text = str(caught.value)
    for part in (
        "my.yaml:2: `model.hiden_size` is not a recipe key\n    -> did you mean `model.hidden_size`?",
        "my.yaml:4: `model.position` must be one of 'learned', 'rotary' or 'relative'; it is 'rotery'",
        "    -> did you mean `rotary`?",
        "my.yaml:6: `train.steps` must be a whole number; it is 'many'",
        "my.yaml:8: `schedule.warmup_steps` must be greater than or equal to 0; it is -1",
        "my.yaml:9: `learning_rate` is not a recipe key\n    -> did you mean `optimizer.lr`?",
        "my.yaml:10: `tensor` is not a recipe key\n    -> did you mean `parallel.tensor`?",
        "override `optimizer.lr=0`: `optimizer.lr` must be greater than 0; it is 0",
        "`nonsense` is not of the form KEY=VALUE",
        "no training data",
        "`tokenizer` is not set",
        "`output` is not set",
    ):
        assert part in text, part
    assert text.startswith("11 mistakes in the recipe")


def test_checks_across_keys_run_beside_unknown_keys_unless_they_hang_together(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe("debug/gpt", ["train.stepz=3", "model.num_attention_heads=5", "data.path=x"], verb="pretrain")
    assert "train.stepz" in str(caught.value) and "5 heads" in str(caught.value)
    # warmup 5 of 50 steps is no mistake; with `train.steps` mistyped nothing may be said about either
    with pytest.raises(UsageError) as caught:
        resolve_recipe("debug/gpt", ["train.step=2", "schedule.warmup_steps=60", "data.path=x"], verb="pretrain")
    assert "warmup" not in str(caught.value)


def test_one_mistake_is_one_error_and_one_hint() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe(None, ["train.stepz=3"])
    assert str(caught.value) == "override `train.stepz=3`: `train.stepz` is not a recipe key"
    assert caught.value.hint == "did you mean `train.steps`?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("train.lr", "optimizer.lr"),
        ("max_steps", "train.steps"),
        ("modle.num_layers", "model"),
        ("paralel.tensor", "parallel"),
        ("model.num_layer", "model.num_layers"),
        ("zero", "parallel.zero"),
        ("outptu", "output"),
    ],
)
def test_suggestions(key: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe(None, [f"{key}=1"])
    assert f"`{meant}`" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2\n", r"a\.yaml:2: not valid YAML"),
        ("model:\n\tseed: 1\n", r"a\.yaml:2: not valid YAML"),
        ("seed: 1\nmodel: {}\nseed: 2\n", r"a\.yaml:3: `seed` is given twice, first on line 1"),
        ("- 1\n- 2\n", r"a recipe is a mapping"),
        ("model: 5\n", r"a\.yaml:1: `model` must be a section of keys; it is 5"),
        ("optimizer:\n  betas: [0.9, 1.5]\n", r"a\.yaml:2: `optimizer\.betas"),
        ("data:\n  path: [{prefix: a, wieght: 2}]\n", r"a\.yaml:2: `data\.path\[0\]` has an unknown key `wieght`"),
    ],
)
def test_bad_files(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_recipe(write(folder, "a.yaml", text))


def test_a_binary_file_is_no_recipe(folder: Path) -> None:
    (folder / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"a\.yaml: not UTF-8"):
        resolve_recipe("a.yaml")


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe("gpt/8.3")
    assert "`gpt/8.3b`" in str(caught.value.hint)


def test_paths_become_absolute_from_the_working_directory_and_names_stay(folder: Path) -> None:
    (folder / "tok").mkdir()
    recipe = write(folder, "sub/a.yaml", "data: {path: data/x}\ntokenizer: tok\noutput: runs/a\ninit_from: org/name\n")
    found = resolve_recipe(recipe)
    assert found.data.path == str(folder / "data/x")
    assert found.tokenizer == str(folder / "tok")
    assert found.output == str(folder / "runs/a")
    assert found.init_from == "org/name"  # nothing here by that name: a Hub name
    assert resolve_recipe(None, ["tokenizer=bytes"]).tokenizer == "bytes"
    blend = resolve_recipe(None, ["data.train=[{prefix: ~/x}]"]).data.train
    assert blend is not None and not isinstance(blend, str)
    assert blend[0].prefix == str(Path("~/x").expanduser())


def test_written_recipe_reads_back_the_same_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve_recipe(
        "debug/llama", ["data.path=d/x", "optimizer.lr=3e-4", "optimizer.eps=1e-12", "description='yes: 1e3'"]
    )
    (folder / "run").mkdir()
    write_recipe(found, folder / "run" / "recipe.yaml")
    monkeypatch.chdir("/")
    assert resolve_recipe(str(folder / "run" / "recipe.yaml")) == found
    assert resolve_recipe(str(folder / "run")) == found  # a run folder stands for its recipe
    assert list((folder / "run").iterdir()) == [folder / "run" / "recipe.yaml"]  # no scratch file left
    # A YAML 1.1 reader sees the same numbers and texts.
    plain = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    assert plain["optimizer"]["lr"] == 3e-4 and plain["optimizer"]["eps"] == 1e-12
    assert plain["description"] == "yes: 1e3"


def test_every_schema_default_survives_writing() -> None:
    assert Recipe.model_validate(yaml.safe_load(recipe_text(Recipe()))) == Recipe()


@pytest.mark.parametrize("name", builtin_names())
def test_every_built_in_recipe_resolves_and_says_how_to_run_it(name: str) -> None:
    found = resolve_recipe(name, verb="plan")
    assert found.description
    header = (recipes_root() / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("#") or "mlm " in header
    assert "mlm " in (recipes_root() / f"{name}.yaml").read_text(encoding="utf-8")
    assert resolve_recipe(name) == Recipe.model_validate(found.model_dump())
