"""Where a run happens: device, versions, hardware. Written into every run folder so that numbers can be judged."""

import os
import platform
import re
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from .console import waiting
from .errors import InputError, UsageError, did_you_mean
from .files import path_of
from .version import __version__

PACKAGES = ["torch", "transformers", "safetensors", "lm-eval", "datasets", "tokenizers", "numpy", "gguf"]


def cache_folder() -> Path:
    """Where rewritten sources and cached results live: $CLA_CONVERT_CACHE, or ~/.cache/cla-convert if that is empty."""
    written = os.environ.get("CLA_CONVERT_CACHE") or "~/.cache/cla-convert"
    folder = path_of(written)
    if written.startswith("~") and folder == Path(written):
        raise InputError(
            f"There is no home folder for the cache, {folder}",
            why="HOME is not set, or the system knows no such user.",
            fix="Let CLA_CONVERT_CACHE name a folder.",
        )
    return folder


CacheKind = Literal["damage", "datasets", "eval", "fingerprints", "samples", "sources", "tokens"]
"""What a cache holds, a folder each."""


def cache_of(kind: CacheKind) -> Path:
    """Where one kind lies."""
    return cache_folder() / kind


def import_slowly(*packages: str) -> None:
    """Import what takes seconds, on a busy machine many; a terminal shows that it goes on."""
    with waiting("importing") as bar:
        for package in packages:
            bar.note(package)
            import_module(package)


def pick_device(wanted: str = "auto", given_by: str = "--set device=") -> str:
    """`auto` -> cuda, mps or cpu, whichever is there first. Raises UsageError for a device that is not.

    `given_by` is what the command line says before the name of a device.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if wanted.startswith("meta"):  # torch's device without memory
            raise RuntimeError(wanted)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what, why = _no_device(wanted)
        raise UsageError(what, why, f"Use {given_by}cpu, or {given_by}auto for the best there is.") from error
    return wanted


_DEVICES = re.compile(r"(cpu|cuda|mps)(:\d+)?")
_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "mac": "mps"}


def _no_device(wanted: str) -> tuple[str, str]:
    """What and why, for a device that torch cannot use."""
    import torch

    name, colon, number = wanted.lower().partition(":")
    if not _DEVICES.fullmatch(wanted):
        meant = _OTHER_NAMES.get(name)
        hint = f" Did you mean {meant + colon + number!r}?" if meant else did_you_mean(wanted, ["cpu", "cuda", "mps"])
        return (
            f"There is no device {wanted!r}.{hint}",
            "There are cpu, cuda, cuda:1 (the second GPU) and so on, and mps.",
        )
    if name == "mps":
        return "The device 'mps' is not there", "It takes a Mac with a GPU of Apple's, and a torch built for it."
    if name == "cpu":
        return f"There is no device {wanted!r}", "There is one CPU, without a number: cpu."
    if not torch.backends.cuda.is_built():
        return f"The device {wanted!r} cannot be used", "The installed torch is built for CPUs only (cla-convert env)."
    count = torch.cuda.device_count()
    if not count:
        return f"The device {wanted!r} cannot be used", "torch finds no GPU here; nvidia-smi says what the driver sees."
    return (
        f"There is no device {wanted!r}",
        f"torch finds {count}: cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}.",
    )


def choose_dtype(device: str) -> str:
    """float32 on a CPU and bfloat16 on an accelerator, however the weights are stored.

    It must not follow the checkpoint: source, converted and uptrained model may be stored differently and have to be
    measured alike.
    """
    return "bfloat16" if device.startswith("cuda") else "float32"


def has_native_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it is slower than float32."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not device.startswith("cpu"):
        return False
    # torch has no public name for this; a missing probe means float32, never a crash.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "cla-convert": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and GPUs of this machine."""
    import psutil
    import torch

    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def peak_memory_bytes(device: str) -> int:
    """Peak bytes allocated on a CUDA device; elsewhere the peak resident memory of this process (0 where unknown)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:  # the kernel's high-water mark of this program; ru_maxrss would start from the size of the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: str) -> None:
    """Let the peak of a CUDA device begin anew, so that a stage does not report what the one before it took."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: str) -> int | None:
    """Bytes of all memory of a CUDA device; None of others."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def available_memory() -> int:
    """Bytes that this process may still take without swapping, within the limit of its container (cgroup v2)."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
            if line.startswith("inactive_file ")
        )
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):  # no such limit
        return free


def world_size() -> int:
    """Processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def machines() -> int:
    """Machines that torchrun started processes on; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


ECHO = 0.5
"""Seconds within which a second signal is the same request: `timeout`, a terminal with whoever launched this, and a
shell that ends send theirs twice."""


def stop_signals() -> list[signal.Signals]:
    """What asks to stop: Ctrl-C, a scheduler, and a terminal that closes, unless nohup has that ignored."""
    closes = [one for one in signal.Signals if one.name == "SIGHUP"]  # Windows has none
    return [signal.SIGINT, signal.SIGTERM, *(one for one in closes if signal.getsignal(one) is not signal.SIG_IGN)]


def may_restart() -> bool:
    """Whether torchrun starts this process again if it fails."""
    return "LOCAL_RANK" in os.environ and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def launched() -> bool:
    """Whether another cla-convert started this process to do a part of its work (training/launch.py)."""
    return "CLA_CONVERT_COMMAND" in os.environ


def on_command_line() -> bool:
    """Whether `cla-convert` was started, and not a Python of the user's that imports it."""
    started = Path(sys.argv[0])
    as_module = started.name == "__main__.py" and "cla_convert" in started.parts[-3:]
    return as_module or started.stem in ("cla-convert", "cla-convert-script")


def command_line() -> str:
    """The command that continues this process, ready to paste: its own, without what would start over.

    What `convert --overwrite` replaces is there until the new output is whole.
    """
    if given := os.environ.get("CLA_CONVERT_COMMAND"):  # of the process that started this one
        return given
    if not on_command_line():
        return shlex.join(["python", *sys.argv]) if Path(sys.argv[0]).is_file() else "the same lines of Python"
    program = _torchrun() if world_size() > 1 else ["cla-convert"]
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    afresh = {"--no-resume"} if verb == "convert" else {"--no-resume", "--overwrite"}
    return shlex.join([*program, *(word for word in sys.argv[1:] if word not in afresh)])


def _torchrun() -> list[str]:
    """The line of torchrun that started this process, up to our own arguments; its numbers alone where nobody tells."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    except (OSError, UnicodeError):
        words = []
    own, names = sys.argv[1:], ("torchrun", "torch.distributed.run")
    start = next((number for number, word in enumerate(words, 1) if Path(word).name in names), None)
    if start is not None and words[len(words) - len(own) :] == own:
        return ["torchrun", *words[start : len(words) - len(own)]]
    nodes = ["--nnodes", str(machines())] if machines() > 1 else []
    return ["torchrun", *nodes, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "cla_convert"]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
