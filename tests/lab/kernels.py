from __future__ import annotations
import os
from dataclasses import dataclass
from pathlib import Path
@dataclass(frozen=True)
class Kernel:
    version: str
    bzimage: Path
    config: Path
    devel: Path | None
def find(version: str) -> Kernel:
    d = Path(os.environ["KHO_LAB_KERNELS"]) / version
    devel = d / "devel.tar.zst"
    return Kernel(version, d / "bzImage", d / "config", devel if devel.exists() else None)
