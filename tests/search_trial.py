"""A search under fire: two processes on one study, one of them killed with signal 9, and the same command again.

`python tests/search_trial.py` searches a toy that trains in a moment; `--recipe adapter` a real recipe, which takes as
long as that does; `--long` sends the toy's search a SIGTERM and kills its watching process as well.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOY = '''
import numpy as np
from pydantic import Field
from transformers import BertConfig, BertModel
from leximl.core import Parameters, RunFolder, read_jsonl, seed_everything
from leximl.tasks import Task, build_model
from leximl.trainer import Trainer, TrainerConfig

SEARCHED_BY, PREPARED_FROM = ("val_mae", "minimize"), set()

class ToyParameters(Parameters):
    "Parameters of a tiny transformer that counts sevens."
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1, le=64)
    hidden: int = Field(16, ge=8)
    epochs: int = 4
    out: str = ""

class Trained:
    "A finished toy."
    def __init__(self, run): self.history = [row for _, row in read_jsonl(run.path/"history.jsonl")]

def examples(number, seed):
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, 12, draw.integers(4, 12)).tolist() for _ in range(number)]
    return [{"input_ids": ids, "labels": [2.0 * ids.count(7)]} for ids in rows]

def prepare(parameters: ToyParameters): return {"train": examples(96, 1), "val": examples(32, 2)}

def train(parameters, prepared):
    seed_everything(0)
    size, rate = parameters.hidden, parameters.learning_rate
    shape = BertConfig(vocab_size=12, hidden_size=size, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=size)
    model = build_model([Task("sevens", "regression", ("sevens",))], BertModel(shape, add_pooling_layer=False))
    config = TrainerConfig(epochs=parameters.epochs, learning_rate=rate, head_learning_rate=rate, device="cpu",
                           batch_size=parameters.batch_size, patience=9)
    with RunFolder(parameters.out, parameters.model_dump(exclude={"out", "config"})).start() as run:
        if run.state != "finished":
            Trainer(model, prepared["train"], prepared["val"], config, run).fit()
            run.update_status("finished")
    return Trained(run)
'''
SPACE = """
learning_rate: {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
batch_size: {type: categorical, choices: [8, 16, 32]}
hidden: {type: int, low: 8, high: 32, step: 8}
"""
RUN = """
import json, sys
from leximl.search import SearchParameters, search
for given in json.loads(sys.argv[1]): search(SearchParameters(**given))
"""
RESULTS: list[bool] = []


def check(title: str, passed: bool, remark: object = "") -> None:
    "Count and print one check."
    RESULTS.append(bool(passed))
    print(f"{'ok' if passed else 'FAIL':4} {title}{f' ({remark})' if remark != '' else ''}", flush=True)


class Place:
    "A folder, and the search in it."

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.run = folder, folder/"search"
        self.study: Any = None
        self.given: dict[str, Any] = {"recipe": recipe}
        if recipe == "search_toy":
            (folder/"search_toy.py").write_text(TOY)
            (folder/"toy.yaml").write_text(SPACE)
            self.given["space"] = str(folder/"toy.yaml")

    def start(self, *searches: dict[str, Any]) -> subprocess.Popen:
        "Begin searches one after the other, or go on with them, in a process of their own."
        given = [self.given | {"jobs": 2, "out": str(self.run)} | one for one in searches]
        path = os.pathsep.join([str(self.folder), *(one for one in sys.path if one)])
        with open(self.folder/"log.txt", "a", encoding="utf-8") as log:
            return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(given)], stdout=log, stderr=log,
                                    cwd=self.folder, env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path})

    def trials(self) -> list[Any]:
        "All trials as the database knows them."
        import optuna
        if not (self.run/"search.json").exists(): return [] # its processes have not been started
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = self.study or optuna.load_study(study_name=None, storage=f"sqlite:///{self.run/'study.db'}")
        return self.study.get_trials(deepcopy=False)

    def rows(self, out: str = "search") -> list[dict[str, Any]]:
        "What `trials.jsonl` says."
        return [json.loads(line) for line in (self.folder/out/"trials.jsonl").read_text().splitlines()]

    def wait_for(self, wanted: Callable[[list[Any]], Any], running: subprocess.Popen) -> Any:
        "Wait until the trials fulfil a condition; its value."
        while running.poll() is None:
            found = wanted(self.trials())
            if found: return found
            time.sleep(0.05)
        raise RuntimeError("the search ended before that")


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "Those of some trials that ended well."
    return [row for row in rows if row["state"] in ("complete", "pruned")]


def in_the_middle(trials: list[Any], after: int) -> Any:
    "A trial that has a checkpoint and is still running, once so many trials are finished."
    done = sum(one.state.name in ("COMPLETE", "PRUNED") for one in trials)
    running = [one for one in trials if one.state.name == "RUNNING" and len(one.intermediate_values) > 1]
    return running[0] if done >= after and running else None


def killed(place: Place) -> None:
    "Thirty trials by two processes, one of which is killed in the middle of a trial."
    search = place.start({"trials": 30})
    victim = place.wait_for(lambda trials: in_the_middle(trials, 8), search)
    os.kill(int(victim.user_attrs["worker"].rpartition("-")[2]), signal.SIGKILL)
    code = search.wait()
    rows = place.rows()
    check("a search of which one process is killed ends well", code == 0, f"exit code {code}")
    check("30 trials are finished, none more", len(finished(rows)) == 30, len(finished(rows)))
    row = rows[victim.number]
    check("the killed trial is marked", row["state"] == "fail" and "died" in row["error"], row["error"])
    again = [one for one in rows if one["retry_of"] == victim.number]
    check("it was tried again, once, with the same values, and finished", len(again) == 1 and finished(again) != [] and
          again[0]["parameters"] == row["parameters"], [victim.number, *(one["number"] for one in again)])
    logs = [path.read_text() for path in place.run.glob("trials/*/log.txt")]
    check("it went on from its checkpoint", sum("going on at epoch" in text for text in logs) >= 1)
    check("its loss was said", f"process {victim.user_attrs['worker'].partition(':')[2].split('-')[0]} ended with code "
          "-9" in (place.folder/"log.txt").read_text())


def hit(place: Place, trials: int) -> None:
    "A SIGTERM, and the watching process killed."
    search = place.start({"trials": trials})
    place.wait_for(lambda trials: in_the_middle(trials, 32), search)
    search.terminate()
    code = search.wait()
    status = json.loads((place.run/"status.json").read_text())
    check("a SIGTERM ends the search with 143, and its status says so", code == 143 and status["state"] == "stopped",
          f"{code}, {status}")
    stopped = [row for row in place.rows() if row["error"] == "stopped by SIGTERM"]
    running = [row for row in place.rows() if row["state"] == "running"]
    check("the trials in hand are marked as stopped", len(stopped) <= 2 and not running, len(stopped))
    search = place.start({"trials": trials})
    place.wait_for(lambda trials: in_the_middle(trials, 35), search)
    search.kill()
    search.wait()
    until = time.time() + 60
    while any(is_alive(path) for path in (place.run/"workers").glob("*-*")) and time.time() < until: time.sleep(0.2)
    check("the processes of a killed search end by themselves", time.time() < until)


def is_alive(path: Path) -> bool:
    "Whether the process that signed in still runs."
    try: os.kill(int(path.name.split("-")[1]), 0)
    except ProcessLookupError: return False
    return True


def completed(place: Place, trials: int) -> None:
    "The same command with more trials goes on, and nothing is lost or repeated."
    code = place.start({"trials": trials}).wait()
    rows = place.rows()
    done = finished(rows)
    check(f"the same command again goes on to {trials}", code == 0 and len(done) == trials, f"{code}, {len(done)}")
    proposed = {row["number"]: [row] for row in rows if row["retry_of"] is None}
    for row in rows:
        if row["retry_of"] is not None: proposed[row["retry_of"]].append(row)
    lost = [number for number, tried in proposed.items() if not finished(tried)]
    check("no trial is lost", not lost and [row["number"] for row in rows] == list(range(len(rows))), lost or "")
    values = {json.dumps(row["parameters"], sort_keys=True) for row in done}
    check("none is repeated", len(values) == trials == len(proposed), f"{len(values)} different ones")
    epochs = [[json.loads(line)["epoch"] for line in path.read_text().splitlines()]
              for path in place.run.glob("trials/*/run/history.jsonl")]
    check("each has its whole history", len(epochs) == trials and
          all(one == sorted(set(one)) and one[0] == 1 for one in epochs), sum(map(len, epochs)))
    sign = -1 if "(minimized)" in (report := (place.run/"report.md").read_text()) else 1
    best, default = (float(re.search(rf"{name} (-?[\d.]+)", report)[1]) for name in ("best", "default"))
    check("the best is at least as good as the default", sign * best >= sign * default, f"{best} and {default}")
    kept = len(list(place.run.glob("trials/*/run/checkpoints")))
    check("the weights of the best three are kept", kept <= 3, kept)


def proposals(place: Place) -> None:
    "The first ten proposals are the same in one process; another seed makes others."
    def ten(out: str) -> list[str]:
        rows = [row for row in place.rows(out) if row["retry_of"] is None][:10]
        return [json.dumps(row["parameters"], sort_keys=True) for row in rows]
    alone = {"jobs": 1, "trials": 10, "out": str(place.folder/"alone")}
    seeded = {"jobs": 1, "trials": 3, "out": str(place.folder/"seeded"), "seed": 1}
    code = place.start(alone, seeded).wait()
    check("one process proposes the same first ten as two", code == 0 and ten("alone") == ten("search"))
    check("another seed makes others, behind the same default", ten("seeded")[0] == ten("search")[0] and
          len(ten("seeded")) == 3 and not set(ten("seeded")[1:]) & set(ten("search")))


def main() -> int:
    "Run the trials; the exit code."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="search_toy", help="a recipe that the search knows, such as adapter")
    parser.add_argument("--long", action="store_true", help="a SIGTERM and the death of the watching process as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        place, began = Place(Path(name), options.recipe), time.time()
        try:
            killed(place)
            if options.long: hit(place, 40)
            completed(place, 40)
            proposals(place)
        except BaseException:
            print((place.folder/"log.txt").read_text()[-3000:])
            for log in place.run.glob("workers/*.log"): print(log.read_text()[-2000:])
            raise
    print(f"{time.time() - began:.0f} s")
    print(f"{sum(RESULTS)} passed, {len(RESULTS) - sum(RESULTS)} failed")
    return 0 if all(RESULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
