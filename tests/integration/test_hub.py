"""What is fetched from a hub, against a hub of our own on this machine (the real client, no network)."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.integration.test_convert import cla
from tests.tiny import save_tiny

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves folder/<owner>/<name> as the hub serves models, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent = folder, {}

    def environment(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.folder / "home")}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = self.server.folder / "/".join(parts[2:4] if api else parts[:2])
        if not repo.is_dir():
            return self.reply(b"", body, 404, "RepoNotFound")
        if api:
            return self.reply(json.dumps(self.listing(repo, "tree" in parts)).encode(), body)
        file = repo / "/".join(parts[4:])  # owner/name/resolve/revision/file
        if not file.is_file():
            return self.reply(b"", body, 404, "EntryNotFound")
        content, status = file.read_bytes(), 200
        if "Range" in self.headers:
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            content, status = content[int(start) : int(end) + 1], 206
        if body:
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(content)
        return self.reply(content, body, status)

    @staticmethod
    def listing(repo: Path, tree: bool) -> object:
        files = list(repo.iterdir())
        if tree:
            return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1"} for f in files]
        return {"id": f"owner/{repo.name}", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}

    def reply(self, content: bytes, body: bool, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        etag = f'"{self.path.rpartition("/")[2]}"'  # names the file in the client's cache
        headers = {"Content-Length": len(content), "ETag": etag, "X-Repo-Commit": COMMIT, "X-Error-Code": error}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    server = Hub(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_inspect_fetches_headers_only(hub, tmp_path):
    folder = save_tiny("phi3", tmp_path / "owner" / "phi", vocab_size=20_000)
    done = cla("inspect", "owner/phi", "--json", env=hub.environment())
    assert done.returncode == 0, done.stderr
    result, local = json.loads(done.stdout), json.loads(cla("inspect", folder, "--json").stdout)
    assert result["supported"] and result["parameters"] > 1_000_000
    assert result.keys() == local.keys()
    assert all(result[key] == local[key] for key in result.keys() - {"model", "folder"})
    assert set(hub.sent) == {"config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] < 0.1 * (folder / "model.safetensors").stat().st_size


def test_weights_of_an_unsupported_model_stay_on_the_hub(hub, tmp_path):
    folder = save_tiny("llama", tmp_path / "owner" / "falcon")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    done = cla("convert", "owner/falcon", tmp_path / "out", env=hub.environment())
    assert done.returncode == 3 and "code of its own" in done.stderr and "Supported: llama" in done.stderr
    assert set(hub.sent) == {"config.json"}
    described = json.loads(cla("inspect", "owner/falcon", "--json", env=hub.environment()).stdout)
    assert described["supported"] is False and "FalconForCausalLM" in described["reason"]
    assert described["num_layers"] == 6 and described["patterns"] == {}


def test_convert_fetches_the_whole_model(hub, tmp_path):
    folder = save_tiny("llama", tmp_path / "owner" / "llama")
    done = cla("convert", "owner/llama", tmp_path / "out", "--init", "mean", env=hub.environment())
    assert done.returncode == 0, done.stderr
    assert hub.sent["model.safetensors"] >= (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    missing = cla("inspect", "owner/nothing", env=hub.environment())
    assert missing.returncode == 3 and "was not found" in missing.stderr
