"""Ends with the exit status of a Ray job's driver. Usage: job_exit_status.py ADDRESS SUBMISSION_ID SUBMIT_STATUS

`driver_exit_code` of the job, where it has one; 128 + n for a driver that signal n ended; 143 for a job that was
stopped; 1 for a job that failed before its driver started; SUBMIT_STATUS for one that was never accepted.
A log stream that broke off while the job goes on is no failure: the job is then polled until it ends.
"""

from __future__ import annotations

import sys
import time

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

POLL_S = 5.0
UNREACHABLE_S = 300.0
STOPPED = 128 + 15


def finished_job(address: str, submission_id: str) -> JobDetails:
    """The job, once it has ended.

    Raises:
        RuntimeError: the server does not know the job, or has not answered for UNREACHABLE_S.
    """
    last_answer = time.monotonic()
    waiting = False
    while True:
        try:
            details = JobSubmissionClient(address).get_job_info(submission_id)
        except (RuntimeError, OSError):  # OSError: what requests raises; RuntimeError: Ray's own
            if not waiting or time.monotonic() - last_answer > UNREACHABLE_S:
                raise
        else:
            if details.status.is_terminal():
                return details
            last_answer = time.monotonic()
            if not waiting:
                print(
                    f"ray_job: job {submission_id} is {details.status.value.lower()}; waiting for it", file=sys.stderr
                )
            waiting = True
        time.sleep(POLL_S)


def exit_status(details: JobDetails) -> int:
    """The shell's view of how a finished job ended; see the module's docstring."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    if code is None or code == 0:
        return 1
    return code if code > 0 else 128 - code


def main() -> int:
    address, submission_id, submit_status = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        details = finished_job(address, submission_id)
    except (RuntimeError, OSError) as error:
        print(f"ray_job: {submission_id} at {address}: {error}", file=sys.stderr)
        return submit_status or 1
    return exit_status(details)


if __name__ == "__main__":
    sys.exit(main())
