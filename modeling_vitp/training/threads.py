"""How torch's threads wait for one another on a CPU; imported before torch is, which reads it when it is loaded.

By default they spin for milliseconds, which beside any other busy process may hold up the one that is waited for, and
a step of the quickstart takes many times as long. Asleep they wait steadily, but waking takes a fifth of a step where
nothing else runs. So they spin for some microseconds, as long as GNU's OpenMP does where threads outnumber the cores,
and then sleep; an OpenMP that does not know that setting lets them sleep at once.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
