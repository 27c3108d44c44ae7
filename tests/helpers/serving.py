"""Real servers on free loopback ports: reward servers in a thread or a process, and one that answers by a script."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import uvicorn
from PIL import Image

from tests.helpers.paths import ROOT
from trl_unigrpo.rewards.remote.server import build_app, reward_name


SERVED = "tests.helpers.served_rewards"
TOKEN = "a-token-of-the-tests"


def some_images(number, size=8):
    """Images of random pixels."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(number)]


def score(reward, images, **arguments):
    """Ask an async reward about images."""
    return asyncio.run(reward(prompts=[f"prompt {i}" for i in range(len(images))], images=images, **arguments))


@contextmanager
def serving(*rewards, token=None, limits=None):
    """The address of a reward server in a thread."""
    app = build_app({reward_name(reward): reward for reward in rewards}, token, limits)
    config = uvicorn.Config(app, port=0, log_level="warning", log_config=None)
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def serving_process(*paths, port=0, options=()):
    """The process of `trl-unigrpo serve-rewards` and its address."""
    command = [sys.executable, "-m", "trl_unigrpo.cli", "serve-rewards", *paths, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving "), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def scripted(*answers):
    """
    The address of a server that gives these answers in turn, the last one for ever, and the list of requests' paths.

    An answer is (status, body) or (status, body, headers); None drops the connection.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            requests.append(self.path)
            answer = answers[min(len(requests), len(answers)) - 1]
            if answer is None:
                self.close_connection = True
                return
            status, body, headers = (*answer, {})[:3]
            self.send_response(status)
            for name, value in {"content-length": str(len(body.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def until(condition, seconds=20.0):
    """Wait until something holds; a TimeoutError if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never held")
        time.sleep(0.01)
