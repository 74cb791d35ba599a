"""What a process has to work with: memory, speed of matrix products, bandwidth.

launch -> Machine: a named accelerator from the table, the GPUs of this machine, or its CPU
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from alignpipe.config import LaunchConfig
from alignpipe.pipeline.launch import num_processes

# Share of the peak that a run gets: Llama 3 405B 38 to 43 % (arXiv:2407.21783, table 4), PaLM 46 % (arXiv:2204.02311).
UTILISATION = 0.4
# The interpreter and the libraries of one process, which the parts of an estimate leave out; measured, bytes.
IMPORTS = 400e6
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """What one process has.

    Attributes:
        name: of the accelerator, or `cpu`.
        memory: bytes.
        flops: dense, a second, with 16-bit products; None where not known.
        wide_flops: the same in float32 without tensor cores, as torch computes by default.
        bandwidth: of its memory, bytes a second.
        gpu: whether that memory is a GPU's.
    """

    name: str
    memory: float
    flops: float | None = None
    wide_flops: float | None = None
    bandwidth: float | None = None
    gpu: bool = True

    def peak_flops(self, precision: str) -> float | None:
        """FLOPs a second at best, in the launch's precision."""
        return self.wide_flops if precision == "fp32" else self.flops


# Memory as sold, in decimal bytes; dense figures without sparsity. Each line from the maker's data sheet.
TABLE = {
    machine.name: machine
    for machine in (
        # nvidia.com/en-us/data-center/a100, "A100 80GB SXM".
        Machine("a100", 80e9, 312e12, 19.5e12, 2.039e12),
        # nvidia.com/en-us/data-center/h100, "H100 SXM"; 16-bit figures there are with sparsity, twice these.
        Machine("h100", 80e9, 989e12, 67e12, 3.35e12),
        # nvidia.com/en-us/data-center/h200, "H200 SXM".
        Machine("h200", 141e9, 989e12, 67e12, 4.8e12),
        # nvidia.com/en-us/data-center/l40s.
        Machine("l40s", 48e9, 362e12, 91.6e12, 0.864e12),
        # NVIDIA Ada GPU architecture white paper, appendix A; 16-bit products summed in float32.
        Machine("rtx4090", 24e9, 165e12, 82.6e12, 1.008e12),
        # amd.com/en/products/accelerators/instinct/mi300/mi300x.html.
        Machine("mi300x", 192e9, 1307e12, 163.4e12, 5.3e12),
    )
}


def find_machine(launch: LaunchConfig) -> Machine:
    """The accelerator that the launch names, else this machine's GPUs, else its memory shared by its processes."""
    if launch.accelerator is not None:
        return TABLE[launch.accelerator]
    if launch.device in ("auto", "cuda") and (found := visible_gpu()) is not None:
        return found
    here = -(-num_processes(launch) // launch.num_machines)
    return Machine("cpu", installed_memory() / here - IMPORTS, gpu=False)


def visible_gpu() -> Machine | None:
    """The smallest GPU that `nvidia-smi` lists, with the speed of its name where the table has that."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(
            query, capture_output=True, text=True, timeout=5, check=True
        ).stdout.splitlines()
        memory, name = min(
            (float(size), name.strip()) for size, name in (line.split(",", 1) for line in lines)
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    known = [machine for machine in TABLE.values() if machine.name in name.lower().replace(" ", "")]
    return replace(known[0], memory=memory * 2**20) if known else Machine(name, memory * 2**20)


def installed_memory() -> float:
    """Bytes of this machine's memory, or of the container's share."""
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        return min(memory, float(CGROUP.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return memory
