"""Which nodes a trial may have, and every request that none of them can meet."""

from pathlib import Path

import pytest

from engines.errors import InputError
from sweeps import campaign, flags
from sweeps.catalogue import PLANS
from sweeps.placement import GPU_MEMORY, TYPE, Cluster, Node, Placement, place, words


def node(host: str, cpus: float, gpus: float = 0, kind: str | None = None, memory: int | None = None) -> Node:
    labels = {TYPE: kind} if kind else {}
    labels |= {GPU_MEMORY: str(memory)} if memory else {}
    return Node(f"id-{host}", host, {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}, labels)


HEAD = node("head", 0)
SMALL, LARGE = node("small", 8, 2, "T4", 16), node("large", 8, 4, "A100-80G", 80)
CORES = [node("one", 4), node("two", 2)]


def test_without_accelerators_every_core_is_a_slot() -> None:
    assert place(Placement(), CORES, 1.0, needs_gpu=False) == Cluster(slots=6)
    assert place(Placement(), CORES, 0.5, needs_gpu=False).slots == 3
    assert place(Placement(cpus=3), CORES, 1.0, needs_gpu=False).slots == 1, "a trial never spans two nodes"


def test_with_accelerators_each_is_a_slot_or_several() -> None:
    whole = place(Placement(), [HEAD, LARGE], 1.0, needs_gpu=True)
    assert (whole.slots, whole.gpus, whole.shared_cores) == (4, 1.0, False)
    assert place(Placement(gpus=0.5), [HEAD, LARGE], 1.0, needs_gpu=True).slots == 8
    assert place(Placement(gpus=0.1), [node("n", 64, 1)], 1.0, needs_gpu=True).slots == 10
    assert place(Placement(gpus=0.25, cpus=4), [LARGE], 1.0, needs_gpu=True).slots == 2, "cores run out first"
    assert place(Placement(gpus=0), [LARGE], 1.0, needs_gpu=True).gpus == 0
    assert place(Placement(concurrent=40), [LARGE], 1.0, needs_gpu=True).slots == 40, "an autoscaler adds nodes"


def test_a_trial_of_40_gb_does_not_land_on_a_card_of_16() -> None:
    found = place(Placement(gpu_memory=40), [HEAD, SMALL, LARGE], 1.0, needs_gpu=False)
    assert found.slots == 4 and found.gpus == 1
    sizes = found.labels[GPU_MEMORY].removeprefix("in(").removesuffix(")").split(",")
    assert "80" in sizes and "40" in sizes and not {"16", "39"} & set(sizes)
    with pytest.raises(InputError, match=r"--gpu-memory 96: no card is so large \(small 16 GB, large 80 GB\)"):
        place(Placement(gpu_memory=96), [HEAD, SMALL, LARGE], 1.0, needs_gpu=False)
    with pytest.raises(InputError, match=r"says nothing\).*ray start --labels=gpu-memory-gb=80"):
        place(Placement(gpu_memory=40), [node("mute", 8, 1)], 1.0, needs_gpu=False)


def test_latency_is_measured_on_a_card_that_is_large_enough() -> None:
    other = node("other", 64, 8, "A100", 40)
    large = node("large", 8, 1, "A100", 80)
    found = place(Placement(gpu_memory=80), [HEAD, other, large], 1.0, needs_gpu=True)
    assert found.measures_on(large) and not found.measures_on(other)


def test_latency_is_not_measured_on_a_head_without_what_trials_need() -> None:
    found = place(Placement(), [node("worker", 8, 1)], 1.0, needs_gpu=True)
    assert not found.measures_on(node("head", 8, 0)), "its cores would be measured in the place of a card"
    found = place(Placement(gpus=0), [node("worker", 8, 0)], 1.0, needs_gpu=False)
    worker = node("worker", 8, 0)
    assert found.measures_on(worker) and not found.measures_on(node("head", 0, 0))
    found.unfit[worker.node_id] = "another torch"
    assert not found.measures_on(worker) and not found.trains_on(worker)


def test_latency_is_measured_on_one_kind() -> None:
    with pytest.raises(InputError, match="--latency-on: the nodes have A100-80G, T4.*name one"):
        place(Placement(), [SMALL, LARGE], 1.0, needs_gpu=True)
    found = place(Placement(latency_on="T4"), [SMALL, LARGE], 1.0, needs_gpu=True)
    assert found.slots == 6 and found.measures_on(SMALL) and not found.measures_on(LARGE)
    assert place(Placement(gpu_memory=40), [SMALL, LARGE], 1.0, needs_gpu=True).latency_on == "A100-80G"
    with pytest.raises(InputError, match="--latency-on H100: no node that trials may use has one; there is A100-80G"):
        place(Placement(latency_on="H100"), [LARGE], 1.0, needs_gpu=True)


