"""The script of ``docs/how_to.md`` for Slurm: two Ray nodes, a preemption, the same job again.

Slurm's commands are stand-ins that do on this machine what Slurm would do on several.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvsharer_exp.search.study import open_study
from kvsharer_exp.values.ports import free_port
from tests.cli.session.test_killed_sweeps import QUICK

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.1; else echo "$@" >> requeued.txt; fi
"""


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_when_it_is_submitted_again(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how_to.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, flags=re.DOTALL)
    (tmp_path / "sweep.sh").write_text(script)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    port = free_port()
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    about = {
        "PATH": path,
        "RAY_PORT": str(port),
        "SLURM_CPUS_PER_TASK": "1",
        "OMP_NUM_THREADS": "1",
    }
    about |= {"SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7", "RAY_AUTH_MODE": "disabled"}
    quick = [word for word in QUICK if not word.startswith("study.n_trials")]
    words = [*quick, "study.name=job", "study.n_trials=60", "hydra.run.dir=run"]
    progress = tmp_path / "mlruns" / "studies" / "job.progress.json"

    def submit() -> subprocess.Popen[bytes]:
        command = ["bash", "sweep.sh", *words]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **about})

    def counted() -> int:
        with open_study("job", storage=None, folder=progress.parent) as store:
            return len(store.results())

    job = submit()
    try:
        journal = progress.with_name("job.journal")
        while not journal.is_file() or journal.read_text().count('"op_code":4') < 12:
            time.sleep(0.2)
            assert job.poll() is None
        workers = json.loads(progress.read_text())["workers"]
        assert len(workers) == 2
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 143
        assert (tmp_path / "requeued.txt").read_text() == "requeue 7\n"
        before = counted()
        assert 0 < before < 60
        job = submit()
        assert job.wait(300) == 0
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(port) in " ".join(process.info["cmdline"] or []):
                process.kill()
    assert counted() == 60
    assert json.loads((tmp_path / "run" / "result.json").read_text())["trials"]["complete"] > 0
