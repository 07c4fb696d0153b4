"""An HTTP server that waits before it hands a request on: python benchmarks/slow_proxy.py PORT TO_PORT SECONDS."""

import http.client
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SKIPPED = {"transfer-encoding", "connection", "content-length", "date", "server"}


class Slow(BaseHTTPRequestHandler):
    """Hands everything on, late."""

    port, seconds = 0, 0.0

    def hand_on(self) -> None:
        """One request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.seconds)
        behind = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in SKIPPED:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        behind.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = hand_on


if __name__ == "__main__":
    Slow.port, Slow.seconds = int(sys.argv[2]), float(sys.argv[3])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Slow).serve_forever()
