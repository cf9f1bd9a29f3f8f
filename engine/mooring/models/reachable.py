"""Whether a server can be reached at all: one bounded look before a client that would try for a minute."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_PORTS = {"http": 80, "https": 443}


def require_reachable(url: str, seconds: float = 3.0) -> None:
    """Opens one connection to the server of ``url``, or to the proxy in front of it.

    Args:
        url: address of the server; only scheme, host and port count.
        seconds: longest wait, name resolution included.

    Raises:
        OSError: nobody answers there; names host and reason.
    """
    address = urlsplit(url)
    scheme, host = address.scheme or "https", address.hostname or ""
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and not proxy_bypass(host):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host = address.hostname or ""
    place = (host, address.port or _PORTS.get(address.scheme or scheme, 443))
    problems: list[OSError] = []

    def connect() -> None:
        try:
            socket.create_connection(place, timeout=seconds).close()
        except OSError as err:
            problems.append(err)

    # a thread: the system's name resolution takes no time limit
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    if attempt.is_alive():
        raise TimeoutError(f"{host} did not answer within {seconds:.0f} s: no network")
    if problems:
        raise ConnectionError(f"{host} cannot be reached: {problems[0].strerror or problems[0]}")
