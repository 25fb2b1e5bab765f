"""List the tasks by the names that users write."""

from __future__ import annotations

from lightning_probes.tasks.classification import Classification
from lightning_probes.tasks.multilabel import Multilabel
from lightning_probes.tasks.regression import Regression
from lightning_probes.tasks.task import Question, Task, Words

_TASKS: dict[str, type[Task]] = {task.kind: task for task in (Classification, Multilabel, Regression)}


def new_task(kind: str) -> Task:
    """Return a task of a kind whose number of outputs is unknown."""
    return _TASKS[kind]()


def words_of(kind: str) -> Words:
    """Return what the numbers of a task are called."""
    return _TASKS[kind].words


def metrics_of(kind: str) -> dict[str, str]:
    """Return ``{metric: what it is}`` of a task, ``error`` first.

    ``lag`` is how much higher the error of the probe is that is only trained along with the network.
    """
    return {"error": words_of(kind).error, **words_of(kind).metrics, "lag": "lag"}


def kinds_of(question: Question) -> dict[str, str]:
    """Return the kind of each task, by the names of their targets."""
    return {name: task.kind for name, task in question.parts.items()}
