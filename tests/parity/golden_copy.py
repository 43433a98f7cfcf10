"""A copy of the golden checkpoints, in which checks may leave their results."""

import atexit
import shutil
import tempfile
from pathlib import Path

_folder = tempfile.mkdtemp(prefix="golden-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
GOLDEN = Path(shutil.copytree(Path(__file__).parents[1] / "golden", Path(_folder) / "golden"))
