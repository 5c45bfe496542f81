"""`python -m worker`: one worker, for one GPU or for the CPU."""

import sys

from worker.celery_app import main

if __name__ == "__main__":
    sys.exit(main())
