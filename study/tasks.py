"""What is trained: nothing that needs a download, each run seconds on one core."""

from __future__ import annotations

from dataclasses import replace

from .language_tasks import LANGUAGE_TASKS
from .small_tasks import SMALL_TASKS

MAIN_TASKS = (*SMALL_TASKS, *LANGUAGE_TASKS)
_ALL = {task.name: task for task in MAIN_TASKS}
# Whether a rule falls too soon shows in runs ten times as long.
LONG_TASKS = tuple(
    replace(_ALL[name], name=f"{name}-long", label=f"{_ALL[name].label}, long", steps=10 * _ALL[name].steps)
    for name in ("gpt-text", "words")
)
# Large enough that a sample of their elements is one, once the threshold is lowered.
SAMPLED_TASKS = tuple(_ALL[name] for name in ("mlp-digits", "conv-digits", "gpt-text", "gpt-experts", "words"))
TASKS = {task.name: task for task in (*MAIN_TASKS, *LONG_TASKS)}
