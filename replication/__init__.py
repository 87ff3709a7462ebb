"""The replication of the SCRAPL paper: tasks, training, records, tables, figures, notebooks. `scrapl_lib` is the
method."""

import time

__started_s__ = time.monotonic()  # of this process, but for the interpreter itself: the imports take seconds
