"""What a run learns to do: one file a task, and the registry of all of them.

A task owns the fields that it alone reads: its section of the config.
"""

from rmlora_jax.config import sections
from rmlora_jax.tasks import images, sft, speech, text
from rmlora_jax.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (images.TASK, text.CLASSIFICATION, text.REGRESSION, speech.TASK, sft.TASK)
}
SECTIONS = sections(TASKS.values())
