"""Runs of the programs in ``tools/`` that start in a tenth of a second, forked from a process that has imported it all.

``python fork_server.py SOCKET`` serves. ``python fork_server.py SOCKET TOOL ARGUMENTS...`` is what a test names as the
launcher: it hands its arguments, output and environment to the server, and ends with the status of the run. When this
client is killed, so is the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType


def client(path: str, arguments: list[str]) -> int:
    """Have the server run it; the exit status."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    folder = os.getcwd()
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(("CUDA_", "OMP_", "DETECTRON2_"))
    }
    message = json.dumps([arguments, folder, environment]).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big") + message], [1])
    answer = connection.recv(16)
    return int(answer) if answer else 9


def serve(path: str) -> None:
    """Fork a run for each connection, until the standard input ends."""
    import select

    tools = _tools()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    runs: dict[socket.socket, int] = {}
    while True:
        readable, _, _ = select.select([listener, sys.stdin, *runs], [], [], 0.02)
        if sys.stdin in readable:
            for run in runs.values():
                os.kill(run, signal.SIGKILL)
            os._exit(0)  # taking everything down again takes seconds
        if listener in readable:
            connection, _ = listener.accept()
            run = _fork(connection, tools, [listener, *runs])
            if run is not None:
                runs[connection] = run
        for connection, run in list(runs.items()):
            if connection in readable:  # the client is gone
                os.kill(run, signal.SIGKILL)
            done, status = os.waitpid(run, os.WNOHANG)
            if done or connection in readable:
                if not done:
                    os.waitpid(run, 0)
                else:
                    with contextlib.suppress(OSError):  # the client may have been killed in this moment
                        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()
                del runs[connection]


def _fork(connection: socket.socket, tools: dict[str, ModuleType], others: list[socket.socket]) -> int | None:
    try:
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    except OSError:
        data, descriptors = b"", []
    if not data or not descriptors:  # the client was killed before it said what it wants
        connection.close()
        return None
    arguments, folder, environment = json.loads(data[8:])
    run = os.fork()
    if run:
        os.close(descriptors[0])
        return run
    for item in (*others, connection):
        item.close()
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[0], 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [f"{arguments[0]}.py", *arguments[1:]]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        code = tools[arguments[0]].main(arguments[1:])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tools() -> dict[str, ModuleType]:
    """The tools as modules, with everything imported that a configuration would."""
    import importlib.util

    import torch

    from vis.engine.config import _PARTS

    torch.set_num_threads(1)
    for name in _PARTS:
        importlib.import_module(name)
    found = {}
    for name in ("train_net", "multi_scale_test", "ensemble", "evaluate"):
        file = Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(client(sys.argv[1], sys.argv[2:]))
