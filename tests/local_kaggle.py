"""A stand-in for Kaggle's API on this machine: it keeps what is pushed and answers as Kaggle does.

The real client finds it as its HTTP proxy, on any free port; the address of Kaggle itself is never
looked up.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalKaggle(ThreadingHTTPServer):
    """pushed   the requests of every accepted push, in order
    calls    the names of all requests, in order
    running  how many times a notebook's status is RUNNING before it has ended
    fails    slugs of notebooks that end with ERROR
    refuses  slug -> what is said to a push of it
    busy     how many requests are answered by 429 before any other answer
    drops    names of requests whose next one gets no answer at all
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pushed, self.calls, self.polled, self.complete = [], [], {}, set()
        self.running, self.fails, self.refuses, self.busy, self.drops = 1, set(), {}, 0, set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self, home) -> dict[str, str]:
        """Return what makes the client talk to this server, with no credentials besides these."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": "me",
            "KAGGLE_KEY": "secret",
            "HOME": str(home),
            "http_proxy": f"http://127.0.0.1:{self.server_port}",
            "no_proxy": "",
        }

    def answer(self, call: str, asked: dict) -> tuple[int, dict]:
        if self.busy > 0:
            self.busy -= 1
            return 429, {"code": 429, "message": "Too Many Requests"}
        return getattr(self, call)(asked)

    def SaveKernel(self, asked):
        if said := self.refuses.get(asked["slug"]):
            return 200, {"error": said}
        self.pushed.append(asked)
        self.polled[asked["slug"]] = 0
        unknown = [slug for slug in asked.get("kernelDataSources", []) if slug not in self.complete]
        return 200, {
            "url": f"https://www.kaggle.com/code/{asked['slug']}",
            "versionNumber": 1,
            "error": "",
            "invalidKernelSources": unknown,
        }

    def GetKernelSessionStatus(self, asked):
        slug = f"{asked['userName']}/{asked['kernelSlug']}"
        if slug not in self.polled:
            return 404, {"code": 404, "message": "Not Found"}
        self.polled[slug] += 1
        if self.polled[slug] <= self.running:
            return 200, {"status": "RUNNING"}
        if slug in self.fails:
            return 200, {"status": "ERROR", "failureMessage": "Notebook threw an exception"}
        self.complete.add(slug)
        return 200, {"status": "COMPLETE"}

    def ListKernelSessionOutput(self, asked):
        lines = [
            {"stream_name": "stderr", "time": 1.5, "data": line}
            for line in ("Executing\n", "ValueError: no\n")
        ]
        return 200, {"log": json.dumps(lines)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = self.path.rsplit("/", 1)[1]
        self.server.calls.append(call)
        if call in self.server.drops:
            self.server.drops.remove(call)
            self.close_connection = True
            return
        known = self.headers.get("Authorization", "").startswith("Basic ")
        status, answer = (
            self.server.answer(call, asked)
            if known
            else (401, {"code": 401, "message": "Unauthorized"})
        )
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(data)
