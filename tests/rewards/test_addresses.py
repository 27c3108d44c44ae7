"""Which addresses are this machine's own, and what is said of the proxies before the others."""

import socket
import threading

import httpx2
import pytest

from trl_unigrpo.rewards.addresses import is_here, is_loopback, proxy_hint


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("0.0.0.0", False)]
    + [("::", False), ("10.0.0.1", False), ("localhost.example.org", False), ("", False)],
)
def test_loopback_addresses(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("url", "direct"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://localhost:8000/v1", True),
        ("https://LOCALHOST/v1", True),
        ("http://judge.localhost:8000", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://gpu-node:8000/v1", False),
        ("http://10.0.0.1:8000/v1", False),
        ("http://localhost.example.org/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_proxies_are_not_for_this_machine(url, direct, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
        monkeypatch.delenv(name.lower(), raising=False)
    assert is_here(url) is direct and bool(proxy_hint(url)) is not direct
    assert "secret" not in proxy_hint(url)
    assert proxy_hint(url, 502) == proxy_hint(url) and proxy_hint(url, 404) == ""
    monkeypatch.setenv("NO_PROXY", "gpu-node,10.0.0.1,.example.org,api.openai.com")
    assert proxy_hint(url) == ""


def test_client_reaches_the_loopback_of_ipv6(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")

    def answer():
        connection = listening.accept()[0]
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        connection.close()

    url = f"http://[::1]:{listening.getsockname()[1]}"
    with listening, httpx2.Client(trust_env=not is_here(url), timeout=5) as client:
        threading.Thread(target=answer, daemon=True).start()
        assert client.get(url).status_code == 204
