"""Makes the modules that tests of this folder share importable (backend_parts)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
