"""A small server of the hub's file interface, for tests: python tests/hub_server.py ROOT PORT_FILE LOG [--rate BYTES]

Serves ROOT/OWNER/NAME/FILE as the hub does: a repository's commit and its files with sizes and digests, a resolve link with the
LFS digest and size that leads to a storage on another host name, and ranges there. OWNER/gated is gated. main is the commit of
ROOT/OWNER/NAME.commit (else zeros); ROOT/OWNER/NAME@COMMIT holds the files of another. ROOT/OWNER/NAME.moved names its new
name. ROOT/FILE.digest overrides the digest that it tells. LOG has a line a request: method, path, range, bytes sent, when it
came and when it ended. --rate: bytes a second of the storage, of all connections together.

ROOT/faults.json: [{"path": PART OF A PATH, "kind": KIND, "times": N}, ...]: the next N requests that fit are answered so. A
number is a status (429 with Retry-After: 1); cut ends an answer in the middle, stall stops there for 5 s, whole ignores the
range, flip changes a byte.
"""

import argparse
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 16
ZEROS = "0" * 40


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def note(self, sent=0):
        with self.server.lock, self.server.log.open("a") as stream:
            stream.write(f"{self.command} {self.path} {self.headers.get('Range', '-')} {sent} {self.came} {time.time()}\n")

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fault(self):
        """What this request is to suffer."""
        faults = self.server.root / "faults.json"
        with self.server.lock:
            if not faults.exists():
                return None
            told = json.loads(faults.read_text())
            found = next((fault for fault in told if fault["path"] in self.path and fault["times"] > 0), None)
            if found:
                found["times"] -= 1
                faults.write_text(json.dumps(told))
        return found and found["kind"]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.kind, self.came = self.fault(), time.time()
        if isinstance(self.kind, int):
            self.note()
            return self.answer(self.kind, **({"Retry_After": 1} if self.kind == 429 else {}))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "storage":
            return self.storage(self.server.root.joinpath(*parts[1:]))
        if parts[0] == "api":  # api/models/OWNER/NAME[/revision/REVISION]
            parts = [*parts[2:], "revision", "main"][:4] if len(parts) == 4 else parts[2:]
        self.note()
        if len(parts) < 4:
            return self.answer(404)
        owner, name, kind, revision, *rest = parts
        root = self.server.root / owner
        moved = root / f"{name}.moved"
        name = moved.read_text() if moved.exists() else name
        if name == "gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        if not (root / name).is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        head = root / f"{name}.commit"
        head = head.read_text() if head.exists() else ZEROS
        commit = head if revision == "main" else revision
        directory = root / name if commit == head else root / f"{name}@{commit}"
        if not directory.is_dir():
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if kind == "revision":
            files = [self.told(file) for file in sorted(directory.iterdir())]
            told = {"id": f"{owner}/{name}", "sha": commit, "siblings": files}
            return self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        file = directory.joinpath(*rest)
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        digest = self.digest(file)
        common = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": file.stat().st_size}
        port = self.server.server_address[1]
        location = f"http://localhost:{port}/storage/{file.relative_to(self.server.root)}"
        return self.answer(302, Location=location, **common)

    def told(self, file):
        size = file.stat().st_size
        lfs = {"size": size, "sha256": self.digest(file), "pointerSize": 134}
        return {"rfilename": file.name, "size": size, "blobId": ZEROS, "lfs": lfs}

    def digest(self, file):
        told = self.server.root / f"{file.name}.digest"
        if told.exists():
            return told.read_text()
        key = (file, file.stat().st_size, file.stat().st_mtime_ns)
        if key not in self.server.digests:
            self.server.digests[key] = hashlib.sha256(file.read_bytes()).hexdigest()
        return self.server.digests[key]

    def pause(self, size):
        """Wait until the rate allows ``size`` more bytes."""
        if not self.server.rate:
            return
        with self.server.lock:
            self.server.next = max(self.server.next, time.monotonic()) + size / self.server.rate
            wait = self.server.next - time.monotonic()
        time.sleep(max(0, wait))

    def storage(self, file):
        if self.headers.get("Authorization"):
            return self.answer(400)  # a token must not reach the storage
        size = file.stat().st_size
        begin, end = 0, size - 1
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.kind != "whole" else None
        if found:
            begin, end = int(found[1]), int(found[2] or end)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - begin + 1))
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        self.end_headers()
        sent, middle = 0, (end - begin + 1) // 2
        try:
            with file.open("rb") as stream:
                stream.seek(begin)
                while sent <= end - begin:
                    data = stream.read(min(CHUNK, end - begin + 1 - sent))
                    if self.kind == "flip":
                        data, self.kind = bytes([data[0] ^ 1]) + data[1:], None
                    if self.kind in ("cut", "stall") and sent >= middle:
                        time.sleep(5 if self.kind == "stall" else 0)
                        self.connection.shutdown(socket.SHUT_RDWR)
                        break
                    self.pause(len(data))
                    self.wfile.write(data)
                    sent += len(data)
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
    server.lock, server.digests, server.next = threading.Lock(), {}, 0.0
    args.port_file.write_text(str(server.server_address[1]))
    server.serve_forever()


if __name__ == "__main__":
    main()
