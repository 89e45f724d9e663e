"""Stops the jobs that still run on the cluster of RAY_ADDRESS, and waits until they ended: at most TIMEOUT_S.

A job's driver outlives a cluster that just ends. Ends with 1, and says which, where one did not end in time.
"""

from __future__ import annotations

import os
import sys
import time

from ray.job_submission import JobSubmissionClient

TIMEOUT_S = 20.0
POLL_S = 0.5


def running(client: JobSubmissionClient) -> list[str]:
    """Submission ids of the jobs that have not ended."""
    jobs = client.list_jobs()
    return [job.submission_id for job in jobs if job.submission_id is not None and not job.status.is_terminal()]


def main() -> int:
    try:
        client = JobSubmissionClient(os.environ["RAY_ADDRESS"])
        for job in running(client):
            client.stop_job(job)
        deadline = time.monotonic() + TIMEOUT_S
        while left := running(client):
            if time.monotonic() > deadline:
                print(f"stop_jobs: after {TIMEOUT_S:.0f} s there still run {', '.join(left)}", file=sys.stderr)
                return 1
            time.sleep(POLL_S)
    except (RuntimeError, OSError) as error:  # the cluster ended before, or never came
        print(f"stop_jobs: {os.environ['RAY_ADDRESS']}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
