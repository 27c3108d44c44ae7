"""The judge's wall clock against an event simulation, and its own CPU time per question.

    python benchmarks/judge.py

1,000 questions about 250 images of 768 x 768 pixels, at an endpoint that takes 500 ms for each and fails on every
fifth request (busy, error, connection dropped, garbage), 32 at a time. The simulation holds the same faults, and the
pauses that the client makes after them; what is above it is the judge's own. The server is another process.
"""

import argparse
import asyncio
import heapq
import json
import platform
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table


RESULTS = Path(__file__).parent / "results" / "judge.json"
FAULTS = ("busy", "error", "dropped", "garbage")
RETRY_AFTER = 1.0  # seconds, of a busy server


def fault(question: int, attempt: int, share: float) -> str | None:
    """Say what goes wrong when a question is asked for the attempt-th time, to server and simulation alike."""
    draw = random.Random(f"{question} {attempt}")
    return draw.choice(FAULTS) if draw.random() < share else None


def pause(kind: str, attempt: int, draw: random.Random) -> float:
    """Give the seconds that the client waits after a fault: as told, or 0.5 doubling to 8, less up to a quarter."""
    return RETRY_AFTER if kind == "busy" else min(0.5 * 2**attempt, 8.0) * (1 - draw.random() / 4)


def simulate(questions: int, concurrency: int, seconds: float, share: float) -> float:
    """Give the seconds until the last answer, if the client cost nothing; a question keeps its place in its pauses."""
    draw, free, end = random.Random(0), [0.0] * concurrency, 0.0
    for question in range(questions):
        now, attempt = heapq.heappop(free) + seconds, 0
        while kind := fault(question, attempt, share):
            now += pause(kind, attempt, draw) + seconds
            attempt += 1
        heapq.heappush(free, now)
        end = max(end, now)
    return end


def serve(seconds: float, share: float) -> None:
    """Serve an endpoint on the loopback, whose port is the first line of output, until the input ends."""
    attempts: Counter[int] = Counter()
    top = [{"token": token, "logprob": float(np.log(p))} for token, p in (("Yes", 0.75), ("No", 0.25))]
    good = {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found = re.search(rb"Is this number (\d+)\?", body)
            assert found is not None
            question = int(found[1])
            time.sleep(seconds)
            attempts[question] += 1
            kind = fault(question, attempts[question] - 1, share)
            if kind == "dropped":
                self.close_connection = True
                return
            data = b"no JSON" if kind == "garbage" else json.dumps(good).encode()
            self.send_response({"busy": 429, "error": 500}.get(kind or "", 200))
            if kind == "busy":
                self.send_header("Retry-After", str(RETRY_AFTER))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


@contextmanager
def server(seconds: float, share: float) -> Any:
    """Serve in another process; yields the endpoint's URL."""
    command = [sys.executable, __file__, "--serve", "--seconds", str(seconds), "--faults", str(share)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.stdin.close()


def crops(number: int, side: int = 768) -> list[Image.Image]:
    """Cut different crops out of one smooth, slightly noisy image, about as detailed as a camera's."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    large = np.asarray(coarse.resize((2 * side, 2 * side), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = (large + draw.normal(0, 3, large.shape)).clip(0, 255).astype(np.uint8)
    corners = draw.integers(0, side, (number, 2))
    return [Image.fromarray(np.ascontiguousarray(noisy[y : y + side, x : x + side])) for y, x in corners]


def measure(questions: int, per_image: int, seconds: float, share: float, concurrency: int) -> dict[str, Any]:
    from trl_unigrpo.rewards import VLMJudge
    from trl_unigrpo.rewards.judge.vlm_judge import data_url

    images = crops(-(-questions // per_image))
    with server(seconds, share) as url:
        judge = VLMJudge("m", url, concurrency=concurrency, max_retries=10, timeout=30)
        pairs = [(images[i // per_image], f"Is this number {i}?") for i in range(questions)]
        wall, cpu = time.perf_counter(), time.process_time()
        scores = asyncio.run(judge.ask(pairs))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    started = time.process_time()
    kilobytes = [len(data_url(image)) / 1000 for image in images[:20]]
    encoding = (time.process_time() - started) / len(kilobytes)
    simulated = simulate(questions, concurrency, seconds, share)
    plan = [fault(question, 0, share) for question in range(questions)]
    return {
        "questions": questions,
        "questions_per_image": per_image,
        "concurrency": concurrency,
        "seconds_per_request": seconds,
        "fault_share": share,
        "first_requests_with_a_fault": sum(kind is not None for kind in plan) / questions,
        "wrong_or_missing": sum(score is None or abs(score - 0.75) > 1e-9 for score in scores),
        "wall_seconds": wall,
        "simulated_seconds": simulated,
        "wall_over_simulated": wall / simulated,
        "cpu_ms_per_question": 1000 * cpu / questions,
        "of_which_encoding_ms": 1000 * encoding / per_image,
        "kilobytes_per_image": float(np.mean(kilobytes)),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--per-image", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.5, help="that the endpoint takes for a request")
    parser.add_argument("--faults", type=float, default=0.2, help="share of requests that fail")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.seconds, options.faults)
        return
    result = {
        **measure(options.questions, options.per_image, options.seconds, options.faults, options.concurrency),
        "versions": {package: version(package) for package in ("openai", "httpx2", "pillow")},
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "command": "python benchmarks/judge.py",
        "date": str(date.today()),
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", "")
    for name, value in result.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
