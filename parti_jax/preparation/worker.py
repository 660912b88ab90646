"""A worker process of the pipeline on this machine: Beam's own worker without its log.

Beam logs some lines for each process even without problems. The report names damaged files.
"""

import logging
import sys

logging.disable(logging.WARNING)

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

if __name__ == '__main__':
  sdk_worker_main.main(sys.argv)
