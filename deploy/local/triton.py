"""`python -m deploy.local.triton`: prepare, then become, the local Triton Inference Server.

Run it with .venv-triton's python. The server is the real one, from the nvidia-pytriton wheel, and listens on loopback.
The wheel keeps the Python backend and its stubs (one per Python version) apart; Triton wants them in one folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("platlib"))
SERVER = SITE / "pytriton/tritonserver"
STUB = "triton_python_backend_stub"


def backends(folder: Path) -> Path:
    """Fill `folder` with the Python backend and the stub of this Python; returns its absolute path."""
    python = folder.absolute() / "python"
    shutil.copytree(SERVER / "backends/python", python, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(SERVER / "python_backend_stubs" / version / STUB, python / STUB)
    (python / STUB).chmod(0o755)
    return python.parent


def command(options: argparse.Namespace) -> list[str]:
    has_gpu = Path("/dev/nvidiactl").exists()
    return [
        str(SERVER / "bin/tritonserver"),
        f"--model-repository={options.repository.absolute()}",
        f"--backend-directory={backends(options.data / 'backends')}",
        "--model-control-mode=none",
        "--exit-on-error=true",
        "--exit-timeout-secs=3",
        "--http-address=127.0.0.1",
        f"--http-port={options.http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={options.grpc_port}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={options.metrics_port}",
        f"--allow-gpu-metrics={str(has_gpu).lower()}",
    ]


def environment() -> dict[str, str]:
    """The wheel's libraries and this Python's own; and this environment first on PATH.

    A stub takes its packages from the first `python3` on PATH; PYTHONPATH alone is not enough.
    """
    libraries = (str(SITE / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"))
    path = (str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath))
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries), "PATH": os.pathsep.join(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--data", type=Path, default=Path("data/triton"), help="folder for the prepared backend")
    argv = command(parser.parse_args())
    os.execve(argv[0], argv, environment())  # noqa: S606 (there is nothing for a shell to do)


if __name__ == "__main__":
    main()
