"""A Hub on this machine, for the real client: it keeps what it receives, and fails on demand."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def private(repo):
    # What huggingface_hub 1 and 2 send.
    return repo.get("private", repo.get("visibility") == "private")


class LocalHub:
    """repos[(kind, "owner/name")] is what create was sent, plus "files": {path: bytes}.

    failures[place] is a list of what happens to the next calls of a place (create, upload, commit,
    info, runtime): (status, message) answers that, "drop" closes the connection in the middle, None
    serves.
    """

    def __init__(self):
        self.repos, self.objects, self.failures, self.calls, self.stages = {}, {}, {}, [], []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, value=None, headers=(), data=None):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def fails(self, place):
        """Do what `failures` has for this call; True if that was all the answer it gets."""
        self.hub.calls.append(place)
        failure = (
            self.hub.failures.get(place, [None]).pop(0) if self.hub.failures.get(place) else None
        )
        if failure == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif failure:
            self.answer(failure[0], {"error": failure[1]})
        return failure is not None

    def serve(self):
        path, hub = self.path.split("?")[0], self.hub
        if path.startswith("/upload/") and self.fails("upload"):
            return  # before the body was read: in mid-upload
        data = self.body()
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            return self.answer(200, {})
        if path == "/verify":
            return self.answer(200, {})
        if re.fullmatch(r"/(?:spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.answer(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            **o,
                            "actions": {
                                "upload": {"href": f"{hub.address}/upload/{o['oid']}"},
                                "verify": {"href": f"{hub.address}/verify"},
                            },
                        }
                        for o in json.loads(data)["objects"]
                    ],
                },
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/(model|space)s/([^/]+/[^/]+)(?:/(.*))?", path):
            return self.repository((match[1], match[2]), match[3] or "", data)
        return self.answer(404, {"error": "no such page"})

    def create(self, asked):
        kind, name = (
            asked.get("type", "model"),
            f"{asked.get('organization') or 'me'}/{asked['name']}",
        )
        place = "create" if asked.get("hardware") != "zero-a10g" else "create zero-a10g"
        if self.fails(place):
            return None
        if (kind, name) in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo"})
        self.hub.repos[kind, name] = {**asked, "files": {}}
        where = f"{'spaces/' * (kind == 'space')}{name}"
        return self.answer(200, {"url": f"{self.hub.address}/{where}", "name": name, "id": "1"})

    def repository(self, key, rest, data):
        if rest in ("", "revision/main") and self.fails("info"):
            return None
        if key not in self.hub.repos:
            return self.answer(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        repo = self.hub.repos[key]
        files = repo["files"]
        if rest.startswith("preupload/"):
            return self.answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs"
                            if f["path"].endswith(".safetensors")
                            else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for f in json.loads(data)["files"]
                    ]
                },
            )
        if rest.startswith("commit/"):
            where = f"{'spaces/' * (key[0] == 'space')}{key[1]}"
            return self.commit(where, files, [json.loads(line) for line in data.splitlines()])
        if rest == "runtime":
            return self.fails("runtime") or self.answer(
                200, {"stage": self.hub.stages.pop(0), "hardware": {}}
            )
        if rest.startswith("tree/"):
            return self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "a" * 40}
                    for name, data in files.items()
                ],
            )
        return self.answer(
            200,
            {
                "id": key[1],
                "sha": "0" * 40,
                "private": private(repo),
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": n, "size": len(d)} for n, d in files.items()],
            },
        )

    def commit(self, where, files, lines):
        if self.fails("commit"):
            return None
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.address}/{where}/commit/1"
        return self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def resolve(self, name, path):
        data = self.hub.repos.get(("model", name), {"files": {}})["files"].get(path)
        if data is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(200, data=data, headers={"ETag": etag, "X-Repo-Commit": "0" * 40})

    do_GET = do_POST = do_PUT = do_HEAD = serve
