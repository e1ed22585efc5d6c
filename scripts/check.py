"""Everything that must hold before a change is done; CI runs the same.

python scripts/check.py                 # all of it
python scripts/check.py lint types      # some of it
python scripts/check.py --list
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What each recipe ends with on the embedded model: 0 when its gates pass.
RECIPES = {
    "recipes/int8-cpu.yaml": 0,
    "recipes/int4-cpu.yaml": 0,
    "recipes/int4-gptq.yaml": 0,
    "recipes/mixed-budget.yaml": 0,
    "recipes/ci-gate.yaml": 0,
    "recipes/cast-cpu.yaml": 0,
    "recipes/cast-gpu.yaml": 0,
    "recipes/int2-qat.yaml": 0,
    "recipes/int4-qat.yaml": 0,
    "recipes/int8-qat.yaml": 0,
    "recipes/partition.yaml": 0,
}


def python(*arguments: str) -> int:
    """Run a Python module in the project's root, and give its exit code."""
    print("$ python -m", *arguments, flush=True)
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def run_tests() -> int:
    """Run the tests, most of which compute in one thread, in two processes; and those that start processes behind them.

    What the second process says is shown when it has ended.
    """
    pipeline, processes = "tests/pipeline", ("tests/pipeline/launching", "tests/pipeline/probing")
    command = [sys.executable, "-m", "pytest", pipeline, *(f"--ignore={path}" for path in processes)]
    with tempfile.TemporaryFile() as said:
        beside = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            code = python("pytest", f"--ignore={pipeline}")
        finally:
            code_beside = beside.wait()
        said.seek(0)
        print("$", *command[1:], said.read().decode(errors="replace"), sep=" ", flush=True)
    return code or code_beside or python("pytest", *processes)


def run_recipes() -> int:
    """Run every recipe on the embedded model: 0 when each ends with the code that it should."""
    unlisted = {str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/*.yaml")} - set(RECIPES)
    for name in unlisted:
        print(f"{name} is not among the recipes that are checked")
    return sum([not _ends_as_it_should(name, code) for name, code in RECIPES.items()], start=len(unlisted))


def _ends_as_it_should(name: str, expected: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        code = python("llmopt", "run", name, "--set", f"output={folder}")
    if code != expected:
        print(f"{name} ended with {code}, and should with {expected}")
    return code == expected


CHECKS: Mapping[str, Callable[[], int]] = {
    "format": lambda: python("ruff", "format", "--check"),
    "lint": lambda: python("ruff", "check"),
    "types": lambda: python("mypy"),
    "tests": run_tests,
    "real": lambda: python("pytest", "--real"),
    "recipes": run_recipes,
}


def main() -> int:
    """Run the checks that were asked for, all of them even when one fails, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of: {', '.join(CHECKS)}")
    arguments = parser.parse_args()
    unknown = set(arguments.checks) - set(CHECKS)
    if unknown:
        parser.error(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    outcomes = [_run(name) for name in arguments.checks or CHECKS]
    return 0 if all(outcomes) else 1


def _run(name: str) -> bool:
    began = time.monotonic()
    good = CHECKS[name]() == 0
    print(f"{name}: {'good' if good else 'FAILED'} after {time.monotonic() - began:.0f} s\n", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
