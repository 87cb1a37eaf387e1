"""The demo model's text: the Python standard library of the running interpreter.

Its licence (PSF-2.0) allows this, and the text is wherever the script runs: no
download. Left out are tests, generated tables, and what is not the standard
library though it lies in its folder.
"""

import fnmatch
import sysconfig
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",  # character tables, but for a few files
        "pydoc_data",  # the language reference as one literal
        "__pycache__",
    }
)
EXCLUDED_FILES = ("_sysconfigdata_*.py", "python-config.py", "html/entities.py")

HELD_OUT_ONE_IN = 50
"""One file in so many is kept for evaluation."""


@dataclass(frozen=True, slots=True)
class Document:
    """One source file."""

    path: str
    """Relative to the standard library's folder, with forward slashes."""

    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the file is for evaluation; by its name alone, so the same in every run."""
        return zlib.crc32(self.path.encode()) % HELD_OUT_ONE_IN == 0


def read_documents(root: Path | None = None) -> list[Document]:
    """Returns the sources, sorted by path.

    Args:
        root: Folder to read; the standard library's by default.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [Document(name, _read(root / name)) for name in names if _is_wanted(name)]


def _is_wanted(name: str) -> bool:
    return EXCLUDED_FOLDERS.isdisjoint(name.split("/")) and not any(
        fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.split("/")[-1], pattern)
        for pattern in EXCLUDED_FILES
    )


def _read(path: Path) -> str:
    """Reads as the compiler would: by the file's coding line, UTF-8 without one."""
    with tokenize.open(path) as stream:
        return stream.read()
