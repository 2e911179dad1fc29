"""What TensorBoard shows of a folder of events, as JSON: ``python scalars.py FOLDER``."""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: str) -> dict[str, list]:
    """``{name: [[step, value], ...]}``, in TensorBoard's own order."""
    found = EventAccumulator(folder, size_guidance={"scalars": 0})  # 0: all of them
    found.Reload()
    return {
        name: [[event.step, event.value] for event in found.Scalars(name)]
        for name in sorted(found.Tags()["scalars"])
    }


if __name__ == "__main__":
    print(json.dumps(scalars(sys.argv[1])))
