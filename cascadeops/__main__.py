"""`python -m cascadeops` runs the doctor."""

import sys

from cascadeops.doctor import main

sys.exit(main("python -m cascadeops"))
