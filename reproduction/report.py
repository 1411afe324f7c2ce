"""placeholder"""

from pathlib import Path


def write_report(preset: str, folder: Path) -> None:
    pass
