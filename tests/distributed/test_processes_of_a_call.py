"""Processes that torchrun or Slurm start: their ranks, and the sums that they agree on."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launching import free_port, run_ranks
from refusals import refused

from ddpm_fast.distributed import Processes, joined, joining, ranks
from ddpm_fast.errors import InvalidValue
from ddpm_fast.training import run

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
MASTER = {name: TORCHRUN[name] for name in ("MASTER_ADDR", "MASTER_PORT")}


def test_one_process_needs_no_variables() -> None:
    assert ranks({}) == (0, 1, 0)
    with joined() as team:
        assert team == Processes(0, 1, 0, None)
        assert team.arrive().result() == 0


def test_ranks_of_torchrun_and_slurm() -> None:
    assert ranks(TORCHRUN) == (1, 4, 1)
    assert ranks(SLURM | MASTER) == (3, 4, 1)
    assert ranks(SLURM | TORCHRUN) == (1, 4, 1)
    assert ranks(SLURM) == (0, 1, 0)  # a batch script, which is one process


@pytest.mark.parametrize(
    ("change", "wanted", "got"),
    [
        ({"RANK": None}, "RANK to be a number", "'none'"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE to be a number", "'four'"),
        ({"RANK": "4"}, "RANK to be below WORLD_SIZE", "4 of 4"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK to be a number", "'-1'"),
    ],
)
def test_wrong_variables_are_named(change: dict[str, str | None], wanted: str, got: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"^expected the environment's {wanted}, got {got}"):
        ranks(environment)


def test_a_missing_address_of_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN.keys() - {"MASTER_PORT"}:
        monkeypatch.setenv(name, TORCHRUN[name])
    with pytest.raises(ValueError, match="MASTER_PORT expected, but not set"), joined():
        pass


COLLECTIVES = """
import torch
from ddpm_fast.distributed import joined
with joined() as team:
    r = team.rank
    values = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 1e8]), torch.tensor([-1e8, 1.0]), torch.tensor([1.0, -1e8])]
    print(team.tree_sum(values[r]).tolist(), team.from_first([r + 0.5]), team.largest(r)(), team.on_first(lambda: r))
    copied = torch.full((2, 2), float(r)).t()
    team.copy_from_first([copied])
    print(copied.sum().item(), team.machine_by_machine(lambda: r), team.from_all(str(r)))
"""


def test_processes_agree_and_sum_in_one_tree(tmp_path: Path) -> None:
    done = run_ranks(4, ["-c", COLLECTIVES], tmp_path)
    assert [each.returncode for each in done] == [0] * 4, done[0].stderr
    # (1e8 + 1) + (-1e8 + 1) = 0 in float32; another order would give 2 or 1.
    for rank, each in enumerate(done):
        lines = each.stdout.splitlines()[-2:]  # torch 2.9 prints before them that processes are connected
        assert lines == [f"[0.0, 0.0] [0.5] 3 {0 if rank == 0 else None}", f"0.0 {rank} ['0', '1', '2', '3']"]


BARRIERS = """
import os, sys, time
from datetime import timedelta
from ddpm_fast.distributed import joined
with joined(timedelta(hours=1)) as team:
    if team.rank == 1:
        time.sleep(1)
        if "--die" in sys.argv:
            os._exit(9)
    for _ in range(2):
        arrival, polls = team.arrive(), 0
        while not arrival.done():
            polls += 1
            time.sleep(0.05)
        arrival.result()
        print(polls > 2, end=" ")
"""


@pytest.mark.slow
def test_a_barrier_is_polled_and_notices_an_end(tmp_path: Path) -> None:
    done = run_ranks(2, ["-c", BARRIERS], tmp_path)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    assert done[0].stdout.split()[0] == "True"
    done = run_ranks(2, ["-c", BARRIERS, "--die"], tmp_path)
    assert done[1].returncode == 9
    assert "RuntimeError" in done[0].stderr


AGAIN = """
import sys
import torch.distributed as dist
from ddpm_fast.distributed import joined
for backends in sys.argv[1:]:
    dist.init_process_group(backends)
for _ in range(5):
    with joined() as team:
        print(team.from_first([team.rank + 0.5]), team.largest(team.rank)(), team.store.add("key", 1) <= team.size)
    assert dist.is_initialized() == bool(sys.argv[1:])
"""


@pytest.mark.parametrize("groups", [[], ["gloo"], ["cuda:gloo"]])
def test_processes_join_again(groups: list[str], tmp_path: Path) -> None:
    """A default group that exists is used, also one of GPUs alone, and stays."""
    for each in run_ranks(2, ["-c", AGAIN, *groups], tmp_path):
        assert each.stdout.splitlines() == ["[0.5] 1 True"] * 5, each.stderr


def test_keys_of_replaced_processes_are_not_taken_for_those_of_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun keeps its store when it restarts processes."""
    kept = dist.HashStore()
    kept.set("ddpm_fast/asks/1", "stale")
    kept.set("ddpm_fast/answer/stale", "stale")
    monkeypatch.setattr(joining, "rendezvous", lambda url, rank, size, timeout: iter([(kept, rank, size)]))
    with ThreadPoolExecutor() as pool:
        for _ in range(3):  # the new ones find the keys of those before
            stores = list(pool.map(lambda rank: joining._shared_store.__wrapped__(rank, 3), range(3)))
            assert [store.add("joined", 1) for store in stores] == [1, 2, 3]