def test_several_workers_of_a_trial_count_over_nodes() -> None:
    """Two nodes of 4 and 2 cores have three trials of two workers, or two of three: a trial may lie on both."""
    found = place(Placement(workers=2), CORES, 1.0, needs_gpu=False)
    assert found == Cluster(slots=3, shared_cores=False, workers=2)
    assert place(Placement(workers=3), CORES, 1.0, needs_gpu=False).slots == 2
    assert place(Placement(workers=6), CORES, 1.0, needs_gpu=False).slots == 1
    assert place(Placement(workers=2), CORES, 0.7, needs_gpu=False).slots == 2
    assert place(Placement(workers=2, cpus=3), [node("a", 4), node("b", 4)], 1.0, needs_gpu=False).slots == 1
    cards = place(Placement(workers=4, gpu_memory=80), [SMALL, LARGE], 1.0, needs_gpu=True)
    assert (cards.slots, cards.gpus, cards.workers) == (1, 1.0, 4)


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        (Placement(gpus=0, latency_on="H100"), CORES, "--latency-on H100: these trials have no accelerator"),
        (Placement(gpu_memory=40), CORES, "--gpu-memory 40: none of 2 nodes has a card; .*leave it out"),
        (Placement(), CORES, "this profile trains on accelerators: none of 2 nodes has one; .*--gpus-per-trial 0"),
        (Placement(gpus=1), CORES, "--gpus-per-trial 1: none of 2 nodes has one"),
        (Placement(gpus=1), [node("half", 4, 0.5)], "--gpus-per-trial 1: the most is 0.5, on half"),
        (Placement(cpus=16), [HEAD, SMALL, LARGE], "--cpus-per-trial 16: no node has so many; the most is 8"),
        (
            Placement(gpus=0, workers=7),
            CORES,
            "--workers-per-trial 7: the cluster has room for 6 workers at a time",
        ),
        (Placement(workers=5, concurrent=1), [LARGE], "--workers-per-trial 5: the cluster has room for 4 workers"),
        (Placement(gpus=0, cpus=5), CORES, "--cpus-per-trial 5: no node has so many; the most is 4, on one"),
    ],
)
def test_what_no_node_has_is_refused(asked: Placement, nodes: list[Node], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        place(asked, nodes, 1.0, needs_gpu=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        "--gpus-per-trial 2",
        "--gpus-per-trial -1",
        "--gpus-per-trial nan",
        "--cpus-per-trial 0",
        "--cpus-per-trial 1.5",
        "--cpus-per-trial inf",
        "--workers-per-trial 0",
        "--gpus-per-trial 0.5 --workers-per-trial 2",
        "--max-concurrent 0",
        "--gpu-memory 0",
        "--gpu-memory 40 --gpus-per-trial 0",
        "--wait-for-nodes -1",
        "--wait-for-nodes 20000",
        "--wait-for-nodes 15",
        "--hang-after 0",
    ],
)
def test_flags_that_no_cluster_could_meet(argv: str) -> None:
    with pytest.raises(InputError) as caught:
        flags.parse("doc", argv.split())
    assert argv.split()[0] in str(caught.value) and argv.split()[1] in str(caught.value)


def test_flags_reach_the_placement() -> None:
    argv = "--gpus-per-trial .5 --cpus-per-trial 4 --max-concurrent 3 --gpu-memory 40 --latency-on H100"
    assert flags.parse("doc", argv.split()).placement == Placement(0.5, 4, 3, 40, "H100")
    assert flags.parse("doc", ["--workers-per-trial", "4"]).placement == Placement(workers=4)
    assert flags.parse("doc", []).placement == Placement()


@pytest.mark.parametrize(
    "asked", [Placement(), Placement(0.5, 4, 3, 40, "H100", 2.5), Placement(gpus=0.0, cpus=0.5, workers=4)]
)
def test_a_campaign_asks_for_the_same_in_each_of_its_stages(asked: Placement, tmp_path: Path) -> None:
    assert flags.parse("doc", ["--address", "auto", *words(asked)]).placement == asked
    argv = ["--address", "auto", "--plan", "alphaqubit", "--profile", "demo", "--storage", str(tmp_path), *words(asked)]
    argv += ["--audit", "0.2"]
    plan = campaign.take_order(argv, PLANS, "campaign").plan
    command = plan.command(plan.stages[0])
    assert flags.parse("doc", command[2:]).placement == asked
    assert flags.parse("doc", command[2:]).audit == 0.2
