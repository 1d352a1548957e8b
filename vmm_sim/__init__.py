"""One simulated VMM: a process that is one guest."""

import os

# The thread pool that comes with numpy is never used here, and while it starts it spins on every core: long enough to
# disturb the first round of the migration that this process was started for. Set before numpy is imported anywhere.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
