"""A worker for tests/test_peers.py: it prints, works, fails or ends as requested."""

import os
import subprocess
import sys

from benchmarks.peers import protocol


def main(task):
    print("libraries print to stdout")
    server = protocol.Server(["numpy"])

    def fail():
        raise ValueError("of no use\nsecond line")

    server.serve(
        {
            "echo": lambda: {"task": task, "python": sys.executable},
            "fail": fail,
            "end": lambda: os._exit(3),
            "child": lambda: {"pid": subprocess.Popen(["sleep", "1000"]).pid},
        }
    )


if __name__ == "__main__":
    protocol.run(main)
