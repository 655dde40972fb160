"""What every test shares: where modules are found.

`golden` and other helpers of this folder are importable from any test. An installed `mirage` is preferred; without one
the tests run on this checkout.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent

if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))
if str(TESTS.parent) not in sys.path:
    sys.path.append(str(TESTS.parent))
