"""What is fetched from a hub, against a hub of our own on this machine (the real client, no network)."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.launch import cla, cla_anew
from tests.tiny import save_tiny

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves folder/<owner>/<name> as the hub serves models, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.tokens, self.revisions = folder, {}, set(), set()

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
        self.server.tokens.add(self.headers.get("Authorization"))
        if api:
            return self.reply(json.dumps(self.listing(repo, "tree" in parts)).encode(), body)
        self.server.revisions.add(parts[3])
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
        files = {str(file.relative_to(repo)): file.stat().st_size for file in repo.rglob("*") if file.is_file()}
        if tree:
            return [{"type": "file", "path": name, "size": size, "oid": "1"} for name, size in files.items()]
        return {"id": f"owner/{repo.name}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

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
    done = cla_anew("inspect", "owner/phi", "--json", env=hub.environment())
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
    done = cla_anew("convert", "owner/falcon", tmp_path / "out", env=hub.environment())
    assert done.returncode == 3 and "code of its own" in done.stderr and "Supported: llama" in done.stderr
    assert set(hub.sent) == {"config.json"}
    described = json.loads(cla_anew("inspect", "owner/falcon", "--json", env=hub.environment()).stdout)
    assert described["supported"] is False and "FalconForCausalLM" in described["reason"]
    assert described["num_layers"] == 6 and described["patterns"] == {}


CARRIED = [
    "LICENSE.txt", "USE_POLICY.md", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def test_convert_fetches_the_whole_model_and_nothing_else(hub, tmp_path):
    folder = save_tiny("llama", tmp_path / "owner" / "llama")
    for name in (*CARRIED, "consolidated.safetensors", "original/params.json", "pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_bytes(b"{ }\r\n")  # not as anything here would write it
    (folder / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en]\ntags: [chat]\n---\n# The source\n")
    online = hub.environment() | {"HF_TOKEN": "hf_secret"}
    line = ("convert", "owner/llama", tmp_path / "out", "--init", "mean", "--revision", "v1")
    dry = cla_anew(*line, "--dry-run", env=online)
    assert dry.returncode == 0 and "needs " in dry.stdout, dry.stderr
    assert hub.sent["model.safetensors"] < (folder / "model.safetensors").stat().st_size / 2  # its header
    done = cla_anew(*line, env=online)
    assert done.returncode == 0, done.stderr
    assert hub.sent["model.safetensors"] >= (folder / "model.safetensors").stat().st_size
    assert not hub.sent.keys() & {"consolidated.safetensors", "params.json", "pytorch_model.bin"}
    assert hub.tokens == {"Bearer hf_secret"} and hub.revisions <= {"v1", COMMIT}
    for name in CARRIED:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("license: llama3.2", "- en", "base_model: owner/llama", "library_name: transformers", "- chat"):
        assert line in card
    assert "hf_secret" not in "".join(f.read_text(errors="replace") for f in (tmp_path / "out").glob("*.*"))

    missing = cla_anew("inspect", "owner/nothing", env=online)
    assert missing.returncode == 3 and "was not found" in missing.stderr
    hub.sent.clear()
    hub.tokens.clear()
    offline = online | {"HF_HUB_OFFLINE": "1"}
    again = cla_anew("convert", "owner/llama", tmp_path / "again", "--init", "mean", "--revision", "v1", env=offline)
    assert again.returncode == 0, again.stderr
    seen = json.loads(cla_anew("inspect", "owner/llama", "--revision", "v1", "--json", env=offline).stdout)
    assert seen["supported"] and not hub.sent and not hub.tokens
    missing = cla_anew("inspect", "owner/other", env=offline)
    assert missing.returncode == 3 and "HF_HUB_OFFLINE" in missing.stderr
    # Without a network what is cached still works, and nothing is tried again and again.
    unreachable = online | {"HF_ENDPOINT": "http://no-such-host.invalid"}
    assert cla_anew("inspect", "owner/llama", "--revision", "v1", env=unreachable).returncode == 0
    (tmp_path / "my-model").mkdir()
    missing = cla_anew("inspect", "my-modle", env=unreachable, cwd=tmp_path)
    assert missing.returncode == 3 and "on this machine. Did you mean 'my-model'?" in missing.stderr
    assert "cannot be reached" in missing.stderr and "etry" not in missing.stderr
