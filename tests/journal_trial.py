"""The labelling journal under fire: `python tests/journal_trial.py`, in a minute; `--long` takes ten kills.

A loopback server answers, delays, rate-limits, breaks off and writes nonsense by plan (`oracle_server.py`); labellings
are killed at random moments and started again. Then the books are compared: the corpus, the journal, the labelled
articles and what the server itself has counted. An unknown call is one that was in flight at a kill: the server may
have received it or not, and may have answered it to nobody. So for each article the server's count lies between
answered + failed and answered + failed + unknown; without kills the counts are equal. `--memory` measures memory on
20,000 and on 200,000 articles, which takes some minutes.
"""
import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEY = "loopback-key-f0c1d2e3a4b5968778695a4b3c2d1e0f"
RESULTS: list[bool] = []
BEGAN = time.perf_counter()


def check(name: str, holds: bool, remark: object = "") -> None:
    "Count one check and print it."
    RESULTS.append(bool(holds))
    told = f" ({remark})" if remark != "" else ""
    print(f"{'ok' if holds else 'FAIL':4} {time.perf_counter() - BEGAN:5.1f} s  {name}{told}", flush=True)


# --- The server and the corpus


@contextlib.contextmanager
def server(**options: Any) -> Iterator[str]:
    "A server in a process of its own; its address."
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen([sys.executable, HERE/"oracle_server.py", *given], stdout=subprocess.PIPE, text=True)
    try: yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def stats(address: str) -> dict[str, Any]:
    "What the server has counted."
    with urllib.request.urlopen(f"{address}/stats", timeout=30) as answer: return json.load(answer)


def write_corpus(path: Path, articles: int) -> None:
    "Articles of which every 50th comes twice, every 40th is too short and every 200th has no text."
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(articles):
            told = " ".join(f"{draw.choice(('Nurses', 'Farmers', 'Pupils'))} of village {draw.randrange(10**6)} built "
                            f"a school and a well, and {draw.randrange(1000)} families use them." for _ in range(5))
            text = "Too short." if number % 40 == 7 else "" if number % 200 == 9 else f"article-{number:06}: {told}"
            row = {"id": f"a{number:06}", "title": f"Report {number}", "content": text}
            for copy in range(2 if number % 50 == 3 else 1):
                file.write(json.dumps(row | ({"id": f"{row['id']}-copy"} if copy else {})) + "\n")


