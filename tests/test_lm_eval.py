"""lm_eval's wrapper of Hugging Face models evaluates a compiled model as it is, on local tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import larosa_compile
from benchmarks import zeroshot
from benchmarks.local_tasks import TaskFileError, questions, write_tasks
from benchmarks.zeroshot import Evaluation
from larosa_compile import registry
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids
from tests.support.saved import WORDS, save_tiny_tokenizer

QUESTIONS = 12


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def recipe(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32)], 0.5)


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """One local task of `QUESTIONS` questions of several lengths, with two answers each."""
    save_tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = "</s>"  # lm_eval asks for one
    examples = [
        {
            "input": " ".join(WORDS[3 + index : 8 + 2 * index]),
            "target_scores": {WORDS[20 + index]: 1.0, f"{WORDS[40 + index]} {WORDS[60]}": 0.0},
        }
        for index in range(QUESTIONS)
    ]
    task = tmp_path / "made.json"
    task.write_text(json.dumps({"name": "made", "examples": examples}))
    return Evaluation(tokenizer, write_tasks([task], tmp_path), tmp_path, batch_size=4)


def test_the_wrapper_runs_a_compiled_model(model: PreTrainedModel, recipe: Recipe, evaluation: Evaluation) -> None:
    dense = evaluation.scores(model)
    assert {metric: len(scores) for metric, scores in dense["made"].items()} == {
        "acc": QUESTIONS,
        "acc_norm": QUESTIONS,
    }
    for sparsity in (0.0, 0.5):
        compiled = tiny_model("llama", num_hidden_layers=1)
        torch._dynamo.reset()
        compiled.compile(backend="larosa", options={"recipe": recipe.with_sparsity(sparsity), "lowering": "eager"})
        found = evaluation.scores(compiled)
        reports = registry.reports_of(compiled.parameters())
        assert reports and all(report.sites for report in reports)
        if not sparsity:
            assert found == dense


def test_records_are_of_paired_questions(model: PreTrainedModel, recipe: Recipe) -> None:
    answers: Any = [{"made": {"acc": [1.0, 0.0, 1.0, 1.0]}}, {"made": {"acc": [1.0, 1.0, 0.0, 0.0]}}]
    compiled = []

    class Answers:
        def scores(self, model: PreTrainedModel) -> Any:
            compiled.append(model._compiled_call_impl is not None)
            return answers[len(compiled) - 1]

    runs = zeroshot.planned([("made", recipe)], [0.4], ["all"])
    dense, _, sparse, overall = zeroshot.measured(model, runs, Answers())  # type: ignore[arg-type]
    assert compiled == [False, True] and model._compiled_call_impl is None
    assert (dense["accuracy"], sparse["accuracy"], sparse["over_dense"]) == (0.75, 0.5, -0.25)
    # differences 0, 1, −1, −1: variance 11/12, of a mean of four
    assert sparse["over_dense_error"] == pytest.approx((11 / 12 / 4) ** 0.5)
    assert 0 < sparse["bytes_skipped_share"] < 1
    assert (dense["recipe"], sparse["recipe"], sparse["method"], sparse["sparsity"]) == (None, "made", "larosa", 0.4)
    assert (dense["calibration"], sparse["calibration"]) == (None, recipe.calibration["tokens"])
    assert overall["task"] == zeroshot.ALL and overall["questions"] == 4


def test_the_table_has_a_column_for_every_run() -> None:
    """Recipes of one name and sparsity, from two folders, once had one column for two cells."""
    dense = {"recipe": None, "sparsity": 0.0, "protocol": "all", "accuracy": 0.5, "questions": 4, "model": "tiny"}
    sparse = dense | {"recipe": "made", "sparsity": 0.4, "over_dense": 0.0, "over_dense_error": 0.0}
    runs = [dense, sparse, sparse, sparse | {"protocol": "first-dense"}]
    made = zeroshot.table([run | {"task": "made", "metric": "acc"} for run in runs])
    names = [column.header for column in made.columns]
    assert names[3:] == ["dense", "made 40 %", "made 40 %", "made 40 %, first-dense"]
    assert made.row_count == 1


def test_recipes_run_at_their_own_sparsity_unless_others_are_asked_for(recipe: Recipe) -> None:
    recipes = [("first", recipe), ("second", recipe.with_sparsity(0.25))]
    own = zeroshot.planned(recipes, [], ["all", "first-dense"])
    assert [(run.name, run.recipe.sparsity, run.protocol) for run in own] == [
        ("first", 0.5, "all"),
        ("first", 0.5, "first-dense"),
        ("second", 0.25, "all"),
        ("second", 0.25, "first-dense"),
    ]
    asked = zeroshot.planned(recipes, [0.4, 0.3], ["all"])
    assert [(run.name, run.recipe.sparsity) for run in asked] == [
        ("first", 0.4),
        ("first", 0.3),
        ("second", 0.4),
        ("second", 0.3),
    ]


def test_questions_of_bigbench_files() -> None:
    task = {
        "task_prefix": "Choose.",
        "example_output_prefix": " -> ",
        "examples": [
            {"input": "a", "target_scores": {"x": 0, "y": 1}},
            {"input": "two best ones", "target_scores": {"x": 1, "y": 1}},
            {"input": "free text", "target": "x"},
        ],
    }
    assert questions(task) == [{"query": "Choose.\nQ: a ->", "choices": ["x", "y"], "gold": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read the task"), ("[]", "holds a list"), ('{"examples": []}', "holds no question")],
)
def test_what_is_no_task_is_said(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text(text)
    with pytest.raises(TaskFileError, match=message):
        write_tasks([file], tmp_path)


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    task = {"name": "same", "examples": [{"input": "a", "target_scores": {"x": 0, "y": 1}}]}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(task))
    with pytest.raises(TaskFileError, match="'same'"):
        write_tasks(files, tmp_path)
