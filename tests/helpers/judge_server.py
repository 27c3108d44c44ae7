"""An endpoint on the loopback that speaks OpenAI's chat protocol and answers, or fails, as a test wants."""

import base64
import io
import json
import math
import socket
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

from PIL import Image


@dataclass
class Reply:
    """A reply as it goes over the wire: `drop` sends so many bytes of it and hangs up."""

    body: object = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    drop: int | None = None


def chat(content="Yes", top=None):
    """The body of an answer; `top` are the first token's (token, probability)."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    if top is not None:  # as vLLM writes what is impossible
        logprobs = [(token, math.log(p) if p > 0 else -9999.0) for token, p in top]
        tops = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in logprobs]
        choice["logprobs"] = {"content": [{"token": content, "logprob": 0.0, "bytes": None, "top_logprobs": tops}]}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def yes(p):
    """An answer whose P(yes) is p."""
    return Reply(chat("Yes" if p > 0.5 else "No", [("Yes", p), ("No", 1 - p)]))


def text_of(body):
    return body["messages"][-1]["content"][-1]["text"]


def images_of(body):
    """The PIL images of a request, in order."""
    parts = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    urls = [part["image_url"]["url"] for part in parts]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


def keep_alive(connection):
    """Answer a request with blank lines, and never with anything else."""
    connection.recv(2**20)
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1\r\n\n\r\n")
            time.sleep(0.05)
    except OSError:
        connection.close()


@contextmanager
def endless_server():
    """A server that keeps each connection alive and never answers; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with suppress(OSError):  # until it is closed
                while True:
                    Thread(target=keep_alive, args=(listening.accept()[0],), daemon=True).start()

        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


class ChatServer:
    """
    Context manager. `reply(body, attempt)` returns the [`Reply`] to a request's JSON, asked for the attempt-th time.

    `requests` keeps (headers, body) of all, `most` is how many were open at a time.
    """

    def __init__(self, reply):
        self.requests, self.most = [], 0
        open_now, attempts, lock, keep = 0, Counter(), Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def log_message(self, *args):
                pass

            def do_POST(self):
                nonlocal open_now
                raw = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(raw)
                with lock:
                    open_now += 1
                    keep.most = max(keep.most, open_now)
                    keep.requests.append((dict(self.headers), body))
                    attempt = attempts[raw]
                    attempts[raw] += 1
                try:
                    answer = reply(body, attempt)
                    time.sleep(answer.delay)
                finally:
                    with lock:
                        open_now -= 1
                self.send(answer)

            def send(self, answer):
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                if answer.drop == 0:
                    self.close_connection = True
                    return
                try:
                    self.send_response(answer.status)
                    for name, value in {"content-type": "application/json", **answer.headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: answer.drop])
                    self.wfile.flush()
                except OSError:
                    pass  # the client gave up waiting
                self.close_connection = answer.drop is not None

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