RESTARTED = """
import os, sys, time
from ddpm_fast.distributed import joined
rank, began = os.environ["RANK"], sys.argv[1]
if rank == "1" and "--early" in sys.argv and not os.path.exists(began):
    open(began, "w").close()
    os._exit(9)
with joined() as team:
    if rank == "1" and not os.path.exists(began):
        open(began, "w").close()
        os._exit(9)
    try:
        team.largest(0)()
    except RuntimeError:
        time.sleep(3)  # rank 0 saves what it has, so its machine learns of the restart before it ends
        raise
    open(f"{began}.{rank}", "w").close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--early"]])
def test_processes_of_two_machines_are_replaced(options: list[str], tmp_path: Path) -> None:
    """Only the machine of the process that has ended counts the restart."""
    (tmp_path / "program.py").write_text(RESTARTED)
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
    command = [sys.executable, *launch, f"--rdzv-endpoint=localhost:{free_port()}", "program.py", "began", *options]
    machines = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["began", "began.0", "began.1", "program.py"]


def test_a_process_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    script = "import os\nfrom ddpm_fast.distributed import joined\nwith joined() as team:\n    if team.rank: os._exit(9)\n"
    done = run_ranks(2, ["-c", script + "    team.largest(1)()\n"], tmp_path)
    assert done[1].returncode == 9
    assert "ProcessLost: expected an answer of all processes" in done[0].stderr


# ------------------------------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("exists", [False, True])
def test_a_group_is_destroyed_at_the_end_and_aborted_after_an_error(exists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torch.distributed: NCCL's communicator waits in `destroy_process_group` for a process that is lost."""
    left = mock.Mock()
    monkeypatch.setattr(dist, "destroy_process_group", left.destroyed)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", left.aborted)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="the default group"))
    results = {"is_initialized": exists, "init_process_group": None, "new_group": "a group", "get_rank": 0, "get_world_size": 2}
    for name, result in results.items():
        monkeypatch.setattr(dist, name, mock.Mock(return_value=result))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(joining, "ranks", lambda *_: (0, 2, 0))
    monkeypatch.setattr(joining, "_shared_store", lambda *_: dist.HashStore())
    ours = ["a group"] if exists else ["a group", "the default group"]  # the caller's default group stays
    with joined():
        pass
    assert left.mock_calls == [mock.call.destroyed(group) for group in ours]
    left.reset_mock()
    with pytest.raises(ZeroDivisionError), joined():
        1 / 0  # noqa: B018
    assert left.mock_calls == [mock.call.aborted(group) for group in ours]


INTERRUPTED = """
import os
from contextlib import suppress
from datetime import timedelta
from ddpm_fast.distributed import ProcessLost, joined

hour = timedelta(hours=1)

def lives_on():
    with joined(hour) as team:
        for _ in range(2):
            arrival = team.arrive()
            if team.rank == 0:
                raise KeyboardInterrupt
            arrival.result()
            print("arrived")

def leaves():
    with joined(hour) as team:
        if team.rank == 1:  # it hangs
            team.store.wait(["left"], hour)
            os._exit(9)
        stores.append(team.store)
        team.arrive()
        raise KeyboardInterrupt

stores = []
for function in (lives_on, leaves):
    with suppress(KeyboardInterrupt, ProcessLost):
        function()
stores[0].set("left", "")
print("left")
"""


def test_an_interrupted_process_leaves_one_that_hangs(tmp_path: Path) -> None:
    """It leaves at once though gloo cannot abort. If it lives on, the others notice that it has left."""
    done = run_ranks(2, ["-c", INTERRUPTED], tmp_path)
    assert [each.stdout for each in done] == ["left\n", "arrived\n"], [each.stderr for each in done]
    assert done[1].returncode != 0


@pytest.mark.parametrize(
    ("backends", "got"),
    [
        ("cpu:gloo,cuda:gloo", "gloo"),
        ("cpu:gloo", "cpu:gloo"),
        ("cpu:gloo,cuda:nccl", None),
        ("cuda:nccl", None),
    ],
)
def test_a_group_without_a_backend_for_gpus_is_refused(backends: str, got: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`get_backend` gives the name that the group was made with."""
    chosen = mock.Mock()
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "get_backend", lambda: got)
    monkeypatch.setattr(run, "computing_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    team = Processes(1, 2, 1)
    assert run._device("cpu", team) == torch.device("cpu")
    expected = 'to have a backend for CUDA tensors ("cpu:gloo,cuda:nccl")'
    error = InvalidValue("the default group of torch.distributed", expected, f'"{got}"')
    with refused(error) if got else nullcontext():
        assert run._device("cuda", team) == torch.device("cuda:1")
    assert chosen.mock_calls == ([] if got else [mock.call(torch.device("cuda:1"))])
