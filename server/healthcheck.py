"""``python -m server.healthcheck [PORT]``: whether the server on this machine lives, for the image's health check.

Speaks HTTP, or HTTPS where the server has a certificate: which of the two is in a configuration that this does not
read. Exit status 0 means that /health answered 200.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection

DEFAULT_PORT = 8000
TIMEOUT_S = 2.0


def healthy(port: int) -> bool:
    """Whether /health on this machine answers 200."""
    # The certificate is another name's than the loopback address's, and there is nobody in between.
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    for connection in (
        # First, since a server without a certificate logs every other greeting, and one with a certificate does not.
        HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S),
        HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=unverified),
    ):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            continue
        finally:
            connection.close()
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the process's exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return 0 if healthy(int(arguments[0]) if arguments else DEFAULT_PORT) else 1


if __name__ == "__main__":
    sys.exit(main())
