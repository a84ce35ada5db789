"""One command from a bare machine to a picture, or to the tests. Standard library only.

    python run.py demo     a real ComfyUI with this pack runs the example workflow to a picture
    python run.py test     everything this machine can test; the last line counts
                           (--quick: in three minutes what needs neither server nor browser)
    python run.py check    ruff and pyright alone, as before a commit
    python run.py host     ComfyUI with this pack in the foreground, for trying things by hand
    python run.py bench    the named script of benchmarks/ with its own options, or all: hours;
                           `bench card` measures everything that needs a card
    python run.py plan     what a picture needs on a card of that size; no ComfyUI, card or weights

The environment is in .venv, ComfyUI in .host, the demo in .demo. After an interruption the same
command goes on where it stopped. A second run starts at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if not __package__:  # started as a script
    import runner  # noqa: F401 (makes the repo importable as `pack`)

from pack.runner import commands, environment, plan, suite
from pack.runner.arguments import size
from pack.runner.setup import DEFAULT_HOST

PYTHONS = ((3, 10), (3, 14))  # torch 2.11.0 is published for these


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and what follows `--`."""
    own, rest = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    names = ("demo", "test", "check", "host", "bench", "plan")
    demo, test, check, host, bench, planned = (subparsers.add_parser(name) for name in names)
    versions = list(environment.HOSTS)
    for command in (demo, host):
        command.add_argument(
            "--comfyui", type=Path, metavar="DIR", help="your own ComfyUI; it is not changed"
        )
        command.add_argument("--models", type=Path, metavar="DIR", help="your folder of models")
        command.add_argument("--version", choices=versions, default=DEFAULT_HOST)
        command.add_argument("--cpu", action="store_true", help="use the CPU only")
    demo.add_argument("--size", type=size, help="512 or 512x768: width x height in pixels")
    demo.add_argument("--steps", type=int)
    demo.add_argument("--prompt")
    demo.add_argument("--seed", type=int)
    demo.add_argument("--keep-open", action="store_true", help="leave the server running")
    bench.description = "Without a name all run, which takes hours and rewrites benchmarks/results."
    scripts = ", ".join(commands.benchmark_names())
    bench.add_argument("--version", choices=versions, default=DEFAULT_HOST, help="of ComfyUI")
    bench.add_argument("name", nargs="?", help=f"one script of: {scripts}")
    bench.add_argument("args", nargs=argparse.REMAINDER, help="its options")
    host.add_argument("--port", type=int, default=8188)
    test.add_argument("--host", action="append", choices=versions, help="repeat for more")
    test.add_argument(
        "--comfyui", type=Path, metavar="DIR", help="test on your own ComfyUI; it is not changed"
    )
    test.add_argument(
        "--quick", action="store_true", help="newest ComfyUI only, no server, no browser"
    )
    plan.add_options(planned)
    planned.set_defaults(run=commands.plan)
    demo.set_defaults(run=commands.demo)
    test.set_defaults(run=suite.run)
    check.set_defaults(run=suite.check)
    host.set_defaults(run=commands.host)
    bench.set_defaults(run=commands.bench)
    options = parser.parse_args(own)
    if options.command == "demo":
        chosen = {name: getattr(options, name) for name in ("steps", "prompt", "seed")}
        chosen["width"], chosen["height"] = options.size or (None, None)
        rest += [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        rest += ["--keep-open"] if options.keep_open else []
    return options, rest


def main(argv: list[str]) -> int:
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        here = "{}.{}".format(*sys.version_info[:2])
        print(f"run.py needs Python 3.10 to 3.14, this is {here}: start it with another one.")
        return 1
    options, rest = parse(argv)
    try:
        return options.run(options, rest)
    except environment.SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"run.py: {error.strerror}: {error.filename}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
