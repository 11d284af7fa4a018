"""A loopback server that speaks OpenAI's chat format and misbehaves by plan: `python tests/oracle_server.py`.

It prints its address, answers until it is ended, and counts. What a request meets is drawn from the seed, the
article's number in the request and how often that article was asked before: the order of requests changes nothing. An
article's number stands in its text as `article-000123`, and its scores follow from it, so that a label can be checked.
`/stats` tells what was received and answered; `/v1/files` and `/v1/batches` are a provider's batches in small.
"""
import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes | None]  # Status, headers, body; no body: the line is cut
FAULTS = ("limit", "error", "drop", "cut", "garbage", "dimensions", "range", "empty", "stall")
DEFAULT_FAULTS = {"limit": 0.03, "error": 0.03, "drop": 0.02, "cut": 0.02, "garbage": 0.03, "dimensions": 0.03,
                  "range": 0.03, "empty": 0.01, "stall": 0.01}


def scores(article: str, names: list[str]) -> dict[str, int]:
    "The scores that an article gets, whoever asks."
    draw = random.Random(f"scores {article}")
    return {name: draw.randrange(11) for name in names}


def article_in(body: dict) -> str:
    "The article that a request asks about."
    found = re.search(r"article-\d+", " ".join(message["content"] for message in body["messages"]))
    return found[0] if found else ""


