"""A worker process of the pipeline on this machine; Beam's own, but for its log.

Beam writes some lines for each process though all is well. Warnings of damaged files go to the report.
"""

import logging
import sys

logging.disable(logging.WARNING)

# pylint: disable-next=wrong-import-position
from apache_beam.runners.worker import sdk_worker_main

if __name__ == '__main__':
  sdk_worker_main.main(sys.argv)
