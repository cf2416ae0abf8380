"""How torch's threads wait for one another on a CPU; imported before torch is, which reads it when it is loaded.

By default they spin, which costs nothing on an idle machine. Beside any other busy process, the one that is waited for
may not be running, and a step of the quickstart takes many times as long. Waiting asleep is steady, and no slower on
idle cores.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
