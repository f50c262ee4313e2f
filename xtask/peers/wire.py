"""The conversation of a peer with `cargo xtask bench`: one JSON object a line, a request in, a reply out.

A request is {"call": NAME, ...}; the reply {"ok": {...}}, or {"error": MESSAGE} when the peer cannot do it.
"""

import json
import os
import sys


def limit_memory(limit_bytes):
    """Lets a request that is too large fail, instead of having the system end this process or another one."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    except (ImportError, OSError, ValueError):
        pass  # A system without such a limit.


def serve(handlers):
    """Answers requests until the other side closes; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"ok": handlers[request["call"]](request)}
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            reply = {"error": f"{type(error).__name__}: {text[0]}"}
        print(json.dumps(reply), file=replies, flush=True)
