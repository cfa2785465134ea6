"""Runs a target server, for trainings with ``backend=remote`` on other GPUs or machines.

python -m nemo_speculative.serve_target model=llama31_8b backend=hf port=31000
python -m nemo_speculative.serve_target model=local model.path=DIR backend=sglang host=0.0.0.0
"""

import signal
import socket
from importlib.util import find_spec

import torch
from hydra.utils import get_method, instantiate

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import ServeTargetJob
from nemo_speculative.distributed.parallelism import fast_float32_matmuls
from nemo_speculative.targets.base import Target
from nemo_speculative.targets.remote.protocol import TOKEN_VARIABLE, bearer_token
from nemo_speculative.utils.devices import choose_device
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.network import bind_socket

REQUIRED_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
KEEP_ALIVE_SECONDS = 600


@recipe("serve_target")
def main(job: ServeTargetJob) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers the accepted requests and ends.

    Raises:
        UserError: the target or the address is not available, or accepted requests were not answered at the end.
    """
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"a target server needs {missing[0]}, which is not installed: pip install {' '.join(REQUIRED_PACKAGES)}"
        )
    token = bearer_token()
    device = choose_device(job.device, "device")
    with bind_socket(job.host, job.port, f"host={job.host} port={job.port}") as listener, fast_float32_matmuls(device):
        target: Target = instantiate(
            job.backend,
            path=get_method(job.model._target_)(job.model),
            aux_layers=job.aux_layers,
            dtype=getattr(torch, job.model.dtype.value),
            device=device,
            trust_remote_code=job.model.trust_remote_code,
        )
        serve(job, target, token, listener)


def serve(job: ServeTargetJob, target: Target, token: str | None, listener: socket.socket) -> None:
    """Serves on ``listener``; raises UserError if requests are left ``job.drain`` seconds after SIGTERM or SIGINT."""
    import uvicorn

    from nemo_speculative.targets.remote.server import ServerLimits, TargetServer

    server = TargetServer(target, ServerLimits(job.queue, job.max_tokens, job.io_timeout), token, job.backend)
    config = uvicorn.Config(
        server.app, log_level="error", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, lifespan="off",
        timeout_graceful_shutdown=job.drain,
    )  # fmt: skip

    class AnnouncingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            layers = ", ".join(map(str, target.aux_layers)) or "none"
            access = "with the token" if token else f"without a token ({TOKEN_VARIABLE} sets one)"
            print(
                f"serving {target.path} (aux layers {layers}) on http://{f'[{host}]' if ':' in host else host}:{port} "
                f"{access}; SIGTERM or Ctrl-C ends it",
                flush=True,
            )

    # After draining, uvicorn raises the signal again, which by default would kill the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    AnnouncingServer(config).run([listener])
    if server.cancelled:
        raise UserError(f"drain={job.drain}: {server.cancelled} requests were not answered in these seconds")
    print("stopped; every accepted request was answered", flush=True)


if __name__ == "__main__":
    main()
