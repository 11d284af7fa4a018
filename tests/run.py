"""Every check of the project, each counted: `python tests/run.py`, with `-k TEXT` those whose name holds TEXT.

The tests of the library are cells of its notebooks. Here they are run, and what holds for the project as a whole
is checked. A check is a function that fails by an exception and may return a remark.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "leximl"
NOTEBOOKS = sorted(path for path in NBS.glob("*.ipynb") if not path.name.startswith(("_", "report_")))
STAGES = [path for path in NOTEBOOKS if path.name[:2].isdigit()]
RUNS = [path for path in NOTEBOOKS if path not in STAGES and path.stem != "index"]
ALONE = ("benchmark", "train_multitask")  # run notebooks that get both cores: one compares speeds, one trains longest
SMOKE_SECONDS = 180  # a run notebook with no parameter ends within this, on two cores
NOWHERE = "http://127.0.0.1:9"  # a proxy that answers nothing: a download fails at once
OFFLINE = {name: NOWHERE for kind in ("http", "https", "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())}


class Check(NamedTuple):
    "One counted check."
    name: str
    function: Callable[[], str | None]
    alone: bool  # it gets both cores and the files for itself; of the others two run at a time, a thread each


CHECKS: list[Check] = []


def check(name: str, alone: bool = False) -> Callable:
    "Register the function below as a check."
    return lambda function: CHECKS.append(Check(name, function, alone)) or function


class Ended(NamedTuple):
    "A command that has ended."
    code: int
    text: str
    seconds: float


def execute(*command: str | Path, cwd: Path = ROOT, limit: float = 400, **environment: str) -> Ended:
    """Run a command to its end; its outputs together, without colours.

    Code 124: stopped after `limit` seconds, and a Python program says where it stood.
    """
    start, environment = time.time(), os.environ | {"PYTHONFAULTHANDLER": "1"} | environment
    with tempfile.TemporaryFile() as output:  # not a pipe, which an orphan of the command would hold open
        with subprocess.Popen(command, cwd=cwd, env=environment,
                              stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as process:
            try: code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                code = 124
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(code, re.sub(r"\x1b\[[0-9;]*m", "", text), time.time() - start)


def succeed(ended: Ended) -> Ended:
    "The command, if its exit code is 0."
    assert ended.code == 0, f"exit code {ended.code}\n{ended.text}"
    return ended


def succeeds(*command: str | Path) -> None:
    "A command whose exit code 0 is all there is to check."
    succeed(execute(*command))


def tool(name: str) -> Path:
    "A command of this environment."
    return Path(sys.executable).with_name(name)


def python(code: str) -> str:
    "What a fresh interpreter prints."
    return succeed(execute(sys.executable, "-c", code)).text


def cells(path: Path, kind: str = "") -> list[dict]:
    "The cells of a notebook, of one kind or all, each with its source as one string."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if kind in ("", cell["cell_type"])]


# --- The project


def contents() -> dict[str, str]:
    "Hash of every notebook and module."
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in [*NOTEBOOKS, *LIB.glob("*.py")]}


@check("export and clean leave no difference", alone=True)
def _() -> None:
    before = contents()
    succeed(execute(tool("nbdev_export")))
    succeed(execute(tool("nbdev_clean")))
    after = contents()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    assert not changed, f"changed, keep the result: {', '.join(changed)}"


def numbers() -> dict[str, str]:
    "The number of the notebook that each module comes from: 11, 11b, 12."
    named = {path: re.search(r"^#\|\s*default_exp\s+(\w+)", cell["source"], re.M)
             for path in STAGES for cell in cells(path, "code") if "default_exp" in cell["source"]}
    return {match[1]: path.name.split("_")[0] for path, match in named.items() if match}


def imported(path: Path) -> Iterator[str]:
    "The modules of the library that a module imports, inside functions too."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "leximl." * bool(node.level) + (node.module or "")
            names = [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else: continue
        yield from (name.split(".")[1] for name in names if name.startswith("leximl."))


@check("every module imports only lower-numbered ones")
def _() -> str:
    number, modules = numbers(), sorted(path for path in LIB.glob("*.py") if path.stem[0] != "_")
    assert modules, "no module is exported"
    strangers = [path.name for path in modules if path.stem not in number]
    assert not strangers, f"no numbered notebook exports {strangers}"
    wrong = {f"{number[path.stem]} {path.stem} imports {number.get(name, '??')} {name}"
             for path in modules for name in imported(path)
             if name[0] != "_" and not number.get(name, "x") < number[path.stem]}
    assert not wrong, "\n".join(sorted(wrong))
    return f"{len(modules)} modules"


def is_light(module: str) -> None:
    "Importing the module brings no heavy library."
    heavy = python(f"import sys, {module}; print(*{{'torch', 'transformers', 'datasets'}} & set(sys.modules))").strip()
    assert not heavy, f"brings {heavy}"


for module in ("leximl", "leximl.core", "leximl.filters"):
    check(f"import {module} is light")(partial(is_light, module))


@check("README.md is nbs/index.ipynb")
def _() -> None:
    import readme
    wanted, there = readme.render(), readme.present()
    different = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
    assert not different, f"{', '.join(different)} differ from nbs/index.ipynb: run `make readme`"


def entries(node: object) -> Iterator[str]:
    "The notebooks that a part of the sidebar names."
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for item in node: yield from entries(item)
    elif isinstance(node, dict): yield from entries(node.get("contents", node.get("href")))


@check("the site names every notebook, and only those there are")
def _() -> str:
    site = yaml.safe_load((NBS / "_quarto.yml").read_text())
    assert os.readlink(NBS / "_quarto.yml") == "../_quarto.yml"
    missing = [name for name in [*site["metadata-files"], site["format"]["html"]["css"]] if not (NBS / name).exists()]
    named = list(entries(yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]))
    reports = [name for name in named if name.startswith("report_")]
    written = (ROOT / ".github/workflows/docs.yml").read_text()
    missing += [name for name in reports if f"nbs/{name}" not in written]
    difference = set(named) - set(reports) ^ {path.name for path in NOTEBOOKS}
    assert not missing and not difference, f"missing {missing}; on one side only {sorted(difference)}"
    assert len(named) == len(set(named)), "a notebook is named twice"
    return f"{len(named)} pages"


@check("the image: what it copies is let through, and docker.md runs every run notebook")
def _() -> str:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    missing = [name for name in copied if name not in allowed or not (ROOT / name).exists()]
    assert not missing, f"copied by the Dockerfile, but not there or kept out by .dockerignore: {missing}"
    page = (ROOT / "docker.md").read_text()
    unsaid = [path.name for path in RUNS if f"/nbs/{path.name}" not in page]
    assert not unsaid, f"docker.md does not run {unsaid}"
    for line in (line for line in lines if line.startswith("RUN ")):
        succeed(execute("sh", "-n", "-c", line.removeprefix("RUN ")))
    return f"{len(copied)} files and folders, {len(RUNS)} notebooks"


for name, command in {"lint": ("ruff", "check", "--output-format=concise"), "types": ("mypy",)}.items():
    if tool(command[0]).exists(): check(name)(partial(succeeds, tool(command[0]), *command[1:]))


# --- The stage notebooks, whose cells are the tests of the library


def stage_passes(path: Path) -> None:
    "Every cell of a notebook runs, the slow ones too, and those for a GPU where there is one."
    flags = "slow cuda" if shutil.which("nvidia-smi") else "slow"
    ended = succeed(execute(tool("nbdev_test"), "--path", path, "--flags", flags, OMP_NUM_THREADS="1"))
    assert "Success." in ended.text, ended.text


for path in NOTEBOOKS:
    if path not in RUNS: check(f"cells of {path.stem}")(partial(stage_passes, path))


# --- The run notebooks, each in an empty project


def papermill(name: str, *parameters: str, project: Path | None = None, limit: float = 600) -> tuple[Path, Ended]:
    "Run a notebook by papermill with nothing to download from, in a project of its own unless one is given."
    project = project or Path(tempfile.mkdtemp(prefix=f"{name}-"))
    options = [part for pair in zip(parameters[::2], parameters[1::2], strict=True) for part in ("-p", *pair)]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", NBS / f"{name}.ipynb", "out.ipynb", *options]
    threads = {} if name in ALONE else {"OMP_NUM_THREADS": "1"}
    return project, execute(*command, cwd=project, limit=limit, JUPYTER_PREFER_ENV_PATH="1", **OFFLINE, **threads)


def form_holds(path: Path) -> str:
    "A run notebook has the form that papermill, nbdev and its reader count on."
    every, code = cells(path), cells(path, "code")
    assert len(every) <= 25, f"{len(every)} cells, more than 25"
    assert every[0]["cell_type"] == "raw" and "skip_exec: true" in every[0]["source"], "opens with no skip_exec cell"
    assert "parameters" in code[0]["metadata"].get("tags", []), "the first code cell has no tag `parameters`"
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(re.match(r"#\|\s*export", cell["source"]) for cell in code), "exports code"
    assert any(f"papermill nbs/{path.name}" in cell["source"] for cell in every), "does not say how it is launched"
    return f"{len(every)} cells"


@cache
def smoke(name: str) -> tuple[Path, Ended]:
    "The notebook's run with no parameter, in an empty project."
    return papermill(name, limit=2 * SMOKE_SECONDS)


LOCKS = {path.stem: Lock() for path in RUNS}


@contextmanager
def finished(name: str) -> Iterator[tuple[Path, Ended]]:
    "The project that the notebook's run with no parameter has left, for one check at a time, and that run."
    with LOCKS[name]:
        project, ended = smoke(name)
        yield project, succeed(ended)


def runs_by_itself(name: str) -> str:
    "A run notebook runs offline with no parameter, in time."
    with finished(name) as (_, ended): seconds = ended.seconds
    assert seconds < SMOKE_SECONDS, f"took {seconds:.0f} s, not under {SMOKE_SECONDS}"
    return f"{seconds:.0f} s"


def refused(parameters: dict[str, str], words: list[str]) -> None:
    "`train` stops before it leaves anything, with exit code 1 and a message that holds these words."
    project, ended = papermill("train", *(part for pair in parameters.items() for part in pair))
    assert ended.code == 1, f"exit code {ended.code}, not 1\n{ended.text}"
    absent = [word for word in words if word not in ended.text]
    assert not absent, f"the message does not say {absent}:\n{ended.text}"
    assert [path.name for path in project.iterdir()] == ["out.ipynb"], "left more than the executed notebook"


for path in RUNS: check(f"form of {path.stem}")(partial(form_holds, path))

for path in RUNS:
    if path.stem not in ALONE: check(f"run of {path.stem}")(partial(runs_by_itself, path.stem))


@check("the same train again, with `restart false`, trains nothing")
def _() -> str:
    with finished("train") as (project, first):
        histories = {path: path.stat().st_mtime_ns for path in project.glob("runs/**/history.jsonl")}
        assert histories, "the first run left no history.jsonl under runs/"
        again = succeed(papermill("train", "restart", "false", project=project)[1])
        assert histories == {path: path.stat().st_mtime_ns for path in project.glob("runs/**/history.jsonl")}
    return f"{again.seconds:.0f} s after {first.seconds:.0f} s"


# --- Trials, and one notebook after another


def under_fire(trial: str, **environment: str) -> str:
    "A trial of its own, with kills: its last line counts its checks."
    program, environment = ROOT / "tests" / f"{trial}_trial.py", environment | OFFLINE | {"OMP_NUM_THREADS": "1"}
    return succeed(execute(sys.executable, program, **environment)).text.splitlines()[-1]


check("the journal under fire")(partial(under_fire, "journal", no_proxy="127.0.0.1"))
check("the search under fire")(partial(under_fire, "search"))


@check("evaluate judges what train left")
def _() -> None:
    with finished("train") as (project, _):
        succeed(papermill("evaluate", "folder", "filters/uplifting/v1", project=project)[1])


@check("calibrate, label, train and evaluate, one after the other")
def _() -> str:
    with finished("calibrate") as (project, first):
        seconds = first.seconds + succeed(papermill("label", project=project)[1]).seconds
        labels, = project.glob("runs/label-*/labeled_articles.jsonl")
        seconds += succeed(papermill("train", "data", str(labels), project=project)[1]).seconds
        seconds += succeed(papermill("evaluate", "folder", "filters/uplifting/v1", project=project)[1]).seconds
    assert seconds < 360, f"took {seconds:.0f} s, not under 360"
    return f"{seconds:.0f} s"


# --- Short ones at the end, so that neither of the two waits long for the other; then those that run alone


for title, parameters, words in [
    ("misspelt parameter", {"filtre": "uplifting"}, ["ParameterError", "filtre", "filter"]),
    ("wrong type", {"epochs": "many"}, ["ParameterError", "epochs", "many"]),
    ("wrong truth value", {"restart": "perhaps"}, ["ParameterError", "restart", "perhaps"]),
    ("unknown filter", {"filter": "upliftin"}, ["upliftin", "sustainability_tech_deployment", "uplifting"]),
    ("secret", {"api_key": "x"}, ["ParameterError", "api_key", "environment"]),
]: check(f"train refuses: {title}")(partial(refused, parameters, words))

for name in ALONE: check(f"run of {name}", alone=True)(partial(runs_by_itself, name))


# --- Counting


def passes(check: Check) -> bool:
    "Run one check and print how it went, with the end of its output if it failed."
    start, passed, remark, output = time.time(), True, None, ""
    try: remark = check.function()
    except AssertionError as error: passed, output = False, str(error)
    except Exception: passed, output = False, traceback.format_exc()
    line = f"{'ok' if passed else 'FAIL':4} {time.time() - start:6.1f} s  {check.name}"
    print("\n      ".join([line + (f" ({remark})" if remark else ""), *output.splitlines()[-60:]]), flush=True)
    return passed


def main() -> int:
    "Run the checks that were asked for; the exit code."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only the checks whose name holds TEXT")
    parser.add_argument("-l", action="store_true", help="list their names and run nothing")
    options = parser.parse_args()
    chosen = [check for check in CHECKS if options.k in check.name]
    if options.l: print(*(check.name for check in chosen), sep="\n")
    if options.l: return 0
    results: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="leximl-") as tempfile.tempdir:
        for alone, group in groupby(chosen, key=lambda check: check.alone):
            with ThreadPoolExecutor(1 if alone else 2) as pool: results += pool.map(passes, group)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