class Server:
    "Requests in, answers out, and a record of both."

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.faults = options, DEFAULT_FAULTS if options.faults == "some" else json.loads(options.faults)
        self.received, self.answered, self.kinds = Counter(), Counter(), Counter()
        self.at_once = self.most_at_once = 0
        self.latency, self.first, self.times = 0.0, 0.0, list[float]()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}

    def plan(self, article: str) -> str:
        "What becomes of this request: an answer, or one of the faults."
        draw = random.Random(f"{self.options.seed} {article} {self.received[article]}").random()
        for kind in FAULTS:
            draw -= self.faults.get(kind, 0.0)
            if draw < 0: return kind
        return "answer"

    def stats(self) -> dict:
        "What `/stats` tells."
        answers = sum(self.answered.values())
        return {"received": sum(self.received.values()), "answered": answers, "most_at_once": self.most_at_once,
                "latency": self.latency / max(1, answers), "times": self.times, "kinds": self.kinds,
                "received_by_article": self.received, "answered_by_article": self.answered,
                "batches": len(self.batches)}

    def chat(self, body: dict, kind: str) -> dict:
        "A completion, sound or not."
        text = " ".join(message["content"] for message in body["messages"])
        article = article_in(body)
        names = re.findall(r'"(\w+)":', re.findall(r'"dimensions": \{([^}]*)\}', text)[0])
        given = scores(article, names)
        if kind == "dimensions": given.pop(names[0])
        if kind == "range": given[names[0]] = 11
        answer = json.dumps({"dimensions": given, "content_type": "news", "reasoning": f"{article} says so."})
        content = {"garbage": f"Certainly! {answer[:60]}", "empty": ""}.get(kind, answer)
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": len(content) // 4 + 1}
        usage["total_tokens"] = sum(usage.values())
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        number = f"chat-{sum(self.received.values())}"
        return {"id": number, "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
                "usage": usage}

    async def complete(self, body: dict) -> Answer:
        "What answers a chat request."
        article = article_in(body)
        kind = self.plan(article)
        self.received[article] += 1
        self.kinds[kind] += 1
        if kind == "limit": return 429, {"Retry-After": str(self.options.retry_after)}, _error("too many requests")
        if kind == "drop": return 0, {}, None
        began, wait = time.perf_counter(), self.options.latency
        await asyncio.sleep(self.options.stall if kind == "stall" else wait)
        if kind == "error": return 503, {}, _error("overloaded")
        data = json.dumps(self.chat(body, kind)).encode()
        if kind == "cut": return 200, {"Content-Length": str(len(data) + 100)}, data
        self.answered[article] += kind not in ("stall", "empty")
        self.latency += time.perf_counter() - began
        self.first = self.first or began
        self.times.append(time.perf_counter() - self.first)
        return 200, {}, data

    def batch(self, path: str, method: str, headers: dict[str, str], data: bytes) -> Answer:
        "Files and batches: kept in memory, done at once, counted."
        if path == "/v1/files":
            edge = re.search(r"boundary=\"?([^\";]+)", headers["content-type"])[1].encode()
            part = next(one for one in data.split(b"--" + edge) if b'name="file"' in one)
            name = f"file-{len(self.files) + 1}"
            self.files[name] = part.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n", 1)[0]
            return 200, {}, _json({"id": name, "object": "file", "bytes": len(data), "created_at": 0, "filename": name,
                                   "purpose": "batch", "status": "processed"})
        if path.startswith("/v1/files/"): return 200, {}, self.files[path.split("/")[3]]
        if path == "/v1/batches" and method == "GET":
            return 200, {}, _json({"object": "list", "data": list(self.batches.values()), "has_more": False})
        if path == "/v1/batches": return self._begin_batch(json.loads(data))
        return 200, {}, _json(self.batches[path.split("/")[3]])

    def _begin_batch(self, asked: dict) -> Answer:
        "Take a batch and answer it at once."
        name, lines = f"batch-{len(self.batches) + 1}", []
        for line in map(json.loads, self.files[asked["input_file_id"]].splitlines()):
            article = article_in(line["body"])
            kind = self.plan(article)
            self.received[article] += 1
            kind = kind if kind in ("garbage", "dimensions", "range", "error") else "answer"
            self.kinds[kind] += 1
            body = self.chat(line["body"], kind)
            self.answered[article] += kind != "error"
            response = {"status_code": 503 if kind == "error" else 200, "request_id": body["id"], "body": body}
            lines.append(json.dumps({"id": body["id"], "custom_id": line["custom_id"], "response": response,
                                     "error": None}))
        self.files[f"{name}-out"] = "\n".join(lines).encode()
        self.batches[name] = {"id": name, "object": "batch", "endpoint": asked["endpoint"], "created_at": 0,
                              "completion_window": "24h", "input_file_id": asked["input_file_id"],
                              "status": "completed", "output_file_id": f"{name}-out",
                              "metadata": asked.get("metadata")}
        if self.options.lose_batches and len(self.batches) <= self.options.lose_batches: return 0, {}, None
        return 200, {}, _json(self.batches[name])

    async def handle(self, method: str, address: str, headers: dict[str, str], data: bytes) -> Answer:
        "One request."
        path = urlsplit(address).path
        if path == "/stats": return 200, {}, _json(self.stats())
        if self.options.key and headers.get("authorization") != f"Bearer {self.options.key}":
            self.kinds["refused"] += 1
            return 401, {}, _error(f"wrong key {headers.get('authorization', '')[7:]}")
        if path.startswith(("/v1/files", "/v1/batches")): return self.batch(path, method, headers, data)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try: return await self.complete(json.loads(data))
        finally: self.at_once -= 1

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        "Requests of one connection, one after the other."
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                first, *rest = head.strip().split("\r\n")
                headers = {name.strip().lower(): value.strip() for name, value in (line.split(":", 1) for line in rest)}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                method, address, _ = first.split(" ", 2)
                status, extra, answer = await self.handle(method, address, headers, data)
                if answer is None: break
                given = {"Content-Type": "application/json", "Content-Length": str(len(answer))} | extra
                lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
                writer.write(f"HTTP/1.1 {status} .\r\n{lines}\r\n".encode() + answer)
                await writer.drain()
                if int(given["Content-Length"]) != len(answer): break
        except (asyncio.IncompleteReadError, ConnectionError): pass
        finally: writer.close()


def _json(value: dict) -> bytes: return json.dumps(value).encode()


def _error(message: str) -> bytes: return _json({"error": {"message": message, "type": "loopback"}})


async def serve(options: argparse.Namespace) -> None:
    "Listen, print the address, answer until ended."
    server = await asyncio.start_server(Server(options).connection, "127.0.0.1", options.port, limit=1 << 24,
                                        backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    "Read the options and serve."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds until an answer")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds that a stalled request takes")
    parser.add_argument("--retry-after", type=float, default=0.5, help="seconds that a 429 asks to wait")
    parser.add_argument("--faults", default="{}", help="JSON of kind → share; `some` takes a few of each")
    parser.add_argument("--key", default="", help="refuse requests with another key")
    parser.add_argument("--lose-batches", type=int, default=0, help="cut the line at so many first batches")
    try: asyncio.run(serve(parser.parse_args()))
    except KeyboardInterrupt: pass


if __name__ == "__main__":
    main()
