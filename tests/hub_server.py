"""A small server of the hub's file interface, for tests: python tests/hub_server.py ROOT PORT_FILE LOG [--rate BYTES]

Serves ROOT/OWNER/NAME/FILE as the hub does: the files of a repository, a resolve link with the LFS digest and size that leads
to a storage on another host name, and ranges there. OWNER/gated is gated. ROOT/FILE.digest overrides the digest that it tells.
LOG has a line a request: method, path, range, bytes sent. --rate: bytes a second of the storage.
"""

import argparse
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 16


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def note(self, sent=0):
        with self.server.log.open("a") as stream:
            stream.write(f"{self.command} {self.path} {self.headers.get('Range', '-')} {sent}\n")

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "storage":
            return self.storage(self.server.root.joinpath(*parts[1:]))
        if parts[0] == "api":  # api/models/OWNER/NAME[/revision/REVISION]
            parts = [*parts[2:], "revision", "main"][:4] if len(parts) == 4 else parts[2:]
        owner, name, kind, revision, *rest = parts
        self.note()
        directory = self.server.root / owner / name
        if name == "gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        if not directory.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if revision not in ("main", "0" * 40):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if kind == "revision":
            told = {"id": f"{owner}/{name}", "siblings": [{"rfilename": file.name} for file in directory.iterdir()]}
            return self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        file = directory.joinpath(*rest)
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        told = self.server.root / f"{file.name}.digest"
        digest = told.read_text() if told.exists() else hashlib.sha256(file.read_bytes()).hexdigest()
        common = {"X_Repo_Commit": "0" * 40, "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": file.stat().st_size}
        port = self.server.server_address[1]
        location = f"http://localhost:{port}/storage/{file.relative_to(self.server.root)}"
        return self.answer(302, Location=location, **common)

    def storage(self, file):
        if self.headers.get("Authorization"):
            return self.answer(400)  # a token must not reach the storage
        size = file.stat().st_size
        begin, end = 0, size - 1
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), int(found[2] or end)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - begin + 1))
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        self.end_headers()
        sent = 0
        try:
            with file.open("rb") as stream:
                stream.seek(begin)
                while sent <= end - begin:
                    data = stream.read(min(CHUNK, end - begin + 1 - sent))
                    self.wfile.write(data)
                    sent += len(data)
                    if self.server.rate:
                        time.sleep(len(data) / self.server.rate)
        except OSError:
            pass  # the client was killed
        self.note(sent)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("port_file", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--rate", type=float, default=0)
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.log, server.rate = args.root, args.log, args.rate
    args.port_file.write_text(str(server.server_address[1]))
    server.serve_forever()


if __name__ == "__main__":
    main()
