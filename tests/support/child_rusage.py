"""Run a command and print the most memory, in bytes, that it had resident, by the operating system's account of it.

In a process of its own, small as it is: Linux counts what a parent had resident when it forked as the child's.
"""

import os
import subprocess
import sys

process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss * 1024)
sys.exit(process.returncode)
