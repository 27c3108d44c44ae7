"""Which addresses are this machine's own: proxies of the environment are not for them."""

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


_OF_PROXIES = (403, 407, 502, 503, 504)
"""Answers of a proxy that lets nobody through, or finds nobody."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_here(url: str) -> bool:
    """Say whether the URL's host is this machine; a proxy, asked for it, would look on its own."""
    host = urlsplit(url).hostname or ""
    # Servers print 0.0.0.0 as their address when they listen on all; names below localhost are loopback by RFC 6761.
    return is_loopback(host) or host in ("0.0.0.0", "::") or host.endswith(".localhost")


def proxy_hint(url: str, status: int = 0) -> str:
    """
    Say that a request went through a proxy of the environment; nothing if it did not, or that is not why it failed.

    Args:
        status: of the answer, 0 if there was none.
    """
    if status and status not in _OF_PROXIES:
        return ""
    parts = urlsplit(url)
    host, proxies = parts.hostname or "", getproxies()
    name = parts.scheme if proxies.get(parts.scheme) else "all"
    if not proxies.get(name) or is_here(url) or proxy_bypass(host):
        return ""
    return f"It was asked through the proxy in {name.upper()}_PROXY: if that can't reach {host}, add it to NO_PROXY."