class Place:
    "A folder with a corpus, a table of models, and runs."

    def __init__(self, folder: Path, address: str, articles: int, **row: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.corpus, self.models = folder, folder/"corpus.jsonl", folder/"models.yaml"
        write_corpus(self.corpus, articles)
        given = {"model": "trial-1", "base_url": f"{address}/v1", "key": "TRIAL_KEY", "input_price": 0.1,
                 "output_price": 0.4, "max_output_tokens": 256} | row
        self.models.write_text(json.dumps({"trial": given}), encoding="utf-8")

    def parameters(self, **given: Any) -> dict[str, Any]:
        "Parameters of `label`."
        return {"corpus": str(self.corpus), "models": str(self.models), "oracle": "trial", "budget": 1000.0,
                "out": str(self.folder/"run")} | given

    def rows(self, name: str, run: str = "run") -> list[dict[str, Any]]:
        "The rows of a file that a run has left."
        return [json.loads(line) for line in (self.folder/run/name).read_text(encoding="utf-8").splitlines()]

    def journal(self, query: str, run: str = "run") -> list[tuple]:
        "What the journal answers, whether anybody holds it or not."
        with contextlib.closing(sqlite3.connect(self.folder/run/"journal.sqlite")) as database:
            return database.execute(query).fetchall()

    def texts(self) -> dict[str, str]:
        "Hash of a text → `article-000123`."
        from leximl.data import check_article
        from leximl.oracles import article_hash
        rows = map(json.loads, self.corpus.read_text(encoding="utf-8").splitlines())
        return {article_hash(check_article(row)): row["content"].split(":")[0] for row in rows if row["content"]}


def begin(place: Place, **given: Any) -> subprocess.Popen:
    "Label in a process of its own."
    command = [sys.executable, __file__, "--label", json.dumps(place.parameters(**given))]
    log = open(place.folder/"log.txt", "a", encoding="utf-8")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TRIAL_KEY": KEY})


def label_here(place: Place, **given: Any) -> tuple[Any, str]:
    "Label in this process; what it returns or raises, and what it prints."
    from leximl.core import LeximlError
    from leximl.labelling import LabelParameters, label
    os.environ["TRIAL_KEY"] = given.pop("key", KEY)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try: found = label(LabelParameters(**place.parameters(**given)))
        except LeximlError as error: found = error
    with open(place.folder/"log.txt", "a", encoding="utf-8") as log: log.write(f"{told.getvalue()}\n{found!r}\n")
    return found, told.getvalue()


# --- The trials


def interrupted(folder: Path, articles: int, kills: int, concurrency: int, latency: float) -> None:
    "A labelling among all faults, killed again and again, once ended by SIGTERM, and its books at the end."
    draw = random.Random(1)
    with server(latency=latency, faults="some", seed=5, key=KEY) as address:
        place = Place(folder/"kills", address, articles)
        answers: dict[int, str] = {}
        lost, unknown, moments = 0, 0, [signal.SIGKILL] * kills
        moments.insert(kills // 2, signal.SIGTERM)
        for number, how in enumerate(moments):
            process = begin(place, concurrency=concurrency, timeout=3.0)
            due = stats(address)["received"] + draw.randint(concurrency, max(concurrency + 1, articles // (kills + 2)))
            while process.poll() is None and stats(address)["received"] < due: time.sleep(0.01)
            time.sleep(draw.random() * latency)
            process.send_signal(how)
            code = process.wait()
            found = dict(place.journal("SELECT number, answer FROM attempts WHERE state = 'answered'"))
            lost += sum(found.get(one) != text for one, text in answers.items())
            answers = found
            cut, = place.journal("SELECT COUNT(*) FROM attempts WHERE state = 'sent'")[0]
            if how == signal.SIGTERM: check("SIGTERM lets calls end and exits with 143", (code, cut) == (143, 0), code)
            else: check(f"stop {number + 1}, kill -9, cuts off {concurrency} calls at most",
                        code == -signal.SIGKILL and cut <= concurrency, cut)
            unknown += cut
        code = begin(place, concurrency=concurrency, timeout=3.0).wait()
        check("the last run finishes", code == 0, code)
        counted = stats(address)
        check("no more calls at once than asked for, besides those that a kill left behind",
              counted["most_at_once"] <= 2 * concurrency, counted["most_at_once"])
        compare(place, counted, unknown, lost)


def compare(place: Place, counted: dict[str, Any], unknown: int, lost: int) -> None:
    "Corpus, journal, files and the server's own count."
    from oracle_server import scores
    texts, status = place.texts(), json.loads((place.folder/"run"/"status.json").read_text())
    labels, aside = place.rows("labeled_articles.jsonl"), place.rows("quarantine.jsonl")
    rows = place.corpus.read_text().count("\n")
    check("every row is labelled or set aside", status["books"]["pending"] == 0 and len(labels) + len(aside) == rows,
          f"{len(labels):,} + {len(aside):,} of {rows:,}")
    states = Counter(dict(place.journal("SELECT state, COUNT(*) FROM attempts GROUP BY state")))
    print(f"     {dict(states)}; the server received {counted['received']}: {counted['kinds']}", flush=True)
    check("no answer that was written down is lost or changed", lost == 0, lost)
    listed = len(place.rows("unknown_calls.jsonl"))
    check("the calls cut off are listed as unknown", states["unknown"] == unknown == listed, unknown)
    by_article = {name: Counter() for name in texts.values()}
    for article, state, count in place.journal("SELECT article, state, COUNT(*) FROM attempts GROUP BY article, state"):
        by_article[texts[article]][state] = count
    received, answered = counted["received_by_article"], counted["answered_by_article"]
    sure = {name: one["answered"] + one["failed"] for name, one in by_article.items()}
    wrong = [name for name, one in by_article.items()
             if not sure[name] <= received.get(name, 0) <= sure[name] + one["unknown"]]
    arrived = counted["received"] - sum(sure.values())
    check("the server counts what the journal counts, article by article",
          not wrong and set(received) <= set(by_article),
          f"{counted['received']} = {sum(sure.values())} answered or failed + {arrived} of {unknown} unknown")
    missing = [name for name, one in by_article.items() if answered.get(name, 0) > one["answered"] + one["unknown"]]
    check("every answer of the server is in the journal, or its call is unknown", not missing,
          f"{sum(answered.values()) - states['answered']} answers met nobody any more")
    given = [(row["content"].split(":")[0], row["uplifting_analysis"]["dimensions"]) for row in labels]
    check("every label is the server's, under its own article",
          all(scores(article, list(found)) == found for article, found in given) and
          len({row["id"] for row in labels}) == len(labels))


def fast(folder: Path, articles: int, concurrency: int, latency: float, judged: bool) -> None:
    "Without faults the calls go out as fast as the latency lets them; a short run tells it and does not judge."
    with server(latency=latency) as address:
        place = Place(folder/"fast", address, articles)
        found, told = label_here(place, concurrency=concurrency)
        counted = stats(address)
    times, ideal = counted["times"], concurrency / counted["latency"]
    rate = len(times) / times[-1]
    told = (f"{rate:.1f} calls a second = {rate / ideal:.3f} of concurrency / latency; {len(times)} calls, "
            f"{concurrency} at once, latency {counted['latency']:.3f} s")
    if judged: check("throughput is at least 0.9 of concurrency / latency", rate >= 0.9 * ideal, told)
    else: print(f"     {told}", flush=True)
    calls = found.books.calls
    check("without faults the counts are equal", counted["received"] == calls["answered"] == sum(calls.values()))


def money(folder: Path) -> None:
    "The budget is never exceeded, and a larger one goes on; without one nothing is spent; a wrong key stops at once."
    with server(latency=0.02, key=KEY, faults=json.dumps({"garbage": 0.2, "error": 0.1})) as address:
        place = Place(folder/"money", address, 120)
        found, told = label_here(place, budget=0.0)
        check("without a budget nothing is spent", "give a budget" in str(found) and not stats(address)["received"])
        found, told = label_here(place, key="loopback-key-of-somebody-else")
        refused = stats(address)["kinds"]["refused"]
        check("a refused key stops at once", type(found).__name__ == "AuthenticationError" and refused <= 16, refused)
        check("and stands in no message", "somebody-else" not in f"{found!r}{told}")
        found, told = label_here(place, budget=0.01, concurrency=8)
        spent = sum(found.books.cost.values())
        check("a budget ends the run before it is exceeded", found.books.ended == "budget" and 0 < spent <= 0.01,
              f"${spent:.5f} of $0.01000")
        before = stats(address)["received"]
        found, told = label_here(place, budget=1.0, concurrency=8)
        calls = sum(found.books.calls.values())
        check("a larger one goes on and asks nothing twice", found.books.ended == "finished" and
              stats(address)["received"] + refused == calls > before + refused, calls)
        place.models.write_text(place.models.read_text().replace("trial-1", "trial-2"))
        found, told = label_here(place)
        check("another model is refused by name", 'model: "trial-1" there, "trial-2" asked for' in str(found))


def shards(folder: Path) -> None:
    "Three shards and their merge."
    from leximl.labelling import merge_shards
    with server(latency=0.01) as address:
        place = Place(folder/"shards", address, 200)
        for part in (1, 2, 3): label_here(place, shard=f"{part}/3")
        books = merge_shards(place.folder/"run")
        rows = place.corpus.read_text().count("\n")
        merged = place.rows("labeled_articles.jsonl"), place.rows("quarantine.jsonl")
        check("three shards merge into the whole corpus", books.articles == rows == sum(map(len, merged)))
        check("copies are asked once over all shards", stats(address)["received"] == books.calls["answered"])


def provider(folder: Path) -> None:
    "Batches whose acceptance got lost are taken over, not sent again."
    with server(latency=0.01, lose_batches=1, key=KEY, faults=json.dumps({"garbage": 0.1, "error": 0.05})) as address:
        place = Place(folder/"batches", address, 120)
        given = {"provider_batches": True, "batch_size": 50}
        first, told = label_here(place, **given)
        found, told = label_here(place, **given)
        counted = stats(address)
    check("a batch whose acceptance got lost stops the run", type(first).__name__ == "Unavailable", first)
    calls = found.books.calls
    check("the next run takes it over", found.books.pending == 0 and calls["unknown"] == 0, calls)
    check("no batch and no call is sent twice", counted["received"] == sum(calls.values()), counted["batches"])


def notebooks(folder: Path) -> None:
    "Run notebooks against a server that echoes keys: refused with a traceback, then answered."
    with server(latency=0.01, key=KEY) as address:
        place = Place(folder/"notebooks", address, 40)
        hosted = {"oracle": "trial", "models": str(place.models), "budget": "5.0"}
        runs = {"label, refused": (KEY[:20] + "of-somebody-else", "label", hosted | {"corpus": str(place.corpus)}, 1),
                "label": (KEY, "label", hosted | {"corpus": str(place.corpus)}, 0),
                "calibrate": (KEY, "calibrate", hosted | {"second_oracle": "trial"}, 0)}
        for title, (key, name, parameters, expected) in runs.items():
            options = [part for pair in parameters.items() for part in ("-p", *pair)]
            command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-output",
                       HERE.parent/"nbs"/f"{name}.ipynb", f"{title.replace(', ', '-')}.ipynb", *options]
            environment = os.environ | {"TRIAL_KEY": key, "JUPYTER_PREFER_ENV_PATH": "1"}
            with open(place.folder/"log.txt", "a", encoding="utf-8") as log:
                code = subprocess.run(command, cwd=place.folder, stdout=log, stderr=log, env=environment).returncode
            check(f"notebook: {title}", code == expected, code)
    refused = (place.folder/"label-refused.ipynb").read_text()
    check("the refusal and its traceback are in the notebook", "AuthenticationError" in refused and "401" in refused)


def no_key(folder: Path) -> None:
    "The key, whole or its beginning, stands in no notebook, log, journal, report or other file that a run has left."
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = Counter(path.suffix or path.name for path in files)
    holding = [path.name for path in files if KEY[:20].encode() in path.read_bytes()]
    wanted = {".ipynb", ".md", ".sqlite", ".json", ".jsonl", ".txt"}
    check("the key is in no file", not holding and wanted <= set(kinds), holding or f"{len(files)}, {dict(kinds)}")


# --- Memory


def measure(articles: int) -> None:
    "Label so many articles with an oracle that answers at once; prints the peak of memory in MiB."
    from leximl.filters import read_filter
    from leximl.labelling import Corpus, Journal, Pace, label_corpus, run_async, write_labels
    from leximl.oracles import OracleModel, Reply, prompt_hash
    filter = read_filter("uplifting")
    scores = dict.fromkeys(filter.definition.dimensions, 5)
    good = json.dumps({"dimensions": scores, "content_type": "news", "reasoning": "They built it."})
    identity = {"prompt": prompt_hash(filter), "model": "instant"}

    class Instant:
        "Answers at once."
        name, model = "instant", OracleModel(model="instant")
        async def ask(self, article: dict[str, str], messages: list[dict[str, str]]) -> Reply:
            await asyncio.sleep(0)
            return Reply(good, 100, 100)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"corpus.jsonl"
        write_corpus(path, articles)
        corpus, began = Corpus([path], filter), time.perf_counter()
        with contextlib.closing(Journal(Path(folder)/"journal.sqlite", identity)) as journal:
            journal.register(corpus)
            books = run_async(label_corpus(journal, Instant(), corpus, Pace(concurrency=32, batch_size=10_000)))
            write_labels(journal, corpus, folder, "instant")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak": peak, "labelled": books.labelled, "seconds": time.perf_counter() - began}))


def flat(sizes: tuple[int, int]) -> None:
    "Memory does not grow with the corpus."
    found = []
    for size in sizes:
        ended = subprocess.run([sys.executable, __file__, "--measure", str(size)], capture_output=True, text=True)
        found.append(json.loads(ended.stdout.splitlines()[-1]))
        print(f"     {size:,} articles: {found[-1]}", flush=True)
    growth = found[1]["peak"] - found[0]["peak"]
    check("memory is flat", growth < 30, f"{growth:+.1f} MiB from {sizes[0]:,} to {sizes[1]:,} articles")


def main() -> int:
    "Run the trials; the exit code."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="2,000 articles at concurrency 32, ten kills")
    parser.add_argument("--memory", action="store_true", help="only memory: 20,000 against 200,000 articles")
    parser.add_argument("--label", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure: return measure(options.measure) or 0
    if options.label:
        from leximl.labelling import LabelParameters, label
        return label(LabelParameters(**json.loads(options.label))) is None
    with tempfile.TemporaryDirectory(prefix="journal-") as name:
        folder = Path(name)
        trials = [lambda: flat((20_000, 200_000))] if options.memory else [
            lambda: interrupted(folder, *((2000, 10, 32, 0.2) if options.long else (240, 3, 32, 0.2))),
            lambda: fast(folder, *((2000, 32, 0.5, True) if options.long else (320, 32, 0.5, False))),
            lambda: money(folder), lambda: shards(folder), lambda: provider(folder),
            lambda: notebooks(folder), lambda: no_key(folder)]
        try:
            for trial in trials: trial()
        except BaseException:
            for log in folder.glob("*/log.txt"): print(log.read_text()[-3000:])
            raise
    print(f"{sum(RESULTS)} passed, {len(RESULTS) - sum(RESULTS)} failed")
    return 0 if all(RESULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
