"""Multiple-choice tasks in files of BIG-bench's JSON format, as tasks of lm_eval.

Of such a file is read: "examples", each with "input" and "target_scores" {choice: score}; where given, "task_prefix",
"example_input_prefix" and "example_output_prefix" too. The answer is the choice of highest score.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INPUT_PREFIX, OUTPUT_PREFIX = "\nQ: ", "\nA: "
"""What BIG-bench puts before a question and before its answer where a task does not say."""


class TaskFileError(ValueError):
    """A file holds no multiple-choice task."""


def write_tasks(files: Sequence[Path], folder: Path) -> list[str]:
    """Writes each task's questions and its description for lm_eval into `folder`; returns the tasks' names.

    Raises:
        TaskFileError: a file cannot be read, holds no question, or another file of the same name was given.
    """
    names: list[str] = []
    for file in files:
        task = _read(file)
        name = str(task.get("name") or file.stem)
        if name in names:
            raise TaskFileError(f"{file} holds a task named {name!r}, as a file before it does; give one of them")
        lines = [json.dumps(question) for question in questions(task)]
        if not lines:
            raise TaskFileError(f"{file} holds no question with target_scores; give a multiple-choice task")
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(_description(name, folder / f"{name}.jsonl"), encoding="utf-8")
        names.append(name)
    return names


def questions(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions of a task that have one best answer: "query", "choices" and the index "gold"."""
    before, after = (
        str(task.get(key, default))
        for key, default in (("example_input_prefix", INPUT_PREFIX), ("example_output_prefix", OUTPUT_PREFIX))
    )
    found = []
    for example in task.get("examples", ()):
        scores: Mapping[str, float] = example.get("target_scores") or {}
        best = [index for index, score in enumerate(scores.values()) if score == max(scores.values())]
        if len(scores) > 1 and len(best) == 1:
            query = f"{task.get('task_prefix', '')}{before}{example['input']}{after.rstrip(' ')}"
            found.append({"query": query, "choices": list(scores), "gold": best[0]})
    return found


def _read(file: Path) -> Mapping[str, Any]:
    try:
        task = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskFileError(f"cannot read the task {file}: {error}; give a JSON file of BIG-bench's format") from error
    if not isinstance(task, dict):
        raise TaskFileError(f"{file} holds a {type(task).__name__}; give a JSON file of BIG-bench's format")
    return task


def _description(name: str, data: Path) -> str:
    """A task of lm_eval. JSON is YAML."""
    metric = {"aggregation": "mean", "higher_is_better": True}
    return json.dumps(
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **metric}, {"metric": "acc_norm", **metric}],
        }
    )
