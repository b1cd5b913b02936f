"""Check what works on this machine, and name the remedy for what does not."""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table

from vla0.errors import InputError
from vla0.sim import libero_files

JOBS = ("train", "eval", "serve")
GIB = 2**30
MODELS = {  # parameters
    "SmolVLM2-500M": 0.507e9,
    "Qwen3-VL-2B": 2.13e9,
    "Qwen2.5-VL-3B": 3.75e9,
    "Qwen3-VL-4B": 4.44e9,
    "Qwen2.5-VL-7B": 8.29e9,
    "Qwen2.5-VL-72B": 73.4e9,
}
# Bytes per parameter. Acting takes bf16 and what a decode keeps. Training takes fp32 with the
# gradient and two moments.
ACTING, TRAINING = 2.4, 17.0
FRAME = (  # this draws a frame in another process, because a broken driver kills it
    "import os, mujoco; "  # MUJOCO_GL is the one that vla0.sim has set
    'model = mujoco.MjModel.from_xml_string(\'<mujoco><worldbody><light pos="0 0 3"/><geom '
    'size=".3" rgba="1 0 0 1"/>'
    "</worldbody></mujoco>'); data = mujoco.MjData(model); mujoco.mj_forward(model, data); "
    "renderer = mujoco.Renderer(model, 64, 64); renderer.update_scene(data); picture = "
    "renderer.render(); renderer.close(); "
    "assert picture.std() > 5, 'an empty picture'; print(os.environ['MUJOCO_GL'])"
)


@dataclass(frozen=True)
class Finding:
    """The result of a check, which is a line on the screen."""

    name: str
    fine: bool
    detail: str
    remedy: str = ""
    jobs: tuple[str, ...] = ()  # the jobs that cannot run unless this is fine


def diagnose() -> list[Finding]:
    """Run all checks and return their findings, in the order of the screen."""
    checks: list[tuple[str, Callable[[], str], str, tuple[str, ...]]] = [
        ("Python", _python, "install Python 3.12 or later", JOBS),
        ("torch", _torch, "pip install vla0", JOBS),
        ("transformers", lambda: metadata.version("transformers"), "pip install vla0", JOBS),
        ("LeRobot", _lerobot, "pip install 'vla0[lerobot]'", ("train",)),
        (
            "rendering",
            draw,
            "Debian: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; or set MUJOCO_GL",
            ("eval",),
        ),
        ("MuJoCo", _mujoco, f"pip install mujoco=={libero_files.MUJOCO}: results depend on it", ()),
        ("Meta-World", lambda: metadata.version("metaworld"), "pip install 'vla0[metaworld]'", ()),
        ("LIBERO", _libero, "pip install 'vla0[libero]'", ()),
        (
            "disk",
            _disk,
            "free some: a checkpoint of a 3B model takes 15 GB, its training state 45",
            ("train",),
        ),
        (
            "a model to act",
            lambda: _fits(ACTING),
            "a smaller model, or another machine",
            ("eval", "serve"),
        ),
        (
            "a model to train",
            lambda: _fits(TRAINING),
            "the tiny model of configs/demo.yaml, or another machine",
            (),
        ),
    ]
    findings = [_try(*check) for check in checks]
    if not any(line.fine for line in findings if line.name in ("Meta-World", "LIBERO")):
        remedy = "pip install 'vla0[metaworld]' or 'vla0[libero]'"
        findings.append(Finding("a simulator", False, "none", remedy, ("eval",)))
    return findings


def findings_table(findings: list[Finding]) -> Table:
    """Return the findings as a rich table, with a remedy below each that is not fine."""
    table = Table("", "", "found", box=None, pad_edge=False)
    for line in findings:
        table.add_row("[green]ok[/green]" if line.fine else "[red]no[/red]", line.name, line.detail)
        if not line.fine:
            table.add_row("", "", f"→ {line.remedy}")
    return table


def draw() -> str:
    """Render a frame without a screen.

    Returns:
        "MUJOCO_GL=" and the name of the back-end.

    Raises:
        RuntimeError: When rendering fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", FRAME], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(
            (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        )
    return f"MUJOCO_GL={done.stdout.strip()}"


def _try(name: str, check: Callable[[], str], remedy: str, jobs: tuple[str, ...]) -> Finding:
    """Run a check and turn what it returns or raises into a finding."""
    try:
        return Finding(name, True, check())
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", remedy, jobs)
    except InputError as error:
        _, got, better = error.args
        return Finding(name, False, f"{got}", better or remedy, jobs)
    except Exception as error:  # whatever is broken here becomes a line on the screen
        # A plain RuntimeError has a text of ours, which needs no name of a class before it.
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        return Finding(name, False, f"{kind}{error}".splitlines()[0], remedy, jobs)


def _python() -> str:
    """Return the version of Python."""
    return ".".join(map(str, sys.version_info[:3]))


def _torch() -> str:
    """Return the version of torch and the device that it uses."""
    import torch

    place = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        place = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.__version__} on {place}"


def _lerobot() -> str:
    """Return the version of LeRobot and what decodes its videos."""
    from vla0.data.frames import video_backend

    version = metadata.version("lerobot")
    importlib.import_module("lerobot.datasets.lerobot_dataset")
    return f"{version}, videos through {video_backend()}"


def _mujoco() -> str:
    """Return the version of MuJoCo, or raise RuntimeError when LIBERO needs another one."""
    version = metadata.version("mujoco")
    if version != libero_files.MUJOCO:
        raise RuntimeError(f"{version}; LIBERO's pictures are darker from 3.3.3 on")
    return version


def _libero() -> str:
    """Return the version of LIBERO, or raise InputError when a file is not as it was installed."""
    libero_files.check_installed(hashed=True)
    return metadata.version(libero_files.DISTRIBUTION)


def _disk() -> str:
    """Return the free space here, or raise RuntimeError when it is below 5 GiB."""
    free = shutil.disk_usage(Path.cwd()).free
    if free < 5 * GIB:
        raise RuntimeError(f"{free / GIB:.0f} GiB free here")
    return f"{free / GIB:.0f} GiB free here"


def _fits(bytes_each: float) -> str:
    """Return the largest published model that fits, or raise RuntimeError when none does."""
    import torch

    if torch.cuda.is_available():
        memory, place = torch.cuda.get_device_properties(0).total_memory, "GPU"
    else:
        memory, place = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory, on a CPU"
    fitting = [name for name, parameters in MODELS.items() if parameters * bytes_each < memory]
    if not fitting:
        raise RuntimeError(f"no published size in {memory / GIB:.0f} GiB of {place}")
    return f"{fitting[-1]} in {memory / GIB:.0f} GiB of {place}"
