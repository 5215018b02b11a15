"""Run tests against every fault of faults.json in the working folder, a copy of the code; write outcomes.json.

torch and diffusers are imported once; each run is a fork that imports the copy anew.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import diffusers  # noqa: F401
import peft  # noqa: F401
import pytest
import torch  # noqa: F401
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401


def run(tests: list[str]) -> tuple[int, str]:
    """Run pytest in a fork; return its exit code and the end of what it said."""
    with tempfile.NamedTemporaryFile("r+", encoding="utf8") as said:
        child = os.fork()
        if child == 0:
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
            Path(said.name).write_text(output.getvalue()[-3000:], encoding="utf8")
            os._exit(int(code))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said.read()


def main() -> None:
    """Try every fault in turn."""
    assert not any(name.split(".")[0] in ("diffalign", "tests") for name in sys.modules), "imported too early"
    outcomes = {}
    for name, (file, text, fault, tests) in json.loads(Path("faults.json").read_text(encoding="utf8")).items():
        if file is None:
            outcomes[name] = run(tests)
            continue
        path = Path("diffalign") / file
        original = path.read_text(encoding="utf8")
        try:
            path.write_text(original.replace(text, fault), encoding="utf8")
            outcomes[name] = run([tests])
        finally:
            path.write_text(original, encoding="utf8")
    Path("outcomes.json").write_text(json.dumps(outcomes), encoding="utf8")


if __name__ == "__main__":
    main()
