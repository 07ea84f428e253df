"""Servers on loopback for tests of sharing: sshd, S3, a Hub; and people who use them at a shell."""

import base64
import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from programs import need

SECRET = "wJalrXUtnFEMI-not-a-real-key"
KEY_ID = "AKIA-IVAN"


class Person:
    """Someone with a home of their own, at a shell in a folder."""

    def __init__(self, home: Path, **environment: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        others = ("AWS_", "GIT_", "DVC_", "SSH_", "HF_", "PYTHONPATH")
        self.home = home
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(others)},
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "Ivan",
            "GIT_AUTHOR_EMAIL": "ivan@lab.example",
            "GIT_COMMITTER_NAME": "Ivan",
            "GIT_COMMITTER_EMAIL": "ivan@lab.example",
            **environment,
        }

    def run(self, command: str, folder: Path, ok: bool = True) -> str:
        """Run a line in the shell; return stdout and stderr."""
        run = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=self.environment, capture_output=True, text=True
        )
        assert (run.returncode == 0) == ok, f"$ {command}\n{run.stdout}{run.stderr}"
        return run.stdout + run.stderr


@contextlib.contextmanager
def a_folder(folder: Path) -> Iterator[tuple[Person, dict[str, str]]]:
    """Give a person, and what of the docs' remote on a folder is named otherwise here."""
    yield Person(folder / "home"), {"/mnt/team/distill": str(folder / "store")}


@contextlib.contextmanager
def over_ssh(folder: Path) -> Iterator[tuple[Person, dict[str, str]]]:
    """The same of a remote on a real sshd."""
    with ssh_server(folder / "ssh") as (port, home):
        here = f"{getpass.getuser()}@127.0.0.1:{port}{folder}/store"
        yield Person(home), {"ivan@lab.example:22/srv/distill": here}


@contextlib.contextmanager
def on_s3(folder: Path) -> Iterator[tuple[Person, dict[str, str]]]:
    """The same of a remote on a server that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url, keys = f"http://{host}:{port}", {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET}
    try:
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="our-bucket")
        environment = {name.upper(): value for name, value in keys.items()}
        yield Person(folder / "home", **environment), {"https://s3.lab.example": url}
        assert client.list_objects_v2(Bucket="our-bucket", Prefix="distill/files/md5/")["KeyCount"] > 10
    finally:
        server.stop()


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[tuple[int, Path]]:
    """Run a private sshd on a loopback port; give the port, and a home whose key may enter."""
    program, keygen = need("openssh-server", "sshd"), need("openssh-client", "ssh-keygen")
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for key in (folder / "host_key", home / ".ssh/id_ed25519"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(home / ".ssh/id_ed25519.pub", folder / "authorized_keys")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd, as root, locks itself in
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    config = folder / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", config], stderr=log)
        try:
            _wait_for(port, server, folder / "sshd.log")
            yield port, home
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs; keeps what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []

    def reply(self, path: str, body: bytes) -> object:
        """Return the answer to a request, in the Hub's words."""
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **modes} for file in asked]}
        if "/commit/" in path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return {"commitUrl": f"{self.url}/me/system1/commit/{'a' * 40}", "commitOid": "a" * 40}
        return {"url": f"{self.url}/me/system1", "name": "me/system1"}


class _HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        )
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        answer = json.dumps(self.server.reply(self.path, body)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def a_hub() -> Iterator[Hub]:
    """Run a Hub on loopback."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
