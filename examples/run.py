"""Run all examples, one after the other, and print one line for each: its claim, and if it holds.

    python examples/run.py [NAME ...] [--short]

An example checks its own claim. The last line it prints begins with PASS or FAIL and gives the
figure; its exit status says the same. With names only these run; options are handed on to them.
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments=None):
    """Runs the examples; returns 0 if all of them hold."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = [argument for argument in arguments if argument.startswith("-")]
    names = [argument for argument in arguments if argument not in options] or sorted(
        path.stem for path in HERE.glob("*.py") if path != Path(__file__)
    )
    width = max(map(len, names))
    held = [run(name, options, width) for name in names]
    print(f"{sum(held)} of {len(held)} examples hold")
    return 0 if all(held) else 1


def run(name, options, width):
    """Runs one example, prints its line, and all that it printed if it does not hold."""
    print(f"{name}: running", file=sys.stderr)
    start = time.perf_counter()
    command = [sys.executable, HERE / f"{name}.py", *options]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    *_, line = finished.stdout.splitlines() or ["FAIL  printed nothing"]
    held = finished.returncode == 0 and line.startswith("PASS")
    if not held:
        print(finished.stdout, file=sys.stderr)
        if not line.startswith("FAIL"):
            line = f"FAIL  exit status {finished.returncode}: {line}"
    print(f"{line[:4]}  {name:{width}}  {line[4:].strip()}  ({seconds:.0f} s)", flush=True)
    return held


if __name__ == "__main__":
    sys.exit(main())
