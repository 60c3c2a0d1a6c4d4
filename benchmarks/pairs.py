"""Two source trees, walk by walk in turn: the ratio of their times.

    git worktree add ../before REVISION
    python benchmarks/pairs.py ../before/src src [PAIRS]

Each tree runs in a process of its own; the two are asked in turn, so that a slow minute of the
machine hits both.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

CHILD = """
import sys,time,torch
from temporal_vae import TemporalVAE, TemporalVAEConfig
torch.manual_seed(0)
steps={}
for dt in (torch.float32, torch.bfloat16):
    m=TemporalVAE.from_config(TemporalVAEConfig.svd(), seed=0).to(dt).eval()
    z=torch.randn(1,4,4,16,16).to(dt); x=(torch.rand(1,3,4,128,128)*2-1).to(dt)
    pl=m.plan(z.shape,budget="least"); 
    n=str(dt)[6:]
    steps[n+" decode"]=lambda m=m,z=z: m.decode(z)
    steps[n+" decode least"]=lambda m=m,z=z,pl=pl: m.decode(z,plan=pl)
    steps[n+" encode"]=lambda m=m,x=x: m.encode(x,False)
t=TemporalVAE.from_pretrained("tiny").eval()
v=torch.rand(1,3,8,144,256)*2-1
def stream():
    s=t.encode_stream(sample_mode=False)
    for p in v.split(2,2): s.push(p)
    s.finish()
steps["tiny stream"]=stream
steps["tiny predict"]=lambda: t.predict(v)
print(",".join(steps),flush=True)
with torch.no_grad():
    for line in sys.stdin:
        f=steps[line.strip()]; a=time.perf_counter(); f(); print(time.perf_counter()-a,flush=True)
"""


def start(source: str) -> subprocess.Popen[str]:
    """A process that walks what it is told, with this tree."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": source},
    )  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str], name: str) -> float:
    """Seconds of one walk."""
    assert process.stdin is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    return float(line(process))


def main() -> None:
    """Print a row for each walk."""
    before, after = (start(source) for source in sys.argv[1:3])
    names = line(before).split(",")
    line(after)
    for name in names:
        ask(before, name), ask(after, name)
        pairs = []
        for turn in range(int(sys.argv[3]) if len(sys.argv) > 3 else 9):
            order = (before, after) if turn % 2 else (after, before)
            took = {process: ask(process, name) for process in order}
            pairs.append(took[after] / took[before])
        ratios, quarter = sorted(pairs), len(pairs) // 4
        print(
            f"{name:24} after/before {statistics.median(ratios):.3f}, middle half "
            f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
