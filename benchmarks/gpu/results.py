"""The result file and the output folder of benchmarks/gpu/run.py."""

import json
import os
from pathlib import Path
from threading import Lock

from goals import rows
from tasks import slug

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Results:
    """The file benchmarks/results/<gpu>-<date>.json, and a folder next to it with the output of each task.

    The file is rewritten after each task, so it contains all outcomes so far, however the run ends.
    Several runs on the same day share one file: a task's newest outcome replaces the older one, unless the
    task was skipped this time.

    Parameters
    ----------
    facts : dict
        The machine and the date; those of the newest run are kept.
    names : list of str
        The names of all tasks, in the order in which they are shown.
    folder : Path

    Attributes
    ----------
    path, outputs : Path
        The file and the folder.
    """

    def __init__(self, facts, names, folder=RESULTS):
        name = f"{slug(facts['gpu'])}-{facts['date']}"
        self.facts, self.path, self.outputs = facts, folder / f"{name}.json", folder / name
        self.outputs.mkdir(parents=True, exist_ok=True)
        self._names, self._lock = names, Lock()
        earlier = json.loads(self.path.read_text())["steps"] if self.path.exists() else []
        self._found = {one["name"]: one for one in earlier}

    def add(self, outcome):
        """Add a task's outcome to the file; any thread may call this."""
        name = outcome["name"]
        with self._lock:
            if outcome["status"] != "skipped" or self._found.get(name, outcome)["status"] == "skipped":
                self._found[name] = outcome
            self.write()

    def write(self):
        """Write the file atomically."""
        partial = self.path.with_suffix(".part")
        outcomes = self.outcomes()
        found = self.facts | {"steps": outcomes, "goals": rows(self.facts["gpu"], outcomes)}
        partial.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial, self.path)

    def outcomes(self):
        """Return the outcomes of all runs of the day, in the order in which they are shown."""
        order = {name: i for i, name in enumerate(self._names)}
        return sorted(self._found.values(), key=lambda one: order.get(one["name"], len(order)))
