"""Writes the README's table of models from the registry: `python -m jaxllm.readme`."""

import argparse
import re
import sys
from pathlib import Path

from jaxllm.modeling.registry import ARCHITECTURES, family

BEGIN, END = r"<!-- models:[^\n]*-->", "<!-- end of models -->"


def models_table() -> str:
    """Returns a Markdown table of the architectures that can be loaded."""
    lines = ["| architecture in `config.json` | family | what it is |", "|---|---|---|"]
    for name, module in sorted(ARCHITECTURES.items()):
        about = (family(module).__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{name}` | [`{module}`](jaxllm/modeling/families/{module}.py) | {about} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrites the table, or with `--check` fails where it is out of date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    args = parser.parse_args()
    readme = Path(__file__).parent.parent / "README.md"
    text = readme.read_text()
    new = re.sub(f"({BEGIN}\n).*?({END})", rf"\g<1>{models_table()}\n\g<2>", text, flags=re.DOTALL)
    if args.check and new != text:
        sys.stderr.write("README.md is out of date; run `python -m jaxllm.readme`.\n")
        return 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
